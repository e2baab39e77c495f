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

from recoup.formats.cpu_kernels import as_float, as_integer

LANES = 64
NONE, TRUNCATE, GENERAL = 0, 1, 2  # how values are rounded: see cpu.rounding
MAGNITUDE, SIGN, EXPONENT = (1 << 63) - 1, -(1 << 63), 0x7FF << 52
INFINITY = EXPONENT

_njit: Any = njit(nogil=True, cache=True)


@_njit
def _truncated(v, rounding):
    """v toward zero, flushed and saturated, float64."""
    _, mask, low, top, _, _, _, _ = rounding
    bits = as_integer(v)
    size = np.int64(bits & np.int64(MAGNITUDE))
    cut = np.int64(0) if size < low else min(np.int64(size & mask), top)
    cut = size if size > np.int64(INFINITY) else cut
    return as_float(np.int64(cut | np.int64(bits & np.int64(SIGN))))


@_njit
def _generally(v, rounding):
    """v to nearest even or toward zero, with or without subnormals, float64."""
    _, _, low, top, spread, depth, nearest, flush = rounding
    bits = as_integer(v)
    sign, size = np.int64(bits & np.int64(SIGN)), np.int64(bits & np.int64(MAGNITUDE))
    normal = np.int64(max(size, low) & np.int64(EXPONENT))
    large = as_float(np.int64(min(normal, top) + spread))
    magnitude = as_float(size)
    held = min(magnitude, as_float(top) * 2.0)
    rounded = (held + large) - large
    quantum = as_float(np.int64(min(normal, top) - depth))
    if nearest == 0:
        rounded = rounded - (quantum if rounded > held else 0.0)
    rounded = 0.0 if (flush != 0 and size < low) else rounded
    rounded = min(rounded, as_float(top))
    rounded = magnitude if size > np.int64(INFINITY) else rounded
    return as_float(np.int64(as_integer(rounded) | sign))


@_njit
def _add_up(x, first, last, sums, errors):
    """Add x[first:last] to LANES pairs."""
    source = x[first:last]
    whole = source.size // LANES * LANES
    for i in range(0, whole, LANES):
        for j in range(LANES):
            v, s = np.float64(source[np.uintp(i) + np.uintp(j)]), sums[j]
            t = s + v
            z = t - s
            errors[j] += (s - (t - z)) + (v - z)
            sums[j] = t
    for j in range(source.size - whole):
        v, s = np.float64(source[whole + j]), sums[j]
        t = s + v
        z = t - s
        errors[j] += (s - (t - z)) + (v - z)
        sums[j] = t


@_njit
def _add_up_products(x, y, first, last, sums, errors):
    """Add x y, element by element."""
    left, right = x[first:last], y[first:last]
    whole = left.size // LANES * LANES
    for i in range(0, whole, LANES):
        for j in range(LANES):
            v, s = np.float64(left[np.uintp(i) + np.uintp(j)]) * np.float64(right[np.uintp(i) + np.uintp(j)]), sums[j]
            t = s + v
            z = t - s
            errors[j] += (s - (t - z)) + (v - z)
            sums[j] = t
    for j in range(left.size - whole):
        v, s = np.float64(left[whole + j]) * np.float64(right[whole + j]), sums[j]
        t = s + v
        z = t - s
        errors[j] += (s - (t - z)) + (v - z)
        sums[j] = t


@_njit
def _joined(sums, errors, out):
    """The pairs of all lanes as one pair."""
    total, error = 0.0, 0.0
    for j in range(LANES):
        s, v = total, sums[j]
        total = s + v
        z = total - s
        error += (s - (total - z)) + (v - z)
        error += errors[j]
    out[0], out[1] = total, error


