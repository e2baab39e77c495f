"""LightNorm's fused numba kernels: two passes over the activations, two over the gradient; emitted.py calls them.

A pass reads its input in tiles, the W channels of a block times at most a few hundred places of one chunk of one
sample, rounds them to the format and to blocks in a scratch tile that stays in the first-level cache, and uses them at
once. What was rounded is not stored: rounding it again in the second pass is cheaper than writing and reading it.

Legend: ``keys`` the input's bits, flat in the order [N, C, P]; ``tiles`` [T, 4]: sample, first place, end, chunk;
``how`` the constants of `general.constants`; ``found[0]`` becomes 1 where an input is NaN or infinite, and the caller
then takes the separate passes. Scratch rows are ``pitch`` apart and zero beyond the tile, so that sums run over whole
lanes. Their indices are unsigned: numba would look for negative ones, and then no loop is a vector.
"""

from typing import Any

import numpy as np
from numba import njit

from recoup.formats.cpu_kernels import as_float, as_integer
from recoup.lightnorm.cpu_kernels import GENERAL, LANES, TRUNCATE, _generally, _joined, _truncated
from recoup.lightnorm.fused.general_tiles import copy, exact, infinity_of, share, take

_njit: Any = njit(nogil=True, cache=True)


@_njit
def _add_up(row, size, sums, errors):
    """Add a row of bits to LANES exact pairs; size is a multiple of LANES."""
    for i in range(0, size, LANES):
        for j in range(LANES):
            v, s = np.float64(as_float(row[np.uintp(i) + np.uintp(j)])), sums[j]
            t = s + v
            z = t - s
            errors[j] += (s - (t - z)) + (v - z)
            sums[j] = t


@_njit
def _add_up_products(row, other, size, sums, errors):
    """Add the products of two rows of bits."""
    for i in range(0, size, LANES):
        for j in range(LANES):
            v, s = (
                np.float64(as_float(row[np.uintp(i) + np.uintp(j)]))
                * np.float64(as_float(other[np.uintp(i) + np.uintp(j)])),
                sums[j],
            )
            t = s + v
            z = t - s
            errors[j] += (s - (t - z)) + (v - z)
            sums[j] = t


@_njit
def _extrema(row):
    """The largest and smallest of a row of bits, as floats: integer reductions become vectors, float ones do not."""
    T = row.dtype.type
    absolute, shift = T(~T(T(1) << T(row.itemsize * 8 - 1))), T(row.itemsize * 8 - 1)
    high = low = T(row[0] ^ T(T(row[0] >> shift) & absolute))
    for i in range(row.size):
        key = T(row[i] ^ T(T(row[i] >> shift) & absolute))
        high, low = max(high, key), min(low, key)
    return (
        as_float(T(high ^ T(T(high >> shift) & absolute))),
        as_float(T(low ^ T(T(low >> shift) & absolute))),
    )


@_njit
def _first(row, value):
    """The first index of a value that is there; zeros of either sign are equal."""
    T = row.dtype.type
    spot = T(row.size)
    for i in range(row.size):
        spot = min(spot, T(i) if as_float(row[i]) == value else T(row.size))
    return spot


