"""LightNorm's fused numba kernels: two passes over the activations, two over the gradient; general.py calls them.

A pass walks x as tiling.py describes, brings every tile to the format and to blocks in scratch memory that stays in the
first-level cache, and uses it at once. What was rounded is not stored: rounding it again in the second pass is cheaper
than writing and reading it.

Legend: ``keys`` the input's bits, flat in the order [N, C, P]; ``pieces`` the fields of a `Tiling`, ``numbers`` those
of a `tile_format.TileFormat`; ``factors`` and ``amounts`` those of statistics.py; ``unfit[0]`` becomes 1 where an input
is NaN or infinite. A tile's rows are ``pitch`` apart and zero beyond n places, so that sums run over whole lanes. Their
indices are unsigned: numba would look for negative ones, and then no loop is a vector.
"""

from typing import Any

import numpy as np
from numba import njit

from recoup.formats.cpu_kernels import as_float, as_integer
from recoup.lightnorm.cpu_kernels import LANES, extrema, join_lanes
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
from recoup.lightnorm.fused.general_tiles import copy, infinity_of, read_tile, share_exponents
from recoup.lightnorm.fused.statistics import BETA, GAMMA, MEAN, RECIPROCAL, SLOPE
from recoup.lightnorm.fused.tile_format import named
from recoup.lightnorm.tiling import Tiling

_njit: Any = njit(nogil=True, cache=True)


@inner
def _scratch(cut, keys):
    """A tile, and as much memory again for its blocks, with two rows for their exponents."""
    size = cut.block * cut.pitch
    return np.zeros(size, keys.dtype), np.zeros(size + 2 * cut.pitch, keys.dtype)


@inner
def _add_up(row, sums, errors):
    """Add a row of bits to LANES exact pairs; its size is a multiple of LANES."""
    for i in range(0, row.size, LANES):
        for j in range(LANES):
            sums[j], error = two_sum(sums[j], np.float64(as_float(row[np.uintp(i) + np.uintp(j)])))
            errors[j] += error


@inner
def _add_up_products(row, other, sums, errors):
    """Add the products of two rows of bits."""
    for i in range(0, row.size, LANES):
        for j in range(LANES):
            at = np.uintp(i) + np.uintp(j)
            product = np.float64(as_float(row[at])) * np.float64(as_float(other[at]))
            sums[j], error = two_sum(sums[j], product)
            errors[j] += error


@inner
def _first(row, value):
    """The first index of a value that is there; zeros of either sign are equal."""
    T = row.dtype.type
    found = T(row.size)
    for i in range(row.size):
        found = min(found, T(i) if as_float(row[i]) == value else T(row.size))
    return found


@_njit
def moments_pass(keys, first, last, pieces, numbers, sums, ends, indices, unfit):
    """Panels of channels: exact sums [C, 2] and every chunk's maximum and minimum [C, K, 2] and their indices."""
    cut, format = Tiling(*pieces), named(numbers)  # noqa: A001 - the field's word
    channels, places, block, pitch = cut.channels, cut.places, cut.block, cut.pitch
    infinity, (tile, spare), held = infinity_of(keys), _scratch(cut, keys), 0
    lanes = np.empty((cut.panel, 2, LANES))
    for panel in range(first, last):
        begin = panel * cut.panel
        width = min(cut.panel, channels - begin)
        lanes[:] = 0.0
        ends[begin : begin + width, :, 0] = -np.inf
        ends[begin : begin + width, :, 1] = np.inf
        for t in range(cut.tiles.shape[0]):
            sample, start, end, chunk = cut.tiles[t]
            n, origin = end - start, sample * places + start
            if n != held:
                tile[:] = 0
                spare[:] = 0
                held = n
            size = (n + LANES - 1) // LANES * LANES
            for b in range(0, width, block):
                W = min(block, width - b)
                at = (sample * channels + begin + b) * places + start
                if read_tile(keys, tile, spare, at, places, W, n, pitch, format) >= infinity:
                    unfit[0] = 1
                    return
                for w in range(W):
                    row, c = tile[w * pitch : w * pitch + n], begin + b + w
                    _add_up(tile[w * pitch : w * pitch + size], lanes[b + w, 0], lanes[b + w, 1])
                    top, bottom = extrema(row)
                    if top > ends[c, chunk, 0]:
                        ends[c, chunk, 0] = top
                        indices[c, chunk, 0] = origin + _first(row, top)
                    if bottom < ends[c, chunk, 1]:
                        ends[c, chunk, 1] = bottom
                        indices[c, chunk, 1] = origin + _first(row, bottom)
        for w in range(width):
            join_lanes(lanes[w, 0], lanes[w, 1], sums[begin + w])