@_njit
def moments_kernel(x, keys, first, last, shape, segments, sums, ends, indices):
    """Per channel: the sum, and of every chunk maximum, minimum and their first indices.

    ``keys``: x as integers of its width. ``sums`` [C, 2], ``ends`` [C, K, 2], ``indices`` [C, K, 2].
    """
    channels, places = shape
    T = keys.dtype.type
    absolute = T(~T(T(1) << T(keys.itemsize * 8 - 1)))
    sign_shift = T(keys.itemsize * 8 - 1)
    lanes, errors = np.empty(LANES), np.empty(LANES)
    chunks = ends.shape[1]
    spots = np.empty((chunks, 2), np.int64)
    for c in range(first, last):
        lanes[:] = 0.0
        errors[:] = 0.0
        ends[c, :, 0] = -np.inf
        ends[c, :, 1] = np.inf
        spots[:] = -1
        for s in range(segments.shape[0]):
            sample, begin, end, chunk = segments[s]
            at = (sample * channels + c) * places
            _add_up(x, at + begin, at + end, lanes, errors)
            part = keys[at + begin : at + end]
            high, low = (
                T(part[0] ^ T(T(part[0] >> sign_shift) & absolute)),
                T(part[0] ^ T(T(part[0] >> sign_shift) & absolute)),
            )
            for i in range(part.size):
                k = part[i]
                key = T(k ^ T(T(k >> sign_shift) & absolute))
                high = max(high, key)
                low = min(low, key)
            top = np.float64(as_float(T(high ^ T(T(high >> sign_shift) & absolute))))
            bottom = np.float64(as_float(T(low ^ T(T(low >> sign_shift) & absolute))))
            if top > ends[c, chunk, 0]:
                ends[c, chunk, 0] = top
                spots[chunk, 0] = s
            if bottom < ends[c, chunk, 1]:
                ends[c, chunk, 1] = bottom
                spots[chunk, 1] = s
        _joined(lanes, errors, sums[c])
        for chunk in range(chunks):
            for side in range(2):
                sample, begin, end, _ = segments[max(spots[chunk, side], 0)]
                at = (sample * channels + c) * places
                i = begin
                while i < end - 1 and np.float64(x[at + i]) != ends[c, chunk, side]:
                    i += 1
                indices[c, chunk, side] = sample * places + i


@_njit
def normalize_kernel(x, xhat, y, first, last, shape, mean, reciprocal, scale, shift, rounding):
    """xhat = F((x - mu) r), y = F(gamma xhat + beta), channel by channel."""
    samples, channels, places = shape
    F = y.dtype.type
    mode = rounding[0]
    for c in range(first, last):
        mu, r, g, b = mean[c], reciprocal[c], scale[c], shift[c]
        for sample in range(samples):
            at = (sample * channels + c) * places
            source, normal, result = x[at : at + places], xhat[at : at + places], y[at : at + places]
            if mode == TRUNCATE:
                for i in range(places):
                    h = _truncated((np.float64(source[i]) - mu) * r, rounding)
                    normal[i] = F(h)
                    result[i] = F(_truncated(g * h + b, rounding))
            elif mode == GENERAL:
                for i in range(places):
                    h = _generally((np.float64(source[i]) - mu) * r, rounding)
                    normal[i] = F(h)
                    result[i] = F(_generally(g * h + b, rounding))
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
        _joined(lanes, errors, plain[c])
        _joined(lanes_x, errors_x, cross[c])


@_njit
def gradient_kernel(g, dx, first, last, shape, mean, slope, amounts, indices, rounding):
    """dx = F'((g - m) slope -+ the extrema's amounts); ``amounts`` [C, K], ``indices`` [C, K, 2]."""
    samples, channels, places = shape
    F = dx.dtype.type
    mode = rounding[0]
    for c in range(first, last):
        m, a = mean[c], slope[c]
        for sample in range(samples):
            at = (sample * channels + c) * places
            source, result = g[at : at + places], dx[at : at + places]
            if mode == TRUNCATE:
                for i in range(places):
                    result[i] = F(_truncated((np.float64(source[i]) - m) * a, rounding))
            elif mode == GENERAL:
                for i in range(places):
                    result[i] = F(_generally((np.float64(source[i]) - m) * a, rounding))
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
                v = (np.float64(g[at]) - m) * a - amount
                if mode == TRUNCATE:
                    v = _truncated(v, rounding)
                elif mode == GENERAL:
                    v = _generally(v, rounding)
                dx[at] = F(v)