@_njit
def moments_pass(keys, first, last, shape, tiles, how, sums, ends, indices, found):
    """Panels of channels: exact sums [C, 2] and every chunk's maximum and minimum [C, K, 2] and their indices."""
    channels, places, panel, block, pitch = shape
    infinity = infinity_of(keys)
    tile, spare = np.zeros(block * pitch, keys.dtype), np.zeros((block + 2) * pitch, keys.dtype)
    lanes, held = np.empty((panel, 2, LANES)), 0
    for p in range(first, last):
        begin, width = p * panel, min(panel, channels - p * panel)
        lanes[:] = 0.0
        ends[begin : begin + width, :, 0] = -np.inf
        ends[begin : begin + width, :, 1] = np.inf
        for t in range(tiles.shape[0]):
            sample, start, end, chunk = tiles[t]
            n = end - start
            if n != held:
                tile[:] = 0
                spare[:] = 0
                held = n
            size = (n + LANES - 1) // LANES * LANES
            for b in range(0, width, block):
                W = min(block, width - b)
                at = (sample * channels + begin + b) * places + start
                if take(keys, tile, spare, at, places, W, n, pitch, how) >= infinity:
                    found[0] = 1
                    return
                for w in range(W):
                    row, c = tile[w * pitch : w * pitch + n], begin + b + w
                    _add_up(tile[w * pitch : w * pitch + size], size, lanes[b + w, 0], lanes[b + w, 1])
                    top, bottom = _extrema(row)
                    if top > ends[c, chunk, 0]:
                        ends[c, chunk, 0] = top
                        indices[c, chunk, 0] = sample * places + start + _first(row, top)
                    if bottom < ends[c, chunk, 1]:
                        ends[c, chunk, 1] = bottom
                        indices[c, chunk, 1] = sample * places + start + _first(row, bottom)
        for w in range(width):
            _joined(lanes[w, 0], lanes[w, 1], sums[begin + w])


@_njit
def products_pass(keys, others, first, last, shape, tiles, how, plain, cross, found):
    """Panels of channels: exact sums of g and of g xhat, as pairs [C, 2]; ``others`` are the bits of xhat."""
    channels, places, panel, block, pitch = shape
    infinity = infinity_of(keys)
    tile, spare = np.zeros(block * pitch, keys.dtype), np.zeros((block + 2) * pitch, keys.dtype)
    other, lanes, held = np.zeros(pitch, keys.dtype), np.empty((panel, 4, LANES)), 0
    for p in range(first, last):
        begin, width = p * panel, min(panel, channels - p * panel)
        lanes[:] = 0.0
        for t in range(tiles.shape[0]):
            sample, start, end, _ = tiles[t]
            n = end - start
            if n != held:
                tile[:] = 0
                spare[:] = 0
                other[:] = 0
                held = n
            size = (n + LANES - 1) // LANES * LANES
            for b in range(0, width, block):
                W = min(block, width - b)
                at = (sample * channels + begin + b) * places + start
                if take(keys, tile, spare, at, places, W, n, pitch, how) >= infinity:
                    found[0] = 1
                    return
                for w in range(W):
                    row, held_lanes = tile[w * pitch : w * pitch + size], lanes[b + w]
                    copy(others[at + w * places : at + w * places + n], other[:n])
                    _add_up(row, size, held_lanes[0], held_lanes[1])
                    _add_up_products(row, other, size, held_lanes[2], held_lanes[3])
        for w in range(width):
            _joined(lanes[w, 0], lanes[w, 1], plain[begin + w])
            _joined(lanes[w, 2], lanes[w, 3], cross[begin + w])


@_njit
def _normalize_row(row, normal, F, mu, r, g, b, mode, rounding):
    """xhat = F((x - mu) r) to memory, y = F(gamma xhat + beta) to the row."""
    if mode == TRUNCATE:
        for i in range(row.size):
            h = _truncated((np.float64(as_float(row[i])) - mu) * r, rounding)
            normal[i] = F(h)
            row[i] = as_integer(F(_truncated(g * h + b, rounding)))
    elif mode == GENERAL:
        for i in range(row.size):
            h = _generally((np.float64(as_float(row[i])) - mu) * r, rounding)
            normal[i] = F(h)
            row[i] = as_integer(F(_generally(g * h + b, rounding)))
    else:
        for i in range(row.size):
            h = F((np.float64(as_float(row[i])) - mu) * r)
            normal[i] = h
            row[i] = as_integer(F(g * np.float64(h) + b))


