"""The narrow accumulator's matrix product as LLVM vector IR: packing, loops, one tile of sums in registers.

What a step computes is written by the forms (`emit_narrow`, `emit_wide`); everything here is common to them. The sums
of a tile of ``rows`` by ``vectors`` x ``lanes`` outputs stay in registers while k runs, in the same order for every
tiling, so results depend on nothing but the operands.

Legend: M rows, N columns, K terms; a tile covers ``rows`` rows and one panel, ``vectors * lanes`` columns.
"""

from functools import cache
from typing import Any

from llvmlite import ir

from recoup.kernels.llvm import I8, I32, I64, D, F, P, Target, loop
from recoup.kernels.rounding import internal, rounding
from recoup.kernels.signature import Definition, Kernel, Signature
from recoup.kernels.vector import Vector
from recoup.lba.emit_code import Code, Form, Shape
from recoup.lba.emit_random import draws, random_base

# Where B lies and how it is taken: see `build`.
SOURCE = {"b": P, "b_terms": P, "b_columns": P, "b_straight": P, "b_scale": F, "b_least": I32}
# What random bits depend on: the seed, mixed, and an output's index, which grows by so much per row and column.
RANDOM = {"seed_base": I64, "index": I64, "index_row": I64, "index_column": I64}
SIZES, CONSTANTS = {"K": I64, "chunk": I64}, {"floats": P, "integers": P}
ROWS, SUMS = {"a": P, "a_stride": I64}, {"c": P, "c_stride": I64, "unscale": F}
# Rows that are there, what they are taken times, and scratch for those of a tile.
SCALED = {"a_rows": I64, "a_scale": F, "a_tile": P}

PANELS = Signature.of(
    first=I64, last=I64, tiles=I64, **SIZES, **ROWS, **SCALED, **SOURCE, **SUMS, **CONSTANTS, panel=P, **RANDOM
)
VARYING = ("a", "b", "c", "a_tile", "panel")  # between products of one shape
PACK = Signature.of(K=I64, **SOURCE, panel=P)
ROW_PACK = Signature.of(K=I64, **ROWS, **SCALED)
TILE = Signature.of(**SIZES, **ROWS, **SUMS, **CONSTANTS, panel=P, **RANDOM)


APART = 16  # elements between packed rows, so that those of a power of two do not share the cache's few places

SIDE_BY_SIDE, IN_COLUMNS = 1, 2  # how the columns of a vector lie: see `packing`


@cache
def build(form: Form, shape: Shape, target: Target) -> Kernel:
    """Compile a form's kernel: columns panels ``first .. last`` of C = A B, all row tiles.

    ``a`` float32 [a_rows, K], row stride ``a_stride``, is taken times ``a_scale``; ``a_tile`` is scratch for
    `row_scratch` elements. Element (k, n) of B is ``b[b_terms[k] + b_columns[n]]``, where ``b_straight`` says, per
    vector of columns, how they lie (see `packing`), and is taken times ``b_scale``, or as zero where its magnitude's
    bits are below ``b_least``. ``c`` [tiles * rows, panels * columns] is, in float32 lanes, times ``unscale``, with
    zeros positive. ``panel`` is scratch for K * columns elements.
    """
    module = ir.Module("lba")
    tile = _tile(module, form, shape, target)
    pack, rows = packing(module, form, shape), _row_packing(module, form, shape)
    panels = PANELS.define(module, "panels")
    b, code = panels.b, Code(panels, shape, form.wide, target)
    with rounding(b, form.control, target), loop(b, panels["first"], panels["last"]) as turn:
        # Panels outside, row tiles inside: a panel is packed once, and then is read from the caches by every tile.
        column = b.mul(turn.index, I64(shape.columns))
        pack.call(panels, **panel_columns(code, column))
        with loop(b, I64(0), panels["tiles"]) as tiles:
            row = b.mul(tiles.index, I64(shape.rows))
            a, left = code.at(panels["a"], b.mul(row, panels["a_stride"]), F), b.sub(panels["a_rows"], row)
            short = b.icmp_signed("<", left, I64(shape.rows))
            packed = b.or_(short, b.fcmp_ordered("!=", panels["a_scale"], F(1.0)))
            with b.if_then(packed):
                rows.call(panels, a=a, a_rows=left)
            a = b.select(packed, panels["a_tile"], a)
            stride = b.select(packed, b.add(panels["K"], I64(APART)), panels["a_stride"])
            c = code.at(panels["c"], b.add(b.mul(row, panels["c_stride"]), column), code.scalar)
            tile.call(panels, a=a, a_stride=stride, c=c, index=output_index(code, row, column))
    b.ret_void()
    return Kernel(module, "panels", PANELS, target, VARYING)


