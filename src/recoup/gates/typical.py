"""Operands of an ordinary layer, by which units of every wing are measured alike where no layer is at hand [ours].

Activations are half zeros, half magnitudes of a normal number; weights are normal. Four standard deviations are the
largest value of the format they are in; what lies beyond becomes that value. The draw is the same for the same seed.
"""

import numpy as np

__all__ = ["DEVIATIONS", "activations", "weights"]

DEVIATIONS = 4.0


def activations(shape: tuple[int, ...], largest: float, generator: np.random.Generator) -> np.ndarray:
    """float64 values: zero with probability 1/2, else |N(0, largest / 4)|, at most ``largest``.

    >>> import numpy as np
    >>> x = activations((1000,), 255, np.random.default_rng(0))
    >>> bool((x >= 0).all() and (x <= 255).all()), round(float((x == 0).mean()), 1)
    (True, 0.5)
    """
    drawn = np.abs(weights(shape, largest, generator))
    return np.where(generator.random(shape) < 0.5, 0.0, drawn)


def weights(shape: tuple[int, ...], largest: float, generator: np.random.Generator) -> np.ndarray:
    """float64 values N(0, largest / 4), of a magnitude of at most ``largest``."""
    return np.clip(generator.normal(0.0, largest / DEVIATIONS, shape), -largest, largest)
