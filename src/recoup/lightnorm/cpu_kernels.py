"""LightNorm's numba kernels, one channel at a time; cpu.py calls them.

Legend: x, g, xhat, y, dx are flat arrays of [N, C, P] in memory order; S segments, each within one sample and one
chunk: sample, first place, end, chunk. Sums are pairs (sum, error): every addition is followed by the exact error it
made (Knuth's TwoSum), lane by lane, so that the loops are vectors, with unsigned indices, or numba would look for
negative ones. A pair is exact while the errors' own sum is: where from the highest bit of a sum of magnitudes to the
lowest bit of an element there are at most 106 bits, as there are for n FP10 activations (34 bits + log2 n). Wider
values, which only floats without a format and gradients of absurd scale have, may lose bits 2^-105 n below the largest.
"""

from typing import Any

import numpy as np
from numba import njit

from recoup.formats.cpu_kernels import as_float
from recoup.lightnorm.cpu_rounding import (
    GENERAL,
    NONE,
    TRUNCATE,
    Rounding,
    generally,
    inner,
    odd_sum,
    rounded,
    scaled_difference,
    truncated,
    two_sum,
)

LANES = 64

_njit: Any = njit(nogil=True, cache=True)


@inner
def _add_up(x, first, last, sums, errors):
    """Add x[first:last] to LANES pairs."""
    source = x[first:last]
    whole = source.size // LANES * LANES
    for i in range(0, whole, LANES):
        for j in range(LANES):
            sums[j], error = two_sum(sums[j], np.float64(source[np.uintp(i) + np.uintp(j)]))
            errors[j] += error
    for j in range(source.size - whole):
        sums[j], error = two_sum(sums[j], np.float64(source[whole + j]))
        errors[j] += error


@inner
def _add_up_products(x, y, first, last, sums, errors):
    """Add x y, element by element."""
    left, right = x[first:last], y[first:last]
    whole = left.size // LANES * LANES
    for i in range(0, whole, LANES):
        for j in range(LANES):
            at = np.uintp(i) + np.uintp(j)
            sums[j], error = two_sum(sums[j], np.float64(left[at]) * np.float64(right[at]))
            errors[j] += error
    for j in range(left.size - whole):
        sums[j], error = two_sum(sums[j], np.float64(left[whole + j]) * np.float64(right[whole + j]))
        errors[j] += error


@inner
def join_lanes(sums, errors, out):
    """The pairs of all lanes as one pair."""
    total, error = 0.0, 0.0
    for j in range(LANES):
        total, lost = two_sum(total, sums[j])
        error += lost
        error += errors[j]
    out[0], out[1] = total, error


@inner
def _ordered(bits, sign_at):
    """A float's bits as an integer that compares as the float does; and back."""
    T = type(bits)
    return T(bits ^ T(T(bits >> T(sign_at)) & T(~T(T(1) << T(sign_at)))))


@inner
def extrema(bits):
    """The largest and smallest of floats given as bits: reductions of integers become vectors, those of floats do
    not."""
    sign_at = bits.itemsize * 8 - 1
    high = low = _ordered(bits[0], sign_at)
    for i in range(bits.size):
        key = _ordered(bits[i], sign_at)
        high, low = max(high, key), min(low, key)
    return as_float(_ordered(high, sign_at)), as_float(_ordered(low, sign_at))


@_njit
def moments_kernel(x, keys, first, last, shape, segments, sums, ends, indices):
    """Per channel: the sum, and of every chunk maximum, minimum and their first indices.

    ``keys``: x as integers of its width. ``sums`` [C, 2], ``ends`` [C, K, 2], ``indices`` [C, K, 2]. The index is
    looked for once the chunk's extremum is known, in the segment that first had it; in a chunk of NaN, which none had,
    it is the last of the first segment.
    """
    channels, places = shape
    lanes, errors = np.empty(LANES), np.empty(LANES)
    chunks = ends.shape[1]
    holders = np.empty((chunks, 2), np.int64)
    for c in range(first, last):
        lanes[:] = 0.0
        errors[:] = 0.0
        ends[c, :, 0] = -np.inf
        ends[c, :, 1] = np.inf
        holders[:] = 0
        for s in range(segments.shape[0]):
            sample, begin, end, chunk = segments[s]
            at = (sample * channels + c) * places
            _add_up(x, at + begin, at + end, lanes, errors)
            top, bottom = extrema(keys[at + begin : at + end])
            if top > ends[c, chunk, 0]:
                ends[c, chunk, 0] = top
                holders[chunk, 0] = s
            if bottom < ends[c, chunk, 1]:
                ends[c, chunk, 1] = bottom
                holders[chunk, 1] = s
        join_lanes(lanes, errors, sums[c])
        for chunk in range(chunks):
            for side in range(2):
                sample, begin, end, _ = segments[holders[chunk, side]]
                at = (sample * channels + c) * places
                i = begin
                while i < end - 1 and np.float64(x[at + i]) != ends[c, chunk, side]:
                    i += 1
                indices[c, chunk, side] = sample * places + i