def row_scratch(shape: Shape, K: int) -> int:
    """Elements that ``a_tile`` has."""
    return shape.rows * (K + APART)


def times(code: Vector, form: Any, value: Any, scale: Any) -> Any:
    """A value times its operand's scale. Without a multiply-add subnormal operands count, and the control word flushes
    results: there a scale of one leaves the value as it is."""
    product = code.b.fmul(value, scale)
    if not getattr(form, "compare", False):
        return product
    return code.b.select(code.b.fcmp_ordered("==", scale, code.everywhere(F(1.0))), value, product)


def _row_packing(module: ir.Module, form: Any, shape: Shape) -> Definition:
    """A tile's rows times their scale; beyond the last row, that one again.

    Once a panel: a row's element is scaled by one operation of sixteen lanes and serves for a dozen of them, so no pass
    over all of A comes before, which would take longer than the product where columns are few.
    """
    pack = internal(module, "pack_rows", ROW_PACK)
    b, code = pack.b, Vector(pack.b, shape.lanes)
    scale, last = code.everywhere(pack["a_scale"]), b.sub(pack["a_rows"], I64(1))
    for row in range(shape.rows):
        there = b.select(b.icmp_signed("<", I64(row), last), I64(row), last)
        source = code.at(pack["a"], b.mul(there, pack["a_stride"]))
        target = code.at(pack["a_tile"], b.mul(I64(row), b.add(pack["K"], I64(APART))))

        def scaled(k: Any, inside: Any, source: Any = source, target: Any = target) -> tuple:
            code.store(times(code, form, code.load(source, k, inside), scale), target, k, inside)
            return ()

        code.along(pack["K"], scaled)
    b.ret_void()
    return pack


def panel_columns(code: Code, column: Any) -> dict[str, Any]:
    """Where the columns of the panel from ``column`` on lie, and which vectors of them side by side."""
    vector = code.b.udiv(column, I64(code.lanes))
    return {
        "b_columns": code.at(code.v["b_columns"], column, I64),
        "b_straight": code.at(code.v["b_straight"], vector, I8),
    }


def output_index(code: Code, row: Any, column: Any) -> Any:
    """The index of a tile's first output."""
    b, v = code.b, code.v
    return b.add(v["index"], b.add(b.mul(row, v["index_row"]), b.mul(column, v["index_column"])))


def packing(module: ir.Module, form: Any, shape: Shape, name: str = "pack") -> Definition:
    """Columns of B side by side: panel[k][column], in the kernel's element type.

    The tiles then read whole vectors from successive addresses, whatever B's layout, and each column is scaled once
    instead of once a row. A vector's columns lie side by side; or each column's terms do (a weight's, transposed), and
    squares of as many terms as lanes are turned in registers; or (0) every element is fetched alone.
    """
    pack = internal(module, name, PACK)
    b, code = pack.b, Vector(pack.b, shape.lanes)
    scale, least = code.everywhere(pack["b_scale"]), code.everywhere(pack["b_least"])

    def scaled(x: Any) -> Any:
        return times(code, form, b.select(b.icmp_signed(">=", code.magnitude(x), least), x, code.zero), scale)

    for vector in range(shape.vectors):
        place = I64(vector * shape.lanes)
        offsets = code.load(pack["b_columns"], place, None, code.of(I64))
        first = code.get(pack["b_columns"], place, I64)
        lie = code.get(pack["b_straight"], I64(vector), I8)

        def put(value: Any, k: Any, place: Any = place) -> None:
            value = code.wide(value) if form.wide else scaled(value)
            code.store(value, pack["panel"], b.add(b.mul(k, I64(shape.columns)), place))

        def term(k: Any) -> Any:
            return code.get(pack["b_terms"], k, I64)

        with b.if_else(b.icmp_unsigned("==", lie, I8(SIDE_BY_SIDE))) as (then, otherwise):
            with then, loop(b, I64(0), pack["K"]) as terms:
                put(code.load(pack["b"], b.add(term(terms.index), first)), terms.index)
            with otherwise:
                whole = b.and_(pack["K"], I64(-code.lanes))
                whole = b.select(b.icmp_unsigned("==", lie, I8(IN_COLUMNS)), whole, I64(0))
                with loop(b, I64(0), whole, code.lanes) as blocks:
                    start = term(blocks.index)
                    columns = [b.add(start, b.extract_element(offsets, I32(lane))) for lane in range(code.lanes)]
                    for i, value in enumerate(code.transposed([code.load(pack["b"], at) for at in columns])):
                        put(value, b.add(blocks.index, I64(i)))
                with loop(b, whole, pack["K"]) as terms:
                    put(_gathered(code, pack["b"], term(terms.index), offsets), terms.index)
    b.ret_void()
    return pack


