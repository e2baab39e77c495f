"""Logarithms and powers of two that are the same on every processor: vectors of a seed must not depend on it.

numpy's own differ in the last bit between vector units; these are linear between powers of two, of operations that are
rounded alike everywhere.
"""

import numpy as np


def log2(values: np.ndarray) -> np.ndarray:
    """e + m for 2^e (1 + m), at most 0.09 below the logarithm; values above 0."""
    fraction, exponent = np.frexp(values)
    return exponent + 2 * fraction - 2


def exp2(values: np.ndarray) -> np.ndarray:
    """Its inverse; of whole numbers the exact power."""
    whole = np.floor(values)
    return np.ldexp(1 + (values - whole), whole.astype(np.int64))
