"""What lies between LightNorm's fused passes: a channel's statistics out of its sums.

Legend: C channels, K chunks; every vector float64; ``numbers`` are the fields of a `Rounding`, of statistics unless
said otherwise. The rows of ``factors`` are what the passes with results multiply by: MEAN, RECIPROCAL, GAMMA and BETA
of activations, [4, C]; MEAN and SLOPE of gradients, [2, C]. ``amounts`` [C, K] is what a chunk's extrema lose and gain.

Every kernel returns whether all factors are ordinary numbers: then no product of theirs with a value of the format is
NaN, and results need no care for it.
"""

from typing import Any

import numpy as np
from numba import njit

from recoup.lightnorm.cpu_rounding import NONE, Rounding, averaged, rounded

MEAN, RECIPROCAL, GAMMA, BETA = range(4)
SLOPE = 1
LARGE = 1e100  # its products with any value of a format are finite

_njit: Any = njit(nogil=True, cache=True, error_model="numpy")


@_njit
def parameters(gamma, beta, form_numbers, factors):
    """F(gamma) and F(beta)."""
    form, ordinary = Rounding(*form_numbers), True
    for c in range(factors.shape[1]):
        g, b = rounded(np.float64(gamma[c]), form), rounded(np.float64(beta[c]), form)
        factors[GAMMA, c], factors[BETA, c] = g, b
        ordinary = ordinary and abs(g) < LARGE and abs(b) < LARGE
    return ordinary


@_njit
def batch_statistics(sums, ends, constants, elements, eps, uncertainty, numbers, factors, s, doubtful):
    """mu and r, and s; ``constants``: C(m_k) [K]; ``doubtful`` [C]: where float64 does not decide r."""
    statistics, ordinary, chunks = Rounding(*numbers), True, ends.shape[1]
    for c in range(sums.shape[0]):
        sum_of_all, total = sums[c, 0] + sums[c, 1], 0.0
        for k in range(chunks):
            total = total + constants[k] * (ends[c, k, 0] - ends[c, k, 1])
        s[c] = np.nan if np.isnan(sum_of_all) else total / chunks + eps
        mean = averaged(sums[c, 0], sums[c, 1], elements, statistics)
        reciprocal = rounded(1.0 / s[c], statistics)
        low = rounded(1.0 / s[c] * (1.0 - uncertainty), statistics)
        doubtful[c] = statistics.mode != NONE and low != rounded(1.0 / s[c] * (1.0 + uncertainty), statistics)
        factors[MEAN, c], factors[RECIPROCAL, c] = mean, reciprocal
        ordinary = ordinary and abs(mean) < LARGE and abs(reciprocal) < LARGE
    return ordinary


@_njit
def running_statistics(mean, deviation, numbers, factors):
    """mu = S(mean) and r = S(1 / deviation)."""
    statistics, ordinary = Rounding(*numbers), True
    for c in range(factors.shape[1]):
        mu, reciprocal = rounded(np.float64(mean[c]), statistics), rounded(1.0 / deviation[c], statistics)
        factors[MEAN, c], factors[RECIPROCAL, c] = mu, reciprocal
        ordinary = ordinary and abs(mu) < LARGE and abs(reciprocal) < LARGE
    return ordinary


@_njit
def gradient_statistics(
    plain, cross, gamma, r, constants, elements, form_numbers, numbers, factors, amounts, dgamma, dbeta
):
    """m and the slope gamma r, the extrema's amounts, and the gradients of gamma and beta."""
    form, statistics = Rounding(*form_numbers), Rounding(*numbers)
    ordinary, chunks, F = True, amounts.shape[1], dgamma.dtype.type
    for c in range(factors.shape[1]):
        product = averaged(cross[c, 0], cross[c, 1], 1, statistics)
        dgamma[c], dbeta[c] = F(product), F(averaged(plain[c, 0], plain[c, 1], 1, statistics))
        mean = averaged(plain[c, 0], plain[c, 1], elements, statistics) if chunks else 0.0
        slope = rounded(np.float64(gamma[c]), form) * r[c]
        factors[MEAN, c], factors[SLOPE, c] = mean, slope
        for k in range(chunks):
            amounts[c, k] = (slope * constants[k]) * product / chunks
            ordinary = ordinary and abs(amounts[c, k]) < LARGE
        ordinary = ordinary and abs(mean) < LARGE and abs(slope) < LARGE
    return ordinary