@inner
def _subtract(source, result, mu, rounding):
    """D(x - mu) in the result's dtype, which holds the values of every format."""
    F = result.dtype.type
    if rounding.mode == TRUNCATE:
        for i in range(source.size):
            result[i] = F(truncated(odd_sum(np.float64(source[i]), -mu), rounding))
    else:
        for i in range(source.size):
            result[i] = F(generally(odd_sum(np.float64(source[i]), -mu), rounding))


@_njit
def normalize_kernel(x, xhat, y, first, last, shape, mean, reciprocal, scale, shift, numbers, difference_numbers):
    """xhat = F(D(x - mu) r), y = F(gamma xhat + beta), channel by channel; ``numbers`` of a `Rounding`."""
    samples, channels, places = shape
    F, rounding, difference = y.dtype.type, Rounding(*numbers), Rounding(*difference_numbers)
    for c in range(first, last):
        r, g, b = reciprocal[c], scale[c], shift[c]
        for sample in range(samples):
            mu = mean[c]
            at = (sample * channels + c) * places
            source, normal, result = x[at : at + places], xhat[at : at + places], y[at : at + places]
            if difference.mode != NONE:
                _subtract(source, normal, mu, difference)
                source, mu = normal, 0.0
            if rounding.mode == TRUNCATE:
                for i in range(places):
                    h = truncated(scaled_difference(np.float64(source[i]), mu, r), rounding)
                    normal[i] = F(h)
                    result[i] = F(truncated(odd_sum(g * h, b), rounding))
            elif rounding.mode == GENERAL:
                for i in range(places):
                    h = generally(scaled_difference(np.float64(source[i]), mu, r), rounding)
                    normal[i] = F(h)
                    result[i] = F(generally(odd_sum(g * h, b), rounding))
            else:
                for i in range(places):
                    h = F((np.float64(source[i]) - mu) * r)
                    normal[i] = h
                    result[i] = F(g * np.float64(h) + b)


@_njit
def products_kernel(g, xhat, first, last, shape, plain, cross):
    """Per channel the sums of g and of g xhat, as pairs [C, 2]."""
    samples, channels, places = shape
    lanes, errors, lanes_x, errors_x = np.empty(LANES), np.empty(LANES), np.empty(LANES), np.empty(LANES)
    for c in range(first, last):
        lanes[:] = 0.0
        errors[:] = 0.0
        lanes_x[:] = 0.0
        errors_x[:] = 0.0
        for sample in range(samples):
            at = (sample * channels + c) * places
            _add_up(g, at, at + places, lanes, errors)
            _add_up_products(g, xhat, at, at + places, lanes_x, errors_x)
        join_lanes(lanes, errors, plain[c])
        join_lanes(lanes_x, errors_x, cross[c])


@_njit
def gradient_kernel(g, dx, first, last, shape, mean, slope, amounts, indices, numbers):
    """dx = F'((g - m) slope -+ the extrema's amounts); ``amounts`` [C, K], ``indices`` [C, K, 2]."""
    samples, channels, places = shape
    F, rounding = dx.dtype.type, Rounding(*numbers)
    for c in range(first, last):
        m, a = mean[c], slope[c]
        for sample in range(samples):
            at = (sample * channels + c) * places
            source, result = g[at : at + places], dx[at : at + places]
            if rounding.mode == TRUNCATE:
                for i in range(places):
                    result[i] = F(truncated(scaled_difference(np.float64(source[i]), m, a), rounding))
            elif rounding.mode == GENERAL:
                for i in range(places):
                    result[i] = F(generally(scaled_difference(np.float64(source[i]), m, a), rounding))
            else:
                for i in range(places):
                    result[i] = F((np.float64(source[i]) - m) * a)
        for chunk in range(amounts.shape[1]):
            high, low = indices[c, chunk, 0], indices[c, chunk, 1]
            if high == low:
                continue
            for side in range(2):
                n = low if side else high
                amount = -amounts[c, chunk] if side else amounts[c, chunk]
                at = (n // places * channels + c) * places + n % places
                v = np.float64(g[at])
                if rounding.mode == NONE:
                    dx[at] = F((v - m) * a - amount)
                else:
                    dx[at] = F(rounded(odd_sum(scaled_difference(v, m, a), -amount), rounding))
