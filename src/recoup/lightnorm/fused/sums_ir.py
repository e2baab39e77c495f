"""LightNorm's passes with sums, emitted: `moments` over activations, `products` over gradients.

A pass reads its input in tiles, the W channels of a block times at most a few hundred places of one chunk of one
sample; scales of blocks are found first, then every row is rounded and added up, in registers. What was rounded is not
stored: rounding it again in the second pass is cheaper.

Legend: x, g, xhat flat [N, C, P]; ``tiles`` int64 [T, 4]: sample, first place, end, chunk; a panel is the channels
whose sums stay in the first-level cache, in ``lanes``; K chunks.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from recoup.kernels.llvm import I64, D, F, P, function
from recoup.lightnorm.fused.tile_ir import LANES, VD, Recipe, Tile

SUMS = ("tiles", "count", "channels", "places", "panel", "block", "pitch", "first", "last", "scratch", "lanes", "peak")
OF_SUMS = ("tiles", "scratch", "lanes", "peak")
POINTERS = {*OF_SUMS, "x", "y", "g", "dx", "xhat", "sums", "ends", "indices", "plain", "cross"}
POINTERS |= {"vectors", "amounts", "offsets"}


def signature(names: tuple[str, ...]) -> dict[str, Any]:
    """LLVM types of arguments: addresses and int64."""
    return {name: P if name in POINTERS else I64 for name in names}


MOMENTS = (*SUMS, "x", "sums", "ends", "indices", "chunks")
PRODUCTS = (*SUMS, "g", "xhat", "plain", "cross")


def moments(recipe: Recipe) -> ir.Module:
    """Panels: every channel's exact sum as a pair [C, 2]; every chunk's maximum and minimum [C, K, 2] and their first
    indices; ``peak``: the largest exponents met."""
    module, b, v = function("moments", ir.VoidType(), signature(MOMENTS))
    tile = Tile(b, recipe, v["scratch"], v["pitch"])
    row = tile.at(v["scratch"], b.mul(v["pitch"], I64(2)))
    depth = 1 if recipe.plain else 2

    def begin(c: Any) -> None:
        with tile.counted(I64(0), v["chunks"]) as k:
            for side, start in enumerate((-math.inf, math.inf)):
                tile.put(D(start), v["ends"], _spot(tile, v, c, k.index, side))

    def each(w: Any, c: Any, at: Any, place: Any, n: Any, chunk: Any) -> None:
        x = tile.at(v["x"], at)
        high, low = (tile.constant(value) for value in (-math.inf, math.inf))

        def body(index, inside, high, low, *sums):
            value = tile.taken(tile.load(x, index, inside), index)
            tile.store(value, row, index)
            up, down = value, value
            if inside is not None:
                up, down = (b.select(inside, value, tile.constant(end)) for end in (-math.inf, math.inf))
            return [tile.larger(up, high), tile.smaller(down, low), *_added(tile, sums, tile.wide(value))]

        high, low, *sums = tile.along(n, body, [high, low, *_kept(tile, v, w, depth)])
        _keep(tile, v, w, depth, sums)
        for side, (ends, order) in enumerate(((high, ">"), (low, "<"))):
            spot = _spot(tile, v, c, chunk, side)
            held = b.fptrunc(tile.get(v["ends"], spot, D), F)
            with b.if_then(tile.any(b.fcmp_ordered(order, ends, tile.everywhere(held))), likely=False):
                value = tile.reduced(ends, tile.smaller if side else tile.larger)
                tile.put(b.fpext(value, D), v["ends"], spot)
                tile.put(b.add(place, tile.find(row, value)), v["indices"], spot)

    def end(w: Any, c: Any) -> None:
        sums = _kept(tile, v, w, depth)
        pair = tile.joined(sums[0], sums[1] if depth == 2 else ir.Constant(VD, None))
        for i in range(2):
            tile.put(pair[i], v["sums"], b.add(b.mul(c, I64(2)), I64(i)))

    _panels(tile, v, v["x"], [ir.Constant(VD, None)] * depth, begin, each, end)
    return module


def products(recipe: Recipe) -> ir.Module:
    """Panels: exact sums of g and of g xhat as pairs [C, 2]."""
    module, b, v = function("products", ir.VoidType(), signature(PRODUCTS))
    tile = Tile(b, recipe, v["scratch"], v["pitch"])
    depth = 1 if recipe.plain else 2

    def each(w: Any, c: Any, at: Any, place: Any, n: Any, chunk: Any) -> None:
        g, xhat = tile.at(v["g"], at), tile.at(v["xhat"], at)

        def body(index, inside, *sums):
            value = tile.wide(tile.taken(tile.load(g, index, inside), index))
            other = tile.wide(tile.load(xhat, index, inside))
            cross = _biased(tile, sums[depth:], value, other) if recipe.bias else None
            cross = cross or _added(tile, sums[depth:], b.fmul(value, other))
            return [*_added(tile, sums[:depth], value), *cross]

        sums = tile.along(n, body, _kept(tile, v, w, depth + 2))
        _keep(tile, v, w, depth + 2, sums)

    def end(w: Any, c: Any) -> None:
        sums = _kept(tile, v, w, depth + 2)
        sums[depth] = b.fsub(sums[depth], tile.constant(recipe.bias, VD))
        plain = sums[0], sums[1] if depth == 2 else ir.Constant(VD, None)
        for name, pair in (("plain", plain), ("cross", sums[depth:])):
            joined = tile.joined(*pair)
            for i in range(2):
                tile.put(joined[i], v[name], b.add(b.mul(c, I64(2)), I64(i)))

    starts = [ir.Constant(VD, None)] * depth + [tile.constant(recipe.bias, VD), ir.Constant(VD, None)]
    _panels(tile, v, v["g"], starts, lambda c: None, each, end)
    return module


def _added(tile: Tile, sums: Any, value: Any) -> list[Any]:
    """A sum, with its error where it has one, and one more term."""
    if len(sums) == 1:
        return [tile.b.fadd(sums[0], value)]
    t, error = tile.two_sum(sums[0], value)
    return [t, tile.b.fadd(sums[1], error)]


def _biased(tile: Tile, sums: Sequence[Any], x: Any, y: Any) -> list[Any]:
    """A sum and its errors and one more product, where the sum never leaves the binade of its bias: it then is a
    multiple of one power of two, so that what it took of x y, and what is left of it, are exact."""
    b, (s, errors) = tile.b, sums
    t = tile.multiply_add(x, y, s)
    left = tile.multiply_add(x, y, b.fsub(s, t))
    return [t, b.fadd(errors, left)]


def _spot(tile: Tile, v: dict[str, Any], c: Any, chunk: Any, side: int) -> Any:
    b = tile.b
    return b.add(b.mul(b.add(b.mul(c, v["chunks"]), chunk), I64(2)), I64(side))


def _kept(tile: Tile, v: dict[str, Any], w: Any, depth: int) -> list[Any]:
    base = tile.b.mul(w, I64(depth * LANES))
    return [tile.load(v["lanes"], tile.b.add(base, I64(i * LANES)), None, VD) for i in range(depth)]


def _keep(tile: Tile, v: dict[str, Any], w: Any, depth: int, sums: Sequence[Any]) -> None:
    base = tile.b.mul(w, I64(depth * LANES))
    for i, value in enumerate(sums):
        tile.store(value, v["lanes"], tile.b.add(base, I64(i * LANES)))


def _panels(
    tile: Tile, v: dict[str, Any], x: Any, starts: list[Any], begin: Callable, each: Callable, end: Callable
) -> None:
    """Sums from their ``starts``: ``begin(c)`` for all channels of a panel, ``each(w, c, at, place, n, chunk)`` for all
    rows of all tiles, with w the channel within the panel and ``at`` the row's first element, and ``end(w, c)``."""
    b = tile.b
    with tile.counted(v["first"], v["last"]) as panel:
        origin = b.mul(panel.index, v["panel"])
        width = least(b, b.sub(v["channels"], origin), v["panel"])
        with tile.counted(I64(0), width) as turn:
            _keep(tile, v, turn.index, len(starts), starts)
            begin(b.add(origin, turn.index))
        with tile.counted(I64(0), v["count"]) as turn:
            sample, start, stop, chunk = (
                tile.get(v["tiles"], b.add(b.mul(turn.index, I64(4)), I64(i)), I64) for i in range(4)
            )
            n, place = b.sub(stop, start), b.add(b.mul(sample, v["places"]), start)
            row = b.add(b.mul(sample, v["channels"]), origin)
            with tile.counted(I64(0), width, v["block"]) as block:
                at = b.add(b.mul(b.add(row, block.index), v["places"]), start)
                end_w = least(b, width, b.add(block.index, v["block"]))
                if tile.recipe.block:
                    tile.exponents(tile.at(x, at), v["places"], b.sub(end_w, block.index), n)
                with tile.counted(block.index, end_w) as turn_w:
                    w = turn_w.index
                    shift = b.mul(b.sub(w, block.index), v["places"])
                    each(w, b.add(origin, w), b.add(at, shift), place, n, chunk)
        with tile.counted(I64(0), width) as turn:
            end(turn.index, b.add(origin, turn.index))
    tile.report(v["peak"])
    b.ret_void()


def least(b: ir.IRBuilder, x: Any, y: Any) -> Any:
    """The smaller of two sizes."""
    return b.select(b.icmp_signed("<", x, y), x, y)
