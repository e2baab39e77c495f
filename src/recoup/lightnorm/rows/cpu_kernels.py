"""Layer and RMS norm's numba kernels, one sample at a time, or a range of features; cpu.py calls them.

They hold for float32 and for formats.

Legend: x, xhat, y, dy, dx [S, D] contiguous; a, beta [D] and mu, r, m [S] float64. Sums are pairs as in
`recoup.lightnorm.cpu_kernels`.
"""

from typing import Any

import numpy as np
from numba import njit

from recoup.lightnorm.cpu_rounding import (
    TRUNCATE,
    Rounding,
    fma,
    generally,
    inner,
    odd_sum,
    scaled_difference,
    truncated,
    two_sum,
)

LANES = 16

_njit: Any = njit(nogil=True, cache=True)


@inner
def _multiplied_and_added(factor, x, term):
    """factor x + term rounded to odd; see `exact.multiplied_and_added`."""
    product = factor * x
    high, low = two_sum(fma(factor, x, -product), term)
    total, rest = two_sum(product, high)
    result = odd_sum(total, odd_sum(rest, low))
    return result if result != 0.0 else product + term


@_njit
def normalize_kernel(x, xhat, y, first, last, mean, reciprocal, scale, shift, numbers):
    """xhat = F((x - mu) r), y = F(a xhat + beta); ``numbers`` of a `Rounding` of a format."""
    F, rounding = y.dtype.type, Rounding(*numbers)
    for s in range(first, last):
        mu, r = mean[s], reciprocal[s]
        source, normal, result = x[s], xhat[s], y[s]
        if rounding.mode == TRUNCATE:
            for i in range(source.size):
                h = truncated(scaled_difference(np.float64(source[i]), mu, r), rounding)
                normal[i] = F(h)
                result[i] = F(truncated(_multiplied_and_added(scale[i], h, shift[i]), rounding))
        else:
            for i in range(source.size):
                h = generally(scaled_difference(np.float64(source[i]), mu, r), rounding)
                normal[i] = F(h)
                result[i] = F(generally(_multiplied_and_added(scale[i], h, shift[i]), rounding))


@inner
def _joined(lanes, errors):
    """The pairs of all lanes as one pair."""
    total, error = 0.0, 0.0
    for j in range(LANES):
        total, lost = two_sum(total, lanes[j])
        error += lost
        error += errors[j]
    return total, error


@inner
def _add(g, h, sums, at):
    """Add g to the pairs ``sums[0:2, at]`` and g h to ``sums[2:4, at]``."""
    sums[0, at], error = two_sum(sums[0, at], g)
    sums[1, at] += error
    product = g * h
    sums[2, at], error = two_sum(sums[2, at], product)
    sums[3, at] += error
    sums[3, at] += fma(g, h, -product)


@inner
def _add_row(source, normal, scale, sums):
    """Add a sample's g and g xhat to LANES pairs of each."""
    whole = source.size // LANES * LANES
    for i in range(0, whole, LANES):
        for j in range(LANES):
            at = np.uintp(i) + np.uintp(j)
            _add(scale[at] * np.float64(source[at]), np.float64(normal[at]), sums, j)
    for j in range(source.size - whole):
        at = whole + j
        _add(scale[at] * np.float64(source[at]), np.float64(normal[at]), sums, j)


@_njit
def products_kernel(dy, xhat, first, last, scale, plain, cross):
    """Every sample's sums of g = a dy and of g xhat, as pairs [S, 2]."""
    sums = np.empty((4, LANES))
    for s in range(first, last):
        sums[:] = 0.0
        _add_row(dy[s], xhat[s], scale, sums)
        plain[s, 0], plain[s, 1] = _joined(sums[0], sums[1])
        cross[s, 0], cross[s, 1] = _joined(sums[2], sums[3])


@_njit
def gradient_kernel(dy, dx, first, last, mean, reciprocal, scale, numbers):
    """dx = F'((a dy - m) r); ``numbers`` of a `Rounding` of a format."""
    F, rounding = dx.dtype.type, Rounding(*numbers)
    for s in range(first, last):
        m, r = mean[s], reciprocal[s]
        source, result = dy[s], dx[s]
        if rounding.mode == TRUNCATE:
            for i in range(source.size):
                result[i] = F(truncated(scaled_difference(scale[i] * np.float64(source[i]), m, r), rounding))
        else:
            for i in range(source.size):
                result[i] = F(generally(scaled_difference(scale[i] * np.float64(source[i]), m, r), rounding))


@_njit
def columns_kernel(dy, xhat, first, last, plain, cross):
    """Sums over the samples of dy and of dy xhat, of a range of features, as pairs [D, 2]."""
    sums = np.zeros((4, last - first))
    for s in range(dy.shape[0]):
        source, normal = dy[s, first:last], xhat[s, first:last]
        for i in range(source.size):
            _add(np.float64(source[i]), np.float64(normal[i]), sums, i)
    for i in range(last - first):
        plain[first + i, 0], plain[first + i, 1] = sums[0, i], sums[1, i]
        cross[first + i, 0], cross[first + i, 1] = sums[2, i], sums[3, i]