def _gathered(code: Vector, source: Any, term: Any, offsets: Any) -> Any:
    """Elements at ``term`` plus the lanes' offsets, one by one: before AVX2 there is no other way."""
    b, value = code.b, ir.Constant(code.vector, ir.Undefined)
    for lane in range(code.lanes):
        at = b.add(term, b.extract_element(offsets, I32(lane)))
        value = b.insert_element(value, code.get(source, at, F), I32(lane))
    return value


def _tile(module: ir.Module, form: Form, shape: Shape, target: Target) -> Definition:
    """All sums of one tile.

    The sums are values that the loop over k carries, so LLVM keeps them in registers; the outer sums, which change once
    a chunk, may wait on the stack. No sum of a term depends on another, so their steps overlap.
    """
    tile = internal(module, "tile", TILE)
    b, code = tile.b, Code(tile, shape, form.wide, target)
    code.load_constants()
    rows = [code.at(tile["a"], b.mul(I64(row), tile["a_stride"]), F) for row in range(shape.rows)]
    bases = [random_base(code, *place) for place in shape.places] if form.random else []
    zeros = [code.zero] * len(shape.places)
    with loop(b, I64(0), tile["K"], tile["chunk"], [*zeros, I64(0)]) as chunks:
        *outer, number = chunks.values
        with loop(b, chunks.index, chunk_end(code, chunks.index), 1, zeros) as terms:
            panel = code.at(tile["panel"], b.mul(terms.index, I64(shape.columns)), code.scalar)
            ws = [code.load(panel, I64(vector * shape.lanes)) for vector in range(shape.vectors)]
            xs = [operand(code, row, terms.index) for row in rows]
            counter = term_counter(code, terms.index)
            sums = [
                form.term(code, xs[row], ws[vector], s, draws(code, bases, i, counter)).result
                for i, ((row, vector), s) in enumerate(zip(shape.places, terms.values, strict=True))
            ]
            terms.carry(*sums)
        counter = chunk_counter(code, number)
        added = [
            form.add(code, s, y, draws(code, bases, i, counter)).result
            for i, (s, y) in enumerate(zip(terms.values, outer, strict=True))
        ]
        chunks.carry(*added, b.add(number, I64(1)))
    sums = chunks.values[:-1]
    if not form.wide:  # adding zero makes zeros positive
        sums = [b.fadd(b.fmul(y, code.everywhere(tile["unscale"])), code.zero) for y in sums]
    for (row, vector), y in zip(shape.places, sums, strict=True):
        code.store(y, tile["c"], b.add(b.mul(I64(row), tile["c_stride"]), I64(vector * shape.lanes)))
    b.ret_void()
    return tile


def chunk_end(code: Code, start: Any) -> Any:
    """Where the chunk from ``start`` on ends: the last may be short."""
    b, end = code.b, code.b.add(start, code.v["chunk"])
    return b.select(b.icmp_signed("<", end, code.v["K"]), end, code.v["K"])


def operand(code: Code, row: Any, k: Any) -> Any:
    """One element of A in every lane, in the kernel's type."""
    x = code.get(row, k, F)
    return code.everywhere(code.b.fpext(x, D) if code.double else x)


def term_counter(code: Code, k: Any) -> Any:
    """What a term's random bits count by: its product's rounding, then its sum's."""
    return code.b.trunc(code.b.mul(k, I64(2)), I32)


def chunk_counter(code: Code, number: Any) -> Any:
    """What the addition of a chunk's sum counts by: after all terms."""
    return code.b.trunc(code.b.add(code.b.mul(code.v["K"], I64(2)), number), I32)
