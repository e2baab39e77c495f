"""The numba kernels of block-scaled products; block_cpu.py calls them.

All of it is exact in float64: a term is a product of eight bits, or a sum of sixteen with its scales, of twenty; times
a power of two it is cut by a truncation to an integer below 2^49.

Legend: M rows, L columns of a tile, T tiles; K terms, S of them that are aligned (K products, or sums of sixteen).
"""

from typing import Any

import numpy as np
from numba import njit

from recoup.formats.cpu_kernels import as_float, as_integer

__all__ = ["TILE", "prepare_kernel", "products_kernel", "sixteens_kernel"]

TILE = 64  # columns
SUMMED = 16  # as config.SUMMED; numba keeps it as a constant
FRACTION, BIAS, ZERO_EXPONENT = 52, 1023, -126
LOW_BITS = (1 << 29) - 1  # what float64 has and float32 has not
# float32's infinity, its smallest normal, and its finest place's inverse
HUGE, TINY, GRID = 2.0**128, 2.0**-126, 2.0**149

_njit: Any = njit(nogil=True, cache=True)
_BARE: dict[str, Any] = {"nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_inner: Any = njit(**_BARE)


@_inner
def _exponent(x, smallest):
    """Of a float64 as the unit sees it."""
    if x == 0.0:
        return ZERO_EXPONENT
    return max(((as_integer(x) >> FRACTION) & 0x7FF) - BIAS, smallest)


@_njit
def prepare_kernel(x, scale, block, smallest, scale_smallest, values, exponents, first, last):
    """x [K, N] with scale [ceil(K / block), N] as values [T, K, L], scales multiplied in, and their exponents. NaN
    scales are 1; columns beyond N are zeros."""
    K, N = x.shape
    width = values.shape[2]
    for t in range(first, last):
        for k in range(K):
            for n in range(width):
                column = t * width + n
                if column >= N:
                    values[t, k, n], exponents[t, k, n] = 0.0, ZERO_EXPONENT
                    continue
                v, s = np.float64(x[k, column]), np.float64(scale[k // block, column])
                s = 1.0 if np.isnan(s) else s
                values[t, k, n] = v * s
                exponents[t, k, n] = _exponent(v, smallest) + _exponent(s, scale_smallest)


@_inner
def _begin(c, top):
    """The accumulators' exponents; an infinite one has no say."""
    for n in range(TILE):
        held = 0.0 if abs(c[n]) == np.inf else c[n]
        own = ((as_integer(held) >> FRACTION) & 0x7FF) - BIAS
        top[n] = np.float32(max(own, ZERO_EXPONENT))


@_inner
def _raise(top, a, b):
    """The largest exponents: of all k, a [S] + b [S, L]."""
    for k in range(a.shape[0]):
        for n in range(TILE):
            e = a[k] + b[k, n]
            top[n] = e if e > top[n] else top[n]


@_inner
def _align(c, top, kept, place, total):
    """2^(n - E), and the accumulators in units of the last bit that is kept."""
    for n in range(TILE):
        power = as_float((np.int64(kept - top[n]) + BIAS) << FRACTION)
        held = 0.0 if abs(c[n]) == np.inf else c[n]
        place[n], total[n] = power, np.trunc(held * power)


@_inner
def _leave(c, top, kept, total):
    """The next accumulators: float32 values, toward zero; an infinite one stays."""
    for n in range(TILE):
        v = total[n] * as_float((np.int64(top[n] - kept) + BIAS) << FRACTION)
        normal = as_float(as_integer(v) & ~LOW_BITS)
        small = np.trunc(v * GRID) / GRID
        result = (small if abs(v) < TINY else normal) + 0.0
        result = np.copysign(np.inf, v) if abs(v) >= HUGE else result
        c[n] = c[n] if abs(c[n]) == np.inf else result


@_inner
def _promote(c, whole):
    for n in range(TILE):
        whole[n] = np.float32(whole[n] + np.float32(c[n]))
        c[n] = 0.0


@_njit
def products_kernel(a, a_exponents, b, b_exponents, group, fraction, part, y, first, last):
    """Outputs y [T, M, L] of a [M, K] and b [T, K, L], float64 with their scales; ``part`` k are a chain."""
    M, K = a.shape
    c, total, place = np.zeros(TILE), np.zeros(TILE), np.zeros(TILE)
    top, kept = np.zeros(TILE, np.float32), np.float32(fraction)
    for item in range(first, last):
        t, m = item // M, item % M
        whole = y[t, m]
        for n in range(TILE):
            c[n], whole[n] = 0.0, 0.0
        for begin in range(0, K, part):
            for k in range(begin, min(begin + part, K), group):
                end = min(k + group, begin + part, K)
                _begin(c, top)
                _raise(top, a_exponents[m, k:end], b_exponents[t, k:end])
                _align(c, top, kept, place, total)
                for i in range(k, end):
                    v, column = a[m, i], b[t, i]
                    for n in range(TILE):
                        total[n] += np.trunc(v * column[n] * place[n])
                _leave(c, top, kept, total)
            _promote(c, whole)


@_njit
def sixteens_kernel(a, scale_a, a_exponents, b, scale_b, b_exponents, group, fraction, part, y, first, last):
    """The same of exact sums of sixteen: a [M, K], b [T, K, L] float32 values of 4 bits, scales and their exponents
    [M, S], [T, S, L]."""
    M, K = a.shape
    c, total, place = np.zeros(TILE), np.zeros(TILE), np.zeros(TILE)
    sums, top, kept = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32), np.float32(fraction)
    for item in range(first, last):
        t, m = item // M, item % M
        whole = y[t, m]
        for n in range(TILE):
            c[n], whole[n] = 0.0, 0.0
        for begin in range(0, K, part):
            for k in range(begin, min(begin + part, K), group):
                end = min(k + group, begin + part, K)
                low, high = k // SUMMED, (end + SUMMED - 1) // SUMMED
                _begin(c, top)
                _raise(top, a_exponents[m, low:high], b_exponents[t, low:high])
                _align(c, top, kept, place, total)
                for s in range(low, high):
                    for n in range(TILE):
                        sums[n] = 0.0
                    for i in range(s * SUMMED, min(s * SUMMED + SUMMED, end)):
                        v, column = a[m, i], b[t, i]
                        for n in range(TILE):
                            sums[n] += v * column[n]
                    u, scales = scale_a[m, s], scale_b[t, s]
                    for n in range(TILE):
                        total[n] += np.trunc(np.float64(sums[n]) * (u * scales[n]) * place[n])
                _leave(c, top, kept, total)
            _promote(c, whole)