@_njit
def normalize_pass(keys, xhat, y, first, last, shape, tiles, offsets, how, vectors, found):
    """Samples' blocks of channels, in memory order: xhat and B(y). ``vectors``: mu, r, gamma, beta [4, C]; ``y`` bits.

    ``offsets``: where every sample's tiles begin.
    """
    channels, places, block, blocks, pitch = shape
    infinity, F = infinity_of(keys), xhat.dtype.type
    rounding, mode = exact(how), how[25]
    tile, spare = np.zeros(block * pitch, keys.dtype), np.zeros((block + 2) * pitch, keys.dtype)
    for i in range(first, last):
        sample, begin = i // blocks, i % blocks * block
        W = min(block, channels - begin)
        for t in range(offsets[sample], offsets[sample + 1]):
            start, n = tiles[t, 1], tiles[t, 2] - tiles[t, 1]
            at = (sample * channels + begin) * places + start
            if take(keys, tile, spare, at, places, W, n, pitch, how) >= infinity:
                found[0] = 1
                return
            for w in range(W):
                c, to = begin + w, at + w * places
                mu, r, g, b = vectors[0, c], vectors[1, c], vectors[2, c], vectors[3, c]
                row, normal = tile[w * pitch : w * pitch + n], xhat[to : to + n]
                _normalize_row(row, normal, F, mu, r, g, b, mode, rounding)
            out = share(tile, spare, W, n, pitch, how)
            for w in range(W):
                copy(out[w * pitch : w * pitch + n], y[at + w * places : at + w * places + n])


@_njit
def _once(v, mode, rounding):
    """A float64 in a format."""
    if mode == TRUNCATE:
        return _truncated(v, rounding)
    return _generally(v, rounding) if mode == GENERAL else v


@_njit
def _gradient_row(row, F, m, a, mode, rounding):
    """F'((g - m) slope) in place."""
    if mode == TRUNCATE:
        for i in range(row.size):
            row[i] = as_integer(F(_truncated((np.float64(as_float(row[i])) - m) * a, rounding)))
    elif mode == GENERAL:
        for i in range(row.size):
            row[i] = as_integer(F(_generally((np.float64(as_float(row[i])) - m) * a, rounding)))
    else:
        for i in range(row.size):
            row[i] = as_integer(F((np.float64(as_float(row[i])) - m) * a))


@_njit
def gradient_pass(keys, dx, first, last, shape, tiles, offsets, how, vectors, amounts, indices, found):
    """dx = B(F'((g - m) slope -+ the extrema's amounts)), as `cpu_kernels.gradient_kernel`; ``vectors``: m, slope."""
    channels, places, block, blocks, pitch = shape
    infinity, F = infinity_of(keys), type(as_float(keys[0]))
    rounding, mode = exact(how), how[25]
    tile, spare = np.zeros(block * pitch, keys.dtype), np.zeros((block + 2) * pitch, keys.dtype)
    ends = np.empty(2)
    for i in range(first, last):
        sample, begin = i // blocks, i % blocks * block
        W = min(block, channels - begin)
        for t in range(offsets[sample], offsets[sample + 1]):
            start, n, chunk = tiles[t, 1], tiles[t, 2] - tiles[t, 1], tiles[t, 3]
            at = (sample * channels + begin) * places + start
            if take(keys, tile, spare, at, places, W, n, pitch, how) >= infinity:
                found[0] = 1
                return
            for w in range(W):
                c, row = begin + w, tile[w * pitch : w * pitch + n]
                m, a = vectors[0, c], vectors[1, c]
                origin = sample * places + start
                for side in range(2 if amounts.shape[1] > 0 else 0):  # before the row is overwritten
                    spot = indices[c, chunk, side] - origin
                    if 0 <= spot < n:
                        amount = -amounts[c, chunk] if side else amounts[c, chunk]
                        ends[side] = _once((np.float64(as_float(row[spot])) - m) * a - amount, mode, rounding)
                _gradient_row(row, F, m, a, mode, rounding)
                for side in range(2 if amounts.shape[1] > 0 else 0):
                    spot = indices[c, chunk, side] - origin
                    if 0 <= spot < n and indices[c, chunk, 0] != indices[c, chunk, 1]:
                        row[spot] = as_integer(F(ends[side]))
            out = share(tile, spare, W, n, pitch, how)
            for w in range(W):
                copy(out[w * pitch : w * pitch + n], dx[at + w * places : at + w * places + n])