@_njit
def products_pass(keys, others, first, last, pieces, numbers, plain, cross, unfit):
    """Panels of channels: exact sums of g and of g xhat, as pairs [C, 2]; ``others`` are the bits of xhat."""
    cut, format = Tiling(*pieces), named(numbers)  # noqa: A001
    channels, places, block, pitch = cut.channels, cut.places, cut.block, cut.pitch
    infinity, (tile, spare), held = infinity_of(keys), _scratch(cut, keys), 0
    other, lanes = np.zeros(pitch, keys.dtype), np.empty((cut.panel, 4, LANES))
    for panel in range(first, last):
        begin = panel * cut.panel
        width = min(cut.panel, channels - begin)
        lanes[:] = 0.0
        for t in range(cut.tiles.shape[0]):
            sample, start, end, _ = cut.tiles[t]
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
                if read_tile(keys, tile, spare, at, places, W, n, pitch, format) >= infinity:
                    unfit[0] = 1
                    return
                for w in range(W):
                    row, sums = tile[w * pitch : w * pitch + size], lanes[b + w]
                    copy(others[at + w * places : at + w * places + n], other[:n])
                    _add_up(row, sums[0], sums[1])
                    _add_up_products(row, other[:size], sums[2], sums[3])
        for w in range(width):
            join_lanes(lanes[w, 0], lanes[w, 1], plain[begin + w])
            join_lanes(lanes[w, 2], lanes[w, 3], cross[begin + w])


@inner
def _subtract_row(row, F, mu, rounding):
    """D(x - mu) in place: F, the input's type, holds the values of every format."""
    if rounding.mode == TRUNCATE:
        for i in range(row.size):
            row[i] = as_integer(F(truncated(odd_sum(np.float64(as_float(row[i])), -mu), rounding)))
    else:
        for i in range(row.size):
            row[i] = as_integer(F(generally(odd_sum(np.float64(as_float(row[i])), -mu), rounding)))


@inner
def _normalize_row(row, normal, F, mu, r, g, b, rounding):
    """xhat = F((x - mu) r) to memory, y = F(gamma xhat + beta) to the row."""
    if rounding.mode == TRUNCATE:
        for i in range(row.size):
            h = truncated(scaled_difference(np.float64(as_float(row[i])), mu, r), rounding)
            normal[i] = F(h)
            row[i] = as_integer(F(truncated(odd_sum(g * h, b), rounding)))
    elif rounding.mode == GENERAL:
        for i in range(row.size):
            h = generally(scaled_difference(np.float64(as_float(row[i])), mu, r), rounding)
            normal[i] = F(h)
            row[i] = as_integer(F(generally(odd_sum(g * h, b), rounding)))
    else:
        for i in range(row.size):
            h = F((np.float64(as_float(row[i])) - mu) * r)
            normal[i] = h
            row[i] = as_integer(F(g * np.float64(h) + b))


