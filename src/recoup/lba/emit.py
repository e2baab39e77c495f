"""The narrow accumulator's matrix product as LLVM vector IR: packing, loops, one tile of sums in registers.

What a step computes is written by the forms (`emit_narrow`, `emit_wide`); everything here is common to them. The sums
of a tile of ``rows`` by ``vectors`` x ``lanes`` outputs stay in registers while k runs, in the same order for every
tiling, so results depend on nothing but the operands.

Legend: M rows, N columns, K terms; a tile covers ``rows`` rows and one panel, ``vectors * lanes`` columns.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir

from recoup.kernels.llvm import I8, I32, I64, VOID, D, F, Native, P, Target, loop
from recoup.kernels.rounding import internal, rounding
from recoup.kernels.vector import Vector
from recoup.lba.emit_code import Code, Form, Shape
from recoup.lba.emit_random import draws, random_base


@dataclass(frozen=True, slots=True)
class Arguments:
    """Names and types of a kernel's arguments, in order."""

    @staticmethod
    def types() -> dict[str, tuple[Any, Any]]:
        """name -> (LLVM type, ctypes type)."""
        size, address = (I64, ctypes.c_int64), (P, ctypes.c_void_p)
        return {
            "first": size,
            "last": size,
            "tiles": size,
            "K": size,
            "chunk": size,
            "a": address,
            "a_stride": size,
            "b": address,
            "b_terms": address,
            "b_columns": address,
            "b_straight": address,
            "b_scale": (F, ctypes.c_float),
            "b_least": (I32, ctypes.c_int32),
            "c": address,
            "c_stride": size,
            "floats": address,
            "integers": address,
            "panel": address,
            "seed_base": size,
            "index": size,
            "index_row": size,
            "index_column": size,
        }


@cache
def build(form: Form, shape: Shape, target: Target) -> Native:
    """Compile a form's kernel: columns panels ``first .. last`` of C = A B, all row tiles.

    ``a`` float32 [tiles * rows, K], row stride ``a_stride``; element (k, n) of B is ``b[b_terms[k] + b_columns[n]]``,
    where ``b_straight`` says, per vector of columns, that these lie side by side, and is taken times ``b_scale``, or as
    zero where its magnitude's bits are below ``b_least``; ``c`` [tiles * rows, panels * columns]. ``panel`` is scratch
    for K * columns elements.
    """
    types = Arguments.types()
    module = ir.Module("lba")
    tile = _tile(module, form, shape, target)
    pack = packing(module, form, shape)
    made = ir.Function(module, ir.FunctionType(VOID, [llvm for llvm, _ in types.values()]), "panels")
    b = ir.IRBuilder(made.append_basic_block("entry"))
    v = dict(zip(types, made.args, strict=True))
    code = Code(b, shape, form.wide, target)
    with rounding(b, form.control, target), loop(b, v["first"], v["last"]) as panels:
        column = b.mul(panels.index, I64(shape.columns))
        source = [v["K"], v["b"], v["b_terms"], *panel_columns(code, v, column)]
        b.call(pack, [*source, v["b_scale"], v["b_least"], v["panel"]])
        with loop(b, I64(0), v["tiles"]) as tiles:
            row = b.mul(tiles.index, I64(shape.rows))
            a = code.at(v["a"], b.mul(row, v["a_stride"]), F)
            c = code.at(v["c"], b.add(b.mul(row, v["c_stride"]), column), code.scalar)
            index = b.add(v["index"], b.add(b.mul(row, v["index_row"]), b.mul(column, v["index_column"])))
            rest = [v[n] for n in ("floats", "integers", "panel", "seed_base")]
            strides = [v["index_row"], v["index_column"]]
            b.call(tile, [v["K"], v["chunk"], a, v["a_stride"], c, v["c_stride"], *rest, index, *strides])
    b.ret_void()
    return Native(module, "panels", None, [c for _, c in types.values()], target)


def panel_columns(code: Code, v: dict[str, Any], column: Any) -> list[Any]:
    """Where a panel's columns lie, and which vectors of them side by side."""
    vector = code.b.udiv(column, I64(code.lanes))
    return [code.at(v["b_columns"], column, I64), code.at(v["b_straight"], vector, I8)]


