"""LightNorm's passes with results, emitted: `normalize` writes xhat and y, `gradient` dx; in memory order.

Legend: x, xhat, y, g, dx flat [N, C, P]; ``tiles`` int64 [T, 4]: sample, first place, end, chunk, and ``offsets`` where
every sample's begin; K chunks. Results wait in ``scratch`` until their blocks' exponents are known.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from recoup.kernels.llvm import I64, D, function
from recoup.lightnorm.fused.sums_ir import least, signature
from recoup.lightnorm.fused.tile_ir import LANES, VD, Recipe, Tile

RESULTS = ("tiles", "offsets", "channels", "places", "block", "blocks", "pitch", "first", "last", "scratch", "peak")
NORMALIZE = (*RESULTS, "x", "xhat", "y", "vectors")
GRADIENT = (*RESULTS, "g", "dx", "vectors", "amounts", "indices", "chunks")


def normalize(recipe: Recipe) -> ir.Module:
    """xhat = F((x - mu) r) and y = B(F(gamma xhat + beta)); ``vectors``: mu, r, gamma, beta, float64 [4, C]. ``peak``:
    the largest magnitude of inputs' exponents and of results before their blocks."""
    module, b, v = function("normalize", ir.VoidType(), signature(NORMALIZE))
    tile = Tile(b, recipe, v["scratch"], v["pitch"])
    put = tile.store if recipe.block else tile.written

    def each(c: Any, at: Any, n: Any, chunk: Any, origin: Any, out: Any) -> None:
        x, normal = tile.at(v["x"], at), tile.at(v["xhat"], at)
        mu, r, gamma, beta = _factors(tile, v, c, 4)

        def body(index: Any, inside: Any) -> list[Any]:
            value = tile.wide(tile.taken(tile.load(x, index, inside), index))
            xhat = tile.narrowed(b.fmul(b.fsub(value, mu), r))
            y = tile.affine(gamma, xhat, beta)
            for result in (xhat, y):
                seen = tile.magnitude(result)
                tile.note(seen if inside is None else b.select(inside, seen, ir.Constant(seen.type, None)))
            tile.written(xhat, normal, index, inside)
            put(y, out, index, inside)
            return []

        tile.along(n, body)

    _blocks(tile, v, v["x"], v["y"], each)
    return module


def gradient(recipe: Recipe) -> ir.Module:
    """dx = B(F'((g - m) slope, less the amount at a chunk's first maximum, plus it at its first minimum));
    ``vectors``: m, slope, float64 [2, C]; ``amounts`` float64 [C, K]; ``indices`` int64 [C, K, 2]."""
    module, b, v = function("gradient", ir.VoidType(), signature(GRADIENT))
    tile = Tile(b, recipe, v["scratch"], v["pitch"])
    put = tile.store if recipe.block else tile.written

    def each(c: Any, at: Any, n: Any, chunk: Any, origin: Any, out: Any) -> None:
        g = tile.at(v["g"], at)
        m, slope = _factors(tile, v, c, 2)

        def result(index: Any, inside: Any, amount: Any = None) -> Any:
            value = tile.wide(tile.taken(tile.load(g, index, inside), index))
            scaled = b.fmul(b.fsub(value, m), slope)
            dx = tile.narrowed(scaled if amount is None else b.fsub(scaled, amount))
            seen = tile.magnitude(dx)
            tile.note(seen if inside is None else b.select(inside, seen, ir.Constant(seen.type, None)))
            return dx

        def body(index: Any, inside: Any) -> list[Any]:
            put(result(index, inside), out, index, inside)
            return []

        tile.along(n, body)
        with b.if_then(b.icmp_signed(">", v["chunks"], I64(0))):
            place = b.add(b.mul(c, v["chunks"]), chunk)
            amount = tile.get(v["amounts"], place, D)
            spots = [
                b.sub(tile.get(v["indices"], b.add(b.mul(place, I64(2)), I64(side)), I64), origin) for side in range(2)
            ]
            two = b.icmp_signed("!=", spots[0], spots[1])
            for spot in spots:
                with b.if_then(b.and_(two, b.icmp_unsigned("<", spot, n)), likely=False):
                    # The vector as a whole: a load that meets a younger store of one lane would wait for it.
                    index = b.and_(spot, I64(-LANES))
                    inside = tile.inside(index, n)
                    dx = result(index, inside, _amounts(tile, index, spots, amount))
                    tile.store(dx, out, index, None if recipe.block else inside)

    _blocks(tile, v, v["g"], v["dx"], each)
    return module


def _amounts(tile: Tile, index: Any, spots: list[Any], amount: Any) -> Any:
    """What is taken off the vector at an index: the amount where the first spot is, minus it at the second, else 0."""
    b, total = tile.b, ir.Constant(VD, None)
    for spot, signed in zip(spots, (amount, b.fneg(amount)), strict=True):
        total = b.select(tile.lane(b.sub(spot, index)), tile.everywhere(signed), total)
    return total


def _factors(tile: Tile, v: dict[str, Any], c: Any, count: int) -> list[Any]:
    b = tile.b
    return [tile.everywhere(tile.get(v["vectors"], b.add(c, b.mul(v["channels"], I64(i))), D)) for i in range(count)]


def _blocks(tile: Tile, v: dict[str, Any], x: Any, y: Any, each: Callable) -> None:
    """``each(c, at, n, chunk, origin, out)`` for all rows, with ``at`` the row's first element, ``origin`` its index in
    the channel and ``out`` where to write; then their blocks to ``y``."""
    b, shared = tile.b, tile.recipe.block > 0
    waiting = tile.at(v["scratch"], b.mul(v["pitch"], I64(2)))
    with tile.counted(v["first"], v["last"]) as turn:
        sample, block = b.sdiv(turn.index, v["blocks"]), b.srem(turn.index, v["blocks"])
        begin = b.mul(block, v["block"])
        width = least(b, v["block"], b.sub(v["channels"], begin))
        row = b.add(b.mul(sample, v["channels"]), begin)
        bounds = [tile.get(v["offsets"], b.add(sample, I64(i)), I64) for i in range(2)]
        with tile.counted(*bounds) as t:
            start, stop, chunk = (tile.get(v["tiles"], b.add(b.mul(t.index, I64(4)), I64(i)), I64) for i in (1, 2, 3))
            n, at = b.sub(stop, start), b.add(b.mul(row, v["places"]), start)
            origin = b.add(b.mul(sample, v["places"]), start)
            if shared:
                tile.exponents(tile.at(x, at), v["places"], width, n)
            with tile.counted(I64(0), width) as w:
                here = b.add(at, b.mul(w.index, v["places"]))
                out = tile.at(waiting, b.mul(w.index, v["pitch"])) if shared else tile.at(y, here)
                each(b.add(begin, w.index), here, n, chunk, origin, out)
            if shared:
                _share(tile, v, waiting, tile.at(y, at), width, n)
    if tile.recipe.stream:
        b.fence("seq_cst")
    tile.report(v["peak"])
    b.ret_void()


def _share(tile: Tile, v: dict[str, Any], waiting: Any, y: Any, width: Any, n: Any) -> None:
    """Rows in scratch, rounded to blocks, to memory."""
    b = tile.b
    tile.exponents(waiting, v["pitch"], width, n)
    with tile.counted(I64(0), width) as w:
        row, out = tile.at(waiting, b.mul(w.index, v["pitch"])), tile.at(y, b.mul(w.index, v["places"]))

        def body(index: Any, inside: Any) -> list[Any]:
            tile.written(tile.shared(tile.load(row, index), index), out, index, inside)
            return []

        tile.along(n, body)
