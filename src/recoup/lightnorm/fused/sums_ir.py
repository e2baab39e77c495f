"""LightNorm's passes with sums, emitted: `moments` over activations, `products` over gradients; walked by panels.

Scales of a tile's blocks are found first, then every row is rounded and added up, in registers. What was rounded is not
stored: rounding it again in the second pass is cheaper.

Legend: x, g, xhat flat [N, C, P]; K chunks; ``lanes`` holds the sums of a panel's channels, so many vectors of float64
each, between one row and the next; ``slot`` is a channel's place in it.
"""

import math
from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from recoup.kernels.llvm import I64, D, F, P, Target
from recoup.kernels.signature import Definition, Signature
from recoup.lightnorm.fused.tile_ir import LANES, VD, Recipe, Tile
from recoup.lightnorm.fused.walk_ir import PANELS, Row, over_panels

MOMENTS = Signature.of(**PANELS, x=P, sums=P, ends=P, indices=P, chunks=I64)
PRODUCTS = Signature.of(**PANELS, g=P, xhat=P, plain=P, cross=P)
ZERO = ir.Constant(VD, None)


def moments(recipe: Recipe, _: Target) -> ir.Module:
    """Panels: every channel's exact sum as a pair [C, 2]; every chunk's maximum and minimum [C, K, 2] and their first
    indices; ``peak``: the largest exponents met."""
    module = ir.Module("moments")
    v = MOMENTS.define(module, "moments")
    b, tile = v.b, Tile(v.b, recipe, v["scratch"], v["pitch"])
    rounded = tile.at(v["scratch"], b.mul(v["pitch"], I64(2)))  # a row, to look for an extremum's index in
    depth = 1 if recipe.plain else 2

    def begin(slot: Any, c: Any) -> None:
        _keep_sums(tile, v, slot, [ZERO] * depth)
        with tile.counted(I64(0), v["chunks"]) as k:
            for side, start in enumerate((-math.inf, math.inf)):
                tile.put(D(start), v["ends"], _end_of(tile, v, c, k.index, side))

    def each(slot: Any, row: Row) -> None:
        x = tile.at(v["x"], row.at)
        high, low = (tile.constant(value) for value in (-math.inf, math.inf))

        def body(index, inside, high, low, *sums):
            value = tile.quantized(tile.load(x, index, inside), index)
            tile.store(value, rounded, index)
            up, down = value, value
            if inside is not None:  # zeros beyond the row's end add nothing, but would be extrema
                up, down = (b.select(inside, value, tile.constant(end)) for end in (-math.inf, math.inf))
            return [tile.larger(up, high), tile.smaller(down, low), *_added(tile, sums, tile.wide(value))]

        high, low, *sums = tile.along(row.length, body, [high, low, *_kept_sums(tile, v, slot, depth)])
        _keep_sums(tile, v, slot, sums)
        for side, (ends, order) in enumerate(((high, ">"), (low, "<"))):
            end = _end_of(tile, v, row.channel, row.chunk, side)
            held = b.fptrunc(tile.get(v["ends"], end, D), F)
            # Rare after a chunk's first rows. Lanes become one and the index is looked for only then; a tie with an
            # earlier row is none, so that the first index stays.
            with b.if_then(tile.any(b.fcmp_ordered(order, ends, tile.everywhere(held))), likely=False):
                value = tile.reduced(ends, tile.smaller if side else tile.larger)
                tile.put(b.fpext(value, D), v["ends"], end)
                tile.put(b.add(row.origin, tile.find(rounded, value)), v["indices"], end)

    def end(slot: Any, c: Any) -> None:
        sums = _kept_sums(tile, v, slot, depth)
        _put_pair(tile, v["sums"], c, tile.joined(sums[0], sums[1] if depth == 2 else ZERO))

    over_panels(tile, v, v["x"], begin, each, end)
    return module


def products(recipe: Recipe, _: Target) -> ir.Module:
    """Panels: exact sums of g and of g xhat as pairs [C, 2]."""
    module = ir.Module("products")
    v = PRODUCTS.define(module, "products")
    b, tile = v.b, Tile(v.b, recipe, v["scratch"], v["pitch"])
    depth = 1 if recipe.plain else 2

    def begin(slot: Any, c: Any) -> None:
        _keep_sums(tile, v, slot, [ZERO] * depth + [tile.constant(recipe.bias, VD), ZERO])

    def each(slot: Any, row: Row) -> None:
        g, xhat = tile.at(v["g"], row.at), tile.at(v["xhat"], row.at)

        def body(index, inside, *sums):
            value = tile.wide(tile.quantized(tile.load(g, index, inside), index))
            other = tile.wide(tile.load(xhat, index, inside))
            if recipe.bias:
                cross = _added_to_bias(tile, sums[depth:], value, other)
            else:
                cross = _added(tile, sums[depth:], b.fmul(value, other))
            return [*_added(tile, sums[:depth], value), *cross]

        sums = tile.along(row.length, body, _kept_sums(tile, v, slot, depth + 2))
        _keep_sums(tile, v, slot, sums)

    def end(slot: Any, c: Any) -> None:
        sums = _kept_sums(tile, v, slot, depth + 2)
        sums[depth] = b.fsub(sums[depth], tile.constant(recipe.bias, VD))
        _put_pair(tile, v["plain"], c, tile.joined(sums[0], sums[1] if depth == 2 else ZERO))
        _put_pair(tile, v["cross"], c, tile.joined(*sums[depth:]))

    over_panels(tile, v, v["g"], begin, each, end)
    return module


def _added(tile: Tile, sums: Any, value: Any) -> list[Any]:
    """A sum, with its error where it has one, and one more term."""
    if len(sums) == 1:
        return [tile.b.fadd(sums[0], value)]
    t, error = tile.two_sum(sums[0], value)
    return [t, tile.b.fadd(sums[1], error)]


def _added_to_bias(tile: Tile, sums: Sequence[Any], x: Any, y: Any) -> list[Any]:
    """A sum and its errors and one more product, where the sum never leaves the binade of its bias: it then is a
    multiple of one power of two, so that what it took of x y, and what is left of it, are exact."""
    b, (s, errors) = tile.b, sums
    t = tile.multiply_add(x, y, s)
    left = tile.multiply_add(x, y, b.fsub(s, t))
    return [t, b.fadd(errors, left)]


def _end_of(tile: Tile, v: Definition, c: Any, chunk: Any, side: int) -> Any:
    """Index of a chunk's maximum or minimum in [C, K, 2]."""
    b = tile.b
    return b.add(b.mul(b.add(b.mul(c, v["chunks"]), chunk), I64(2)), I64(side))


def _kept_sums(tile: Tile, v: Definition, slot: Any, depth: int) -> list[Any]:
    base = tile.b.mul(slot, I64(depth * LANES))
    return [tile.load(v["lanes"], tile.b.add(base, I64(i * LANES)), None, VD) for i in range(depth)]


def _keep_sums(tile: Tile, v: Definition, slot: Any, sums: Sequence[Any]) -> None:
    base = tile.b.mul(slot, I64(len(sums) * LANES))
    for i, value in enumerate(sums):
        tile.store(value, v["lanes"], tile.b.add(base, I64(i * LANES)))


def _put_pair(tile: Tile, out: Any, c: Any, pair: tuple[Any, Any]) -> None:
    """A sum and its error to [C, 2]."""
    b = tile.b
    for i, value in enumerate(pair):
        tile.put(value, out, b.add(b.mul(c, I64(2)), I64(i)))
