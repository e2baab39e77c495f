"""The narrow accumulator's matrix product where many elements of the columns are zero, as behind a ReLU.

A product of zero leaves a truncated sum as it is: the sum has its format already, so that mask and limit change nothing
of it. Here lanes are therefore rows (output channels), every 16 terms of a column have a word with a bit for each that
is not zero, and only those are computed: two fifths of them in a residual network on images. Terms keep their order,
and chunks the ones they had, so the bits are those of `emit`.

Only the sign of a zero may differ, which the end of a product makes positive in either form.

Legend: M rows, N columns, K terms; a panel is ``LANES`` columns, a block ``vectors * LANES`` rows.
"""

from collections.abc import Sequence
from functools import cache, reduce
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

SUMS_AT_WORK = 4
"""Vectors of sums that hide each other's latency: of one column where a block has as many, else of several."""

# Scratch: a panel of columns side by side; its words, int32 [K / 16, 16 columns]; a block's sums, column by column.
PANELS = Signature.of(
    first=I64,
    last=I64,
    blocks=I64,
    **SIZES,
    **SOURCE,
    weights=P,
    **SUMS,
    c_columns=I64,
    c_image=I64,
    **CONSTANTS,
    panel=P,
    words=P,
    sums=P,
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
    with zeros beyond the last row; ``c`` has as many rows, and after every ``c_columns`` columns, which panels must
    divide, the next ones lie ``c_image`` elements on.
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
        image = b.udiv(place, panels["c_columns"])
        to = b.add(b.mul(image, panels["c_image"]), b.sub(place, b.mul(image, panels["c_columns"])))
        with loop(b, I64(0), panels["blocks"]) as block:
            row = b.mul(block.index, rows)
            weights = code.at(panels["weights"], row)
            with loop(b, I64(0), I64(LANES), together(vectors)) as own:
                column.call(
                    panels,
                    weights=weights,
                    stride=stride,
                    panel=code.at(panels["panel"], own.index),
                    words=code.at(panels["words"], own.index, I32),
                    sums=code.at(panels["sums"], b.mul(own.index, rows)),
                )
            _turned(code, panels, vectors, row, to)
    b.ret_void()
    return Kernel(module, "panels", PANELS, target)


def together(vectors: int) -> int:
    """Columns that are summed side by side: each as many terms as the one of most has, of zeros where it has fewer."""
    return SUMS_AT_WORK // vectors


def scratch(K: int, vectors: int) -> dict[str, int]:
    """Bytes of the scratch arrays."""
    return {"panel": 4 * LANES * (K + 1), "words": 4 * K, "sums": 4 * LANES * vectors * LANES}


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
    """A block's sums of some columns."""
    column = internal(module, "column", COLUMN)
    group = together(vectors)
    b, code = column.b, Code(column, Shape(LANES, group, vectors), False, target)
    code.load_constants()
    zeros = [code.zero] * (group * vectors)
    with loop(b, I64(0), column["K"], column["chunk"], zeros) as chunks:
        with loop(b, chunks.index, chunk_end(code, chunks.index), LANES, zeros) as parts:
            words = [code.get(column["words"], b.add(parts.index, I64(own)), I32) for own in range(group)]
            count = reduce(lambda x, y: b.select(b.icmp_unsigned(">", x, y), x, y), [_ones(b, word) for word in words])
            with loop(b, I32(0), count, 1, [*words, *parts.values], unroll=False) as terms:
                left, sums = terms.values[:group], terms.values[group:]
                terms.carry(
                    *[b.and_(word, b.sub(word, I32(1))) for word in left],
                    *[
                        total
                        for own, word in enumerate(left)
                        for total in _term(
                            code, form, own, _next(code, parts.index, word), sums[own * vectors : (own + 1) * vectors]
                        )
                    ],
                )
            parts.carry(*terms.values[group:])
        added = [form.add(code, s, y, None).result for s, y in zip(parts.values, chunks.values, strict=True)]
        chunks.carry(*added)
    for place, value in enumerate(chunks.values):
        y = b.fadd(b.fmul(value, code.everywhere(column["unscale"])), code.zero)  # adding zero makes zeros positive
        code.store(y, column["sums"], I64(place * LANES))
    b.ret_void()
    return column


def _ones(b: ir.IRBuilder, word: Any) -> Any:
    return b.call(declared(b, "llvm.ctpop.i32", I32, [I32]), [word])


def _next(code: Code, part: Any, word: Any) -> Any:
    """The first of a word's terms; of a word without any, where other columns of its group have more, the term K."""
    b = code.b
    first = b.call(declared(b, "llvm.cttz.i32", I32, [I32, I1]), [word, I1(0)])
    k = b.add(part, b.zext(first, I64))
    return b.select(b.icmp_signed("!=", word, I32(0)), k, code.v["K"])


def _term(code: Code, form: Narrow, own: int, k: Any, sums: Sequence[Any]) -> list[Any]:
    """The sums of a group's column after term k."""
    b = code.b
    x = code.everywhere(code.get(code.v["panel"], b.add(b.mul(k, I64(LANES)), I64(own)), F))
    row = code.at(code.v["weights"], b.mul(k, code.v["stride"]))
    ws = [code.load(row, I64(vector * LANES)) for vector in range(len(sums))]
    return [form.term(code, x, w, s, None).result for w, s in zip(ws, sums, strict=True)]


def _turned(code: Code, panels: Definition, vectors: int, row: Any, to: Any) -> None:
    """A block's sums from columns to rows, into C."""
    b = code.b
    for vector in range(vectors):
        columns = [code.load(panels["sums"], I64((i * vectors + vector) * LANES)) for i in range(LANES)]
        for i, y in enumerate(code.transposed(columns)):
            at = b.mul(b.add(row, I64(vector * LANES + i)), panels["c_stride"])
            code.store(y, panels["c"], b.add(at, to))
