"""What lies between LightNorm's fused passes: a channel's statistics out of its sums, as `passes` computes them.

Legend: C channels, K chunks; every vector float64. ``form``, ``statistics``: how to round, as `cpu.rounding` gives it.
Every kernel returns whether all factors are ordinary numbers: then no product of theirs with a value of the format is
NaN, and results need no care for it.
"""

from typing import Any

import numpy as np
from numba import njit

from recoup.lightnorm.cpu_kernels import GENERAL, TRUNCATE, _generally, _truncated

LARGE = 1e100  # its products with any value of a format are finite

_njit: Any = njit(nogil=True, cache=True, error_model="numpy")


@_njit
def _once(v, rounding):
    """A float64 in a format."""
    if rounding[0] == TRUNCATE:
        return _truncated(v, rounding)
    return _generally(v, rounding) if rounding[0] == GENERAL else v


@_njit
def parameters(gamma, beta, form, vectors):
    """F(gamma) and F(beta) into rows 2 and 3."""
    fine = True
    for c in range(vectors.shape[1]):
        vectors[2, c] = _once(np.float64(gamma[c]), form)
        vectors[3, c] = _once(np.float64(beta[c]), form)
        fine = fine and abs(vectors[2, c]) < LARGE and abs(vectors[3, c]) < LARGE
    return fine


@_njit
def batch_statistics(sums, ends, constants, elements, eps, statistics, vectors, s):
    """mu and r into rows 0 and 1, and s."""
    fine, chunks = True, ends.shape[1]
    for c in range(sums.shape[0]):
        sum_of_all, total = sums[c, 0] + sums[c, 1], 0.0
        for k in range(chunks):
            total = total + constants[k] * (ends[c, k, 0] - ends[c, k, 1])
        s[c] = total / chunks + eps
        if np.isnan(sum_of_all):
            s[c] = np.nan
        vectors[0, c] = _once(sum_of_all / elements, statistics)
        vectors[1, c] = _once(1.0 / s[c], statistics)
        fine = fine and abs(vectors[0, c]) < LARGE and abs(vectors[1, c]) < LARGE
    return fine


@_njit
def running_statistics(mean, deviation, statistics, vectors):
    """mu = S(mean) and r = S(1 / deviation) into rows 0 and 1."""
    fine = True
    for c in range(vectors.shape[1]):
        vectors[0, c] = _once(np.float64(mean[c]), statistics)
        vectors[1, c] = _once(1.0 / deviation[c], statistics)
        fine = fine and abs(vectors[0, c]) < LARGE and abs(vectors[1, c]) < LARGE
    return fine


@_njit
def gradient_statistics(plain, cross, gamma, r, constants, elements, form, statistics, vectors, amounts, parameters):
    """m and the slope gamma r into ``vectors``, the extrema's amounts [C, K], and the gradients of gamma and beta."""
    fine, chunks = True, amounts.shape[1]
    F = parameters.dtype.type
    for c in range(vectors.shape[1]):
        total, product = plain[c, 0] + plain[c, 1], _once(cross[c, 0] + cross[c, 1], statistics)
        slope = _once(np.float64(gamma[c]), form) * r[c]
        parameters[0, c], parameters[1, c] = F(product), F(_once(total, statistics))
        vectors[0, c] = _once(total / elements, statistics) if chunks else 0.0
        vectors[1, c] = slope
        for k in range(chunks):
            amounts[c, k] = (slope * constants[k]) * product / chunks
            fine = fine and abs(amounts[c, k]) < LARGE
        fine = fine and abs(vectors[0, c]) < LARGE and abs(slope) < LARGE
    return fine
