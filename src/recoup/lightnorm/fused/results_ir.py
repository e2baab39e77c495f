"""LightNorm's passes with results, emitted: `normalize` writes xhat and y, `gradient` dx; walked in memory's order.

Toward zero, float64's own arithmetic is cut to a format as the exact one is: so these kernels round where there is a
format, whatever the processor; see `exactly`.

Legend: x, xhat, y, g, dx flat [N, C, P]; ``factors`` and ``amounts`` those of statistics.py; K chunks.
"""

from typing import Any

from llvmlite import ir

from recoup.kernels.llvm import I64, D, P, Target
from recoup.kernels.rounding import EXCEPTIONS_MASKED, TOWARD_ZERO, internal, rounding
from recoup.kernels.signature import Definition, Signature
from recoup.lightnorm.fused.tile_ir import LANES, VD, Recipe, Tile
from recoup.lightnorm.fused.walk_ir import BLOCKS, Row, over_blocks

NORMALIZE = Signature.of(**BLOCKS, x=P, xhat=P, y=P, factors=P)
GRADIENT = Signature.of(**BLOCKS, g=P, dx=P, factors=P, amounts=P, indices=P, chunks=I64)


def normalize(recipe: Recipe, target: Target) -> ir.Module:
    """xhat = F((x - mu) r) and y = B(F(gamma xhat + beta)). ``peak``: the largest magnitude of inputs' exponents and
    of results before their blocks."""
    module = ir.Module("normalize")
    v = NORMALIZE.define(module, "normalize") if recipe.mantissa is None else internal(module, "rows", NORMALIZE)
    b, tile = v.b, Tile(v.b, recipe, v["scratch"], v["pitch"])
    write_result = tile.store if recipe.block else tile.write

    def each(row: Row, out: Any) -> None:
        x, normal = tile.at(v["x"], row.at), tile.at(v["xhat"], row.at)
        mu, r, gamma, beta = _factors(tile, v, row.channel, 4)

        def body(index: Any, inside: Any) -> list[Any]:
            value = tile.wide(tile.quantized(tile.load(x, index, inside), index))
            xhat = tile.narrowed(b.fmul(b.fsub(value, mu), r))
            y = tile.affine(gamma, xhat, beta)
            for result in (xhat, y):
                _note_result(tile, result, inside)
            tile.write(xhat, normal, index, inside)
            write_result(y, out, index, inside)
            return []

        tile.along(row.length, body)

    over_blocks(tile, v, v["x"], v["y"], each)
    return module if recipe.mantissa is None else exactly(v, module, "normalize", target)


def gradient(recipe: Recipe, target: Target) -> ir.Module:
    """dx = B(F'((g - m) slope, less the amount at a chunk's first maximum, plus it at its first minimum));
    ``indices`` int64 [C, K, 2]."""
    module = ir.Module("gradient")
    v = GRADIENT.define(module, "gradient") if recipe.mantissa is None else internal(module, "rows", GRADIENT)
    b, tile = v.b, Tile(v.b, recipe, v["scratch"], v["pitch"])
    write_result = tile.store if recipe.block else tile.write

    def each(row: Row, out: Any) -> None:
        g = tile.at(v["g"], row.at)
        m, slope = _factors(tile, v, row.channel, 2)

        def result(index: Any, inside: Any, amount: Any = None) -> Any:
            value = tile.wide(tile.quantized(tile.load(g, index, inside), index))
            scaled = b.fmul(b.fsub(value, m), slope)
            dx = tile.narrowed(scaled if amount is None else b.fsub(scaled, amount))
            _note_result(tile, dx, inside)
            return dx

        def body(index: Any, inside: Any) -> list[Any]:
            write_result(result(index, inside), out, index, inside)
            return []

        tile.along(row.length, body)
        with b.if_then(b.icmp_signed(">", v["chunks"], I64(0))):
            amount, extrema = _extrema(tile, v, row)
            two = b.icmp_signed("!=", *extrema)  # in a constant chunk the amounts cancel
            for place in extrema:
                # Unsigned: an extremum before this row is beyond its end as well.
                with b.if_then(b.and_(two, b.icmp_unsigned("<", place, row.length)), likely=False):
                    # The vector as a whole: a load that meets a younger store of one lane would wait for it.
                    index = b.and_(place, I64(-LANES))
                    inside = tile.inside(index, row.length)
                    dx = result(index, inside, _amounts(tile, index, extrema, amount))
                    tile.store(dx, out, index, None if recipe.block else inside)

    over_blocks(tile, v, v["g"], v["dx"], each)
    return module if recipe.mantissa is None else exactly(v, module, "gradient", target)


def exactly(inner: Definition, module: ir.Module, name: str, target: Target) -> ir.Module:
    """A kernel that runs another one with float64 rounding toward zero.

    Of an exact (x - mu) r a format then takes what it would take of the exact one: the difference is exact for FP10
    activations, and where a wider one is not, what is cut off it is below 2^-52 of it and cannot be seen but within
    that of a step.
    """
    outer = inner.signature.define(module, name)
    with rounding(outer.b, EXCEPTIONS_MASKED | TOWARD_ZERO, target):
        inner.call(outer)
    outer.b.ret_void()
    return module


def _note_result(tile: Tile, result: Any, inside: Any) -> None:
    """Remember its magnitude, where there is a place."""
    seen = tile.magnitude(result)
    tile.note(seen if inside is None else tile.b.select(inside, seen, ir.Constant(seen.type, None)))


def _extrema(tile: Tile, v: Definition, row: Row) -> tuple[Any, list[Any]]:
    """The amount of the row's chunk, and the places in the row of its maximum and minimum: negative, or beyond the
    row's end, where another row of the chunk has them."""
    b = tile.b
    chunk = b.add(b.mul(row.channel, v["chunks"]), row.chunk)
    indices = [tile.get(v["indices"], b.add(b.mul(chunk, I64(2)), I64(side)), I64) for side in range(2)]
    return tile.get(v["amounts"], chunk, D), [b.sub(index, row.origin) for index in indices]


def _amounts(tile: Tile, index: Any, extrema: list[Any], amount: Any) -> Any:
    """What is taken off the vector at an index: the amount at the maximum's place, minus it at the minimum's, else
    0."""
    b, total = tile.b, ir.Constant(VD, None)
    for place, signed in zip(extrema, (amount, b.fneg(amount)), strict=True):
        total = b.select(tile.lane(b.sub(place, index)), tile.everywhere(signed), total)
    return total


def _factors(tile: Tile, v: Definition, c: Any, count: int) -> list[Any]:
    """A channel's factors, in the order of statistics.py."""
    b = tile.b
    return [tile.everywhere(tile.get(v["factors"], b.add(c, b.mul(v["channels"], I64(i))), D)) for i in range(count)]
