"""The narrow accumulator's matrix product where many elements of the columns are zero, as behind a ReLU.

A product of zero leaves a truncated sum as it is: the sum has its format already, so that mask and limit change nothing
of it. Here lanes are therefore rows (output channels), every 16 terms of a column have a word with a bit for each that
is not zero, and only those are computed: two fifths of them in a residual network on images. Terms keep their order,
and chunks the ones they had, so the bits are those of `emit`.

Only the sign of a zero may differ, which the end of a product makes positive in either form.

Legend: M rows, N columns, K terms; a panel is ``LANES`` columns, a block ``vectors * LANES`` rows.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from llvmlite import ir

from recoup.kernels.llvm import I1, I32, I64, F, P, Target, declared, loop
from recoup.kernels.rounding import internal, rounding
from recoup.kernels.signature import Definition, Kernel, Signature
from recoup.kernels.vector import Vector
from recoup.lba.emit import CONSTANTS, SIZES, SOURCE, SUMS, chunk_end, packing, panel_columns
from recoup.lba.emit_code import Code, Shape
from recoup.lba.emit_narrow import Narrow

LANES = 16
"""Columns of a panel, rows of a vector, and terms of a word."""

SHAPE = Shape(LANES, 1, 1)

# Scratch: a panel of columns side by side; its words, int32 [K / 16, 16 columns]; a block's sums, column by column.
PANELS = Signature.of(
    first=I64, last=I64, blocks=I64, **SIZES, **SOURCE, weights=P, **SUMS, **CONSTANTS, panel=P, words=P, sums=P
)
WORDS = Signature.of(K=I64, panel=P, words=P)
COLUMN = Signature.of(**SIZES, weights=P, stride=I64, unscale=F, **CONSTANTS, panel=P, words=P, sums=P)


def takes(form: Any, target: Target, K: int, chunk: int) -> bool:
    """Whether there is such a kernel: of truncating steps in float32 lanes that flush, on processors with AVX-512."""
    plain = isinstance(form, Narrow) and not form.compare and "avx512f" in target.features
    return plain and K % LANES == 0 and (chunk % LANES == 0 or chunk >= K)


@cache
def build(form: Narrow, vectors: int, target: Target) -> Kernel:
    """Compile a form's kernel: all rows of columns panels ``first .. last`` of C = A B.

    B is as in `recoup.lba.emit.build`. ``weights`` float32 [K, blocks * vectors * 16] is A transposed, times its scale,
    with zeros beyond the last row; ``c`` has as many rows.
    """
    module = ir.Module("lba")
    pack, words, column = packing(module, form, SHAPE), _words(module), _column(module, form, vectors, target)
    panels = PANELS.define(module, "panels")
    b, code = panels.b, Code(panels, SHAPE, False, target)
    rows = I64(vectors * LANES)
    stride = b.mul(panels["blocks"], rows)
    with rounding(b, form.control, target), loop(b, panels["first"], panels["last"]) as turn:
        place = b.mul(turn.index, I64(LANES))
        pack.call(panels, **panel_columns(code, place))
        words.call(panels)
        with loop(b, I64(0), panels["blocks"]) as block:
            row = b.mul(block.index, rows)
            weights = code.at(panels["weights"], row)
            with loop(b, I64(0), I64(LANES)) as own:
                column.call(
                    panels,
                    weights=weights,
                    stride=stride,
                    panel=code.at(panels["panel"], own.index),
                    words=code.at(panels["words"], own.index, I32),
                    sums=code.at(panels["sums"], b.mul(own.index, rows)),
                )
            _turned(code, panels, vectors, row, place)
    b.ret_void()
    return Kernel(module, "panels", PANELS, target)


def scratch(K: int, vectors: int) -> dict[str, int]:
    """Bytes of the scratch arrays."""
    return {"panel": 4 * LANES * K, "words": 4 * K, "sums": 4 * LANES * vectors * LANES}


def _words(module: ir.Module) -> Definition:
    """Which terms of a panel's columns are not zero: a word for each column and 16 terms."""
    words = internal(module, "words_of", WORDS)
    b, code = words.b, Vector(words.b, LANES)
    none = ir.Constant(code.integers, None)
    with loop(b, I64(0), words["K"], LANES) as part:
        found: Any = none
        for i in range(LANES):
            row = code.load(words["panel"], b.mul(b.add(part.index, I64(i)), I64(LANES)))
            holds = b.fcmp_unordered("!=", row, code.zero)
            found = b.or_(found, b.select(holds, code.constant(1 << i, code.integers), none))
        code.store(found, words["words"], part.index)
    b.ret_void()
    return words


def _column(module: ir.Module, form: Narrow, vectors: int, target: Target) -> Definition:
    """A block's sums of one column."""
    column = internal(module, "column", COLUMN)
    b, code = column.b, Code(column, Shape(LANES, 1, vectors), False, target)
    code.load_constants()
    zeros = [code.zero] * vectors
    with loop(b, I64(0), column["K"], column["chunk"], zeros) as chunks:
        with loop(b, chunks.index, chunk_end(code, chunks.index), LANES, zeros) as parts:
            word = code.get(column["words"], parts.index, I32)
            count = b.call(declared(b, "llvm.ctpop.i32", I32, [I32]), [word])
            with loop(b, I32(0), count, 1, [word, *parts.values], unroll=False) as terms:
                left, *sums = terms.values
                first = b.call(declared(b, "llvm.cttz.i32", I32, [I32, I1]), [left, I1(1)])
                k = b.add(parts.index, b.zext(first, I64))
                terms.carry(b.and_(left, b.sub(left, I32(1))), *_term(code, form, k, sums))
            parts.carry(*terms.values[1:])
        added = [form.add(code, s, y, None).result for s, y in zip(parts.values, chunks.values, strict=True)]
        chunks.carry(*added)
    for vector, value in enumerate(chunks.values):
        y = b.fadd(b.fmul(value, code.everywhere(column["unscale"])), code.zero)  # adding zero makes zeros positive
        code.store(y, column["sums"], I64(vector * LANES))
    b.ret_void()
    return column


def _term(code: Code, form: Narrow, k: Any, sums: Sequence[Any]) -> list[Any]:
    """The sums after term k."""
    b = code.b
    x = code.everywhere(code.get(code.v["panel"], b.mul(k, I64(LANES)), F))
    row = code.at(code.v["weights"], b.mul(k, code.v["stride"]))
    ws = [code.load(row, I64(vector * LANES)) for vector in range(len(sums))]
    return [form.term(code, x, w, s, None).result for w, s in zip(ws, sums, strict=True)]


def _turned(code: Code, panels: Definition, vectors: int, row: Any, place: Any) -> None:
    """A block's sums from columns to rows, into C."""
    b = code.b
    for vector in range(vectors):
        columns = [code.load(panels["sums"], I64((i * vectors + vector) * LANES)) for i in range(LANES)]
        for i, y in enumerate(code.transposed(columns)):
            at = b.mul(b.add(row, I64(vector * LANES + i)), panels["c_stride"])
            code.store(y, panels["c"], b.add(at, place))