def packing(module: ir.Module, form: Any, shape: Shape, name: str = "pack") -> Any:
    """Columns of B side by side: panel[k][column], in the kernel's element type."""
    types = {"K": I64, "b": P, "terms": P, "columns": P, "straight": P, "scale": F, "least": I32, "panel": P}
    made, b, v = internal(module, name, types)
    code = Vector(b, shape.lanes)
    scale, least = code.everywhere(v["scale"]), code.everywhere(v["least"])

    def scaled(x: Any) -> Any:
        return b.fmul(b.select(b.icmp_signed(">=", code.magnitude(x), least), x, code.zero), scale)

    for vector in range(shape.vectors):
        place = I64(vector * shape.lanes)
        offsets = code.load(v["columns"], place, None, code.of(I64))
        first = code.get(v["columns"], place, I64)
        straight = b.icmp_unsigned("!=", code.get(v["straight"], I64(vector), I8), I8(0))
        with b.if_else(straight) as (then, otherwise):
            for block, gathered in ((then, False), (otherwise, True)):
                with block, loop(b, I64(0), v["K"]) as terms:
                    term = code.get(v["terms"], terms.index, I64)
                    value = (
                        _gathered(code, v["b"], term, offsets) if gathered else code.load(v["b"], b.add(term, first))
                    )
                    value = code.wide(value) if form.wide else scaled(value)
                    code.store(value, v["panel"], b.add(b.mul(terms.index, I64(shape.columns)), place))
    b.ret_void()
    return made


def _gathered(code: Vector, source: Any, term: Any, offsets: Any) -> Any:
    """Elements at ``term`` plus the lanes' offsets, one by one: before AVX2 there is no other way."""
    b, value = code.b, ir.Constant(code.vector, ir.Undefined)
    for lane in range(code.lanes):
        at = b.add(term, b.extract_element(offsets, I32(lane)))
        value = b.insert_element(value, code.get(source, at, F), I32(lane))
    return value


def _tile(module: ir.Module, form: Form, shape: Shape, target: Target) -> Any:
    """All sums of one tile."""
    sizes = dict.fromkeys(("seed_base", "index", "index_row", "index_column"), I64)
    addresses = {"a": P, "a_stride": I64, "c": P, "c_stride": I64, "floats": P, "integers": P, "panel": P}
    made, b, v = internal(module, "tile", {"K": I64, "chunk": I64, **addresses, **sizes})
    code = Code(b, shape, form.wide, target)
    code.load_constants(v["floats"], v["integers"])
    rows = [code.at(v["a"], b.mul(I64(row), v["a_stride"]), F) for row in range(shape.rows)]
    bases = [random_base(code, v, *place) for place in shape.places] if form.random else []
    zeros = [code.zero] * len(shape.places)
    with loop(b, I64(0), v["K"], v["chunk"], [*zeros, I64(0)]) as chunks:
        *outer, number = chunks.values
        with loop(b, chunks.index, chunk_end(code, v, chunks.index), 1, zeros) as terms:
            panel = code.at(v["panel"], b.mul(terms.index, I64(shape.columns)), code.scalar)
            ws = [code.load(panel, I64(vector * shape.lanes)) for vector in range(shape.vectors)]
            xs = [operand(code, row, terms.index) for row in rows]
            counter = term_counter(code, terms.index)
            sums = [
                form.term(code, xs[row], ws[vector], s, draws(code, bases, i, counter)).result
                for i, ((row, vector), s) in enumerate(zip(shape.places, terms.values, strict=True))
            ]
            terms.carry(*sums)
        counter = chunk_counter(code, v, number)
        added = [
            form.add(code, s, y, draws(code, bases, i, counter)).result
            for i, (s, y) in enumerate(zip(terms.values, outer, strict=True))
        ]
        chunks.carry(*added, b.add(number, I64(1)))
    for (row, vector), y in zip(shape.places, chunks.values[:-1], strict=True):
        code.store(y, v["c"], b.add(b.mul(I64(row), v["c_stride"]), I64(vector * shape.lanes)))
    b.ret_void()
    return made


def chunk_end(code: Code, v: dict[str, Any], start: Any) -> Any:
    """Where the chunk from ``start`` on ends: the last may be short."""
    end = code.b.add(start, v["chunk"])
    return code.b.select(code.b.icmp_signed("<", end, v["K"]), end, v["K"])


def operand(code: Code, row: Any, k: Any) -> Any:
    """One element of A in every lane, in the kernel's type."""
    x = code.get(row, k, F)
    return code.everywhere(code.b.fpext(x, D) if code.double else x)


def term_counter(code: Code, k: Any) -> Any:
    """What a term's random bits count by: its product's rounding, then its sum's."""
    return code.b.trunc(code.b.mul(k, I64(2)), I32)


def chunk_counter(code: Code, v: dict[str, Any], number: Any) -> Any:
    """What the addition of a chunk's sum counts by: after all terms'."""
    return code.b.trunc(code.b.add(code.b.mul(v["K"], I64(2)), number), I32)