@_njit
def normalize_pass(keys, xhat, y, first, last, pieces, numbers, difference_numbers, factors, unfit):
    """Samples' blocks of channels, in memory order: xhat and B(y); ``y`` bits."""
    cut, format = Tiling(*pieces), named(numbers)  # noqa: A001
    difference = Rounding(*difference_numbers)
    channels, places, block, pitch = cut.channels, cut.places, cut.block, cut.pitch
    infinity, F, (tile, spare) = infinity_of(keys), xhat.dtype.type, _scratch(cut, keys)
    for i in range(first, last):
        sample, begin = i // cut.blocks, i % cut.blocks * block
        W = min(block, channels - begin)
        for t in range(cut.offsets[sample], cut.offsets[sample + 1]):
            _, start, end, _ = cut.tiles[t]
            n, at = end - start, (sample * channels + begin) * places + start
            if read_tile(keys, tile, spare, at, places, W, n, pitch, format) >= infinity:
                unfit[0] = 1
                return
            for w in range(W):
                c, to = begin + w, at + w * places
                mu, r, g, b = factors[MEAN, c], factors[RECIPROCAL, c], factors[GAMMA, c], factors[BETA, c]
                row, normal = tile[w * pitch : w * pitch + n], xhat[to : to + n]
                if difference.mode != NONE:
                    _subtract_row(row, F, mu, difference)
                    mu = 0.0
                _normalize_row(row, normal, F, mu, r, g, b, format.rounding)
            out = share_exponents(tile, spare, W, n, pitch, format)
            for w in range(W):
                copy(out[w * pitch : w * pitch + n], y[at + w * places : at + w * places + n])


@inner
def _gradient_row(row, F, m, slope, rounding):
    """F'((g - m) slope) in place."""
    if rounding.mode == TRUNCATE:
        for i in range(row.size):
            row[i] = as_integer(F(truncated(scaled_difference(np.float64(as_float(row[i])), m, slope), rounding)))
    elif rounding.mode == GENERAL:
        for i in range(row.size):
            row[i] = as_integer(F(generally(scaled_difference(np.float64(as_float(row[i])), m, slope), rounding)))
    else:
        for i in range(row.size):
            row[i] = as_integer(F((np.float64(as_float(row[i])) - m) * slope))


@_njit
def gradient_pass(keys, dx, first, last, pieces, numbers, factors, amounts, indices, unfit):
    """dx = B(F'((g - m) slope -+ the extrema's amounts)), as `cpu_kernels.gradient_kernel`; ``dx`` bits."""
    cut, format = Tiling(*pieces), named(numbers)  # noqa: A001
    channels, places, block, pitch = cut.channels, cut.places, cut.block, cut.pitch
    infinity, F, (tile, spare) = infinity_of(keys), type(as_float(keys[0])), _scratch(cut, keys)
    sides, ends = min(amounts.shape[1], 1) * 2, np.empty(2)  # none without batch statistics
    for i in range(first, last):
        sample, begin = i // cut.blocks, i % cut.blocks * block
        W = min(block, channels - begin)
        for t in range(cut.offsets[sample], cut.offsets[sample + 1]):
            _, start, end, chunk = cut.tiles[t]
            n, origin, at = end - start, sample * places + start, (sample * channels + begin) * places + start
            if read_tile(keys, tile, spare, at, places, W, n, pitch, format) >= infinity:
                unfit[0] = 1
                return
            for w in range(W):
                c, row = begin + w, tile[w * pitch : w * pitch + n]
                m, slope = factors[MEAN, c], factors[SLOPE, c]
                for side in range(sides):  # before the row is overwritten
                    place = indices[c, chunk, side] - origin
                    if 0 <= place < n:
                        amount = -amounts[c, chunk] if side else amounts[c, chunk]
                        g = np.float64(as_float(row[place]))
                        if format.rounding.mode == NONE:
                            ends[side] = (g - m) * slope - amount
                        else:
                            ends[side] = rounded(odd_sum(scaled_difference(g, m, slope), -amount), format.rounding)
                _gradient_row(row, F, m, slope, format.rounding)
                for side in range(sides):
                    place = indices[c, chunk, side] - origin
                    if 0 <= place < n and indices[c, chunk, 0] != indices[c, chunk, 1]:
                        row[place] = as_integer(F(ends[side]))
            out = share_exponents(tile, spare, W, n, pitch, format)
            for w in range(W):
                copy(out[w * pitch : w * pitch + n], dx[at + w * places : at + w * places + n])
