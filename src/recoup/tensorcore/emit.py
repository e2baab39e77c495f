"""The tensor core's step as LLVM vector IR: one group of products for a few rows of a column tile at a time.

With rounding toward zero an accumulator that starts at 1.5 M, M = 2^(p - n + E), p the lanes' fraction bits, has the
last place q = 2^(E - n) and stays positive, so that ``acc = fma(a, b, acc)`` adds floor(a b / q) q. The unit cuts the
magnitude instead: it is one q more where a b < 0 is no multiple of q. Whether it is, the exponents of the lowest set
bits tell: a b is a multiple of 2^(l_a + l_b) and of no higher power of two. So a product costs one multiply-add, and in
lanes of 8 or 16 bits, of which a register holds four times as many, an addition and a maximum for E, and an addition, a
comparison and a masked increment for the cut. Sums are below 2^(p - 1) q (`config.TensorCore` refuses others), hence
exact.

Legend: K terms; a tile is ``columns`` columns by all rows, ``rows`` of which form a block; G products are a group.

Rows lie as [block][k][row], columns as [tile][k][columns]; of every operand its value, its exponent, and that of its
lowest set bit, which for columns comes twice: for rows' positive values, with NEVER where the product is positive, and
for negative ones. The accumulators are [tile][row][columns], float32.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from llvmlite import ir

from recoup.kernels.llvm import I8, I16, I32, I64, D, F, P, Target, loop, shuffle, splat
from recoup.kernels.rounding import EXCEPTIONS_MASKED, TOWARD_ZERO, internal, rounding
from recoup.kernels.signature import Definition, Kernel, Signature
from recoup.kernels.vector import Vector

VECTORS = 4  # of a row's sums in registers: as many as one register of 8-bit exponents serves
PANEL = 64  # columns whose terms of a group stay in the first-level cache
ZERO, FLOAT16_MIN = -126, -14  # exponents of a zero and of float16's subnormals, as the unit sees them
INFINITE = 128  # the exponent from which float32 is infinite
NOT_IN_FORMAT, NOT_FINITE = 1, 2  # what `prepare_rows` and `prepare_columns` find

STEPS = Signature.of(
    tiles=I64, blocks=I64, K=I64,
    a=P, a_exponents=P, a_lowest=P, a_signs=P, a_block=I64,
    b=P, b_exponents=P, b_lowest=P, b_tile=I64,
    c=P,
)  # fmt: skip
FORMAT = {"mantissa": I32, "min_exponent": I32, "largest": F}
ROWS = Signature.of(n=I64, x=P, values=P, exponents=P, lowest=P, signs=P, faults=P, **FORMAT)
COLUMNS = Signature.of(
    K=I64, tiles=I64, x=P, stride=I64, values=P, exponents=P, lowest=P, faults=P, **FORMAT
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Form:
    """A kernel.

    Attributes:
        group, fraction, output: the unit's.
        wide: lanes of float64, else of float32.
        short: exponents in 8 bits, else in 16.
        register: bytes of the processor's vectors.
        rows: of a block, whose sums stay in registers.
        bounded: no sum reaches infinity.
    """

    group: int
    fraction: int
    output: str
    wide: bool
    short: bool
    register: int
    rows: int
    bounded: bool

    @property
    def lanes(self) -> int:
        """Of a vector of floats."""
        return self.register // (8 if self.wide else 4)

    @property
    def columns(self) -> int:
        """Of a tile."""
        return VECTORS * self.lanes

    @property
    def integer(self) -> ir.IntType:
        """What exponents are kept in."""
        return I8 if self.short else I16

    @property
    def zero(self) -> int:
        """A zero's exponent. In 8 bits -126 would leave none for the partner's: -64 loses to every product too, and q
        is then below the last place of any sum there is."""
        return -64 if self.short else ZERO

    @property
    def never(self) -> int:
        """An exponent of a lowest bit that no cut reaches."""
        return 63 if self.short else 2000

    @property
    def cut_range(self) -> tuple[int, int]:
        """The exponent of q, as far as lowest bits reach: beyond, every product is cut, or none."""
        return (-100, 38) if self.short else (-1500, 1500)


@cache
def steps(form: Form, target: Target) -> Kernel:
    """All steps of ``tiles`` column tiles by ``blocks`` blocks of rows, from the accumulators in c.

    ``a_block`` and ``b_tile``: elements from one block, and tile, to the next.
    """
    module = ir.Module("tensorcore")
    inner = internal(module, "panel", STEPS)
    _panel(inner, form)
    outer = STEPS.define(module, "steps")
    b, at = outer.b, Vector(outer.b, form.lanes, form.wide).at
    panel = max(1, PANEL // form.columns)
    with rounding(b, EXCEPTIONS_MASKED | TOWARD_ZERO, target), loop(b, I64(0), outer["tiles"], panel) as turn:
        place, left = b.mul(turn.index, outer["b_tile"]), b.sub(outer["tiles"], turn.index)
        inner.call(
            outer,
            tiles=b.select(b.icmp_signed("<", left, I64(panel)), left, I64(panel)),
            b=at(outer["b"], place, D if form.wide else F),
            b_exponents=at(outer["b_exponents"], place, form.integer),
            b_lowest=at(outer["b_lowest"], b.mul(place, I64(2)), form.integer),
            c=at(outer["c"], b.mul(turn.index, _accumulators(outer, form)), F),
        )
    b.ret_void()
    return Kernel(module, "steps", STEPS, target)


def _accumulators(d: Definition, form: Form) -> Any:
    """How many a tile has."""
    return d.b.mul(d["blocks"], I64(form.rows * form.columns))


def _panel(d: Definition, form: Form) -> None:
    """Groups outside, then rows, then a few tiles: a group's columns stay in the first-level cache for all rows, and
    the rows' terms are fetched once for all columns of the panel."""
    b, v = d.b, Vector(d.b, form.lanes, form.wide)
    with loop(b, I64(0), d["K"], form.group) as group:
        end = b.add(group.index, I64(form.group))
        end = b.select(b.icmp_signed("<", end, d["K"]), end, d["K"])
        with loop(b, I64(0), d["blocks"]) as block, loop(b, I64(0), d["tiles"]) as tile:
            place = b.mul(tile.index, d["b_tile"])
            moved = {
                "b": v.at(d["b"], place, v.scalar),
                "b_exponents": v.at(d["b_exponents"], place, form.integer),
                "b_lowest": v.at(d["b_lowest"], b.mul(place, I64(2)), form.integer),
                "c": v.at(d["c"], b.mul(tile.index, _accumulators(d, form)), F),
            }
            _Step(replace(d, arguments=d.arguments | moved), form, block.index).write(group.index, end)
    b.ret_void()


class _Step:
    """One group for one block of rows, being written."""

    def __init__(self, d: Definition, form: Form, block: Any) -> None:
        self.d, self.form, self.b, self.block = d, form, d.b, block
        self.v, self.w = Vector(d.b, form.lanes, form.wide), Vector(d.b, form.columns)  # sums; a row, float32
        self.short = ir.VectorType(form.integer, form.columns)

    def write(self, first: Any, end: Any) -> None:
        """From the accumulators to the next ones, for the terms ``first <= k < end``."""
        rows, tops = range(self.form.rows), self._exponents(first, end)
        before = [self.w.load(self.d["c"], self._place(row)) for row in rows]
        exponents = [self._top(top, c) for top, c in zip(tops, before, strict=True)]
        begun = [[self._begin(exponents[row], before[row], i) for i in range(VECTORS)] for row in rows]
        cuts = [self._cut(e) for e in exponents]
        sums, counts = self._products(first, end, [[acc for acc, _ in row] for row in begun], cuts)
        for row in rows:
            found = []
            for i in range(VECTORS):
                missing = self.b.sext(self._part(counts[row], i), self.v.integers)
                total = self.v.floats(self.b.add(self.v.bits(sums[row][i]), missing))
                exact = self.b.fsub(total, begun[row][i][1])  # a multiple of q; +0 where it is zero
                found.append(self._output(exact, self._part(before[row], i)))
            for i, value in enumerate(found):
                place = self.b.add(self._place(row), I64(i * self.form.lanes))
                self.v.store(value, self.d["c"], place)

    def _exponents(self, first: Any, end: Any) -> list[Any]:
        """The largest exponent of a group's products, per row, in short lanes."""
        b, form = self.b, self.form
        least = ir.Constant(self.short, [-(1 << (form.integer.width - 1))] * form.columns)
        with loop(b, first, end, 1, [least] * form.rows) as turn:
            theirs = self._column(self.d["b_exponents"], turn.index)
            found = []
            for row, top in enumerate(turn.values):
                sums = b.add(theirs, self._row(self.d["a_exponents"], turn.index, row, form.integer))
                found.append(self.v.larger(sums, top))
            turn.carry(*found)
        return turn.values

    def _top(self, top: Any, c: Any) -> Any:
        """E: the largest of the products' exponents and the accumulators' own, int32."""
        b, w = self.b, self.w
        bits = w.magnitude(c)
        own = b.sub(b.lshr(bits, w.constant(23, w.integers)), w.constant(127, w.integers))
        if self.form.output == "float16":  # its subnormals have the smallest normal exponent
            own = w.larger(own, w.constant(FLOAT16_MIN, w.integers))
            own = b.select(b.icmp_signed("==", bits, w.constant(0, w.integers)), w.constant(ZERO, w.integers), own)
        own = w.larger(own, w.constant(ZERO, w.integers))
        return w.larger(own, b.sext(top, w.integers))

    def _cut(self, exponents: Any) -> Any:
        """The exponents of q in short lanes."""
        b, w = self.b, self.w
        low, high = (w.constant(value, w.integers) for value in self.form.cut_range)
        cut = b.sub(exponents, w.constant(self.form.fraction, w.integers))
        return b.trunc(w.smaller(w.larger(cut, low), high), self.short)

    def _begin(self, exponents: Any, accumulators: Any, i: int) -> tuple[Any, Any]:
        """Where a vector's sums start, 1.5 M plus what the cut leaves of c; and 1.5 M."""
        b, v, form = self.b, self.v, self.form
        fraction, bias = (52, 1023) if form.wide else (23, 127)
        scale = b.add(
            self._part(exponents, i),
            ir.Constant(ir.VectorType(I32, form.lanes), [fraction - form.fraction + bias] * form.lanes),
        )
        bottom = b.shl(b.zext(scale, v.integers) if form.wide else scale, v.constant(fraction, v.integers))
        middle = v.floats(b.or_(bottom, v.constant(1 << (fraction - 1), v.integers)))
        bottom = v.floats(bottom)
        c = self._part(accumulators, i)
        c = b.fpext(c, v.vector) if form.wide else c
        cut = v.bits(b.fsub(b.fadd(bottom, v.floats(v.magnitude(c))), bottom))
        sign = b.and_(v.bits(c), v.constant(-1 << (v.integer.width - 1), v.integers))
        return b.fadd(middle, v.floats(b.or_(cut, sign))), middle

    def _products(
        self, first: Any, end: Any, starts: list[list[Any]], cuts: list[Any]
    ) -> tuple[list[list[Any]], list[Any]]:
        """Sums, and by how many q they are too low."""
        b, v, form = self.b, self.v, self.form
        carried = [acc for row in starts for acc in row] + [ir.Constant(self.short, None)] * form.rows
        with loop(b, first, end, 1, carried) as turn:
            k, values = turn.index, turn.values
            place = b.mul(k, I64(form.columns))
            theirs = [v.load(self.d["b"], b.add(place, I64(i * form.lanes))) for i in range(VECTORS)]
            sums, counts = [], []
            for row in range(form.rows):
                mine = v.everywhere(self._scalar(self.d["a"], k, row, v.scalar))
                sums += [v.multiply_add(mine, theirs[i], values[row * VECTORS + i]) for i in range(VECTORS)]
                negative = b.zext(self._scalar(self.d["a_signs"], k, row, I8), I64)
                at = b.mul(b.add(b.mul(k, I64(2)), negative), I64(form.columns))
                lowest = b.load(v.at(self.d["b_lowest"], at, form.integer), typ=self.short, align=1)
                lowest = b.add(lowest, self._row(self.d["a_lowest"], k, row, form.integer))
                cut = b.icmp_signed("<", lowest, cuts[row])
                counts.append(b.add(values[form.rows * VECTORS + row], b.zext(cut, self.short)))
            turn.carry(*sums, *counts)
        sums, counts = turn.values[: form.rows * VECTORS], turn.values[form.rows * VECTORS :]
        return [sums[row * VECTORS : (row + 1) * VECTORS] for row in range(form.rows)], counts

    def _output(self, exact: Any, c: Any) -> Any:
        """The next accumulators, float32: see `reference.output`."""
        b, v, form = self.b, self.v, self.form
        if not form.wide:
            return v.masked(exact, v.constant(-1 << 10, v.integers)) if form.output == "e8m13" else exact
        single = Vector(b, form.lanes)
        half = form.output == "float16"
        found = v.narrow(self._nearest_float16(exact) if half else exact)
        if form.output == "e8m13":
            found = single.masked(found, single.constant(-1 << 10, single.integers))
        found = b.fadd(found, single.zero)  # a zero is +0
        if form.bounded:
            return found
        # Rounding toward zero stops at the largest number; an accumulator that was infinite stays so.
        least = v.constant(65520.0 if half else 2.0**INFINITE)
        infinite, bits = b.fcmp_ordered(">=", v.floats(v.magnitude(exact)), least), v.constant(0, v.integers)
        sign = b.icmp_signed("<", v.bits(exact), bits)
        top, bottom = single.constant(math.inf), single.constant(-math.inf)
        found = b.select(infinite, b.select(sign, bottom, top), found)
        return b.select(b.fcmp_ordered("==", single.floats(single.magnitude(c)), top), c, found)

    def _nearest_float16(self, exact: Any) -> Any:
        """To float16's nearest, ties to even, with the processor rounding toward zero."""
        b, v = self.b, self.v
        bits = v.magnitude(exact)
        exponent = v.larger(
            b.sub(b.lshr(bits, v.constant(52, v.integers)), v.constant(1023, v.integers)),
            v.constant(FLOAT16_MIN, v.integers),
        )
        unit = v.floats(b.shl(b.add(exponent, v.constant(1023 - 10, v.integers)), v.constant(52, v.integers)))
        ones = v.constant(2.0**52)
        scaled = b.fdiv(v.floats(bits), unit)  # exact: by a power of two
        whole = b.fsub(b.fadd(scaled, ones), ones)
        rest = b.fsub(scaled, whole)
        half = v.constant(0.5)
        odd = b.icmp_signed(
            "!=", b.and_(v.bits(b.fadd(whole, ones)), v.constant(1, v.integers)), v.constant(0, v.integers)
        )
        up = b.or_(b.fcmp_ordered(">", rest, half), b.and_(b.fcmp_ordered("==", rest, half), odd))
        whole = b.select(up, b.fadd(whole, v.constant(1.0)), whole)
        sign = b.and_(v.bits(exact), v.constant(-1 << 63, v.integers))
        return v.floats(b.or_(v.bits(b.fmul(whole, unit)), sign))

    def _place(self, row: int) -> Any:
        """Of a row's accumulators."""
        rows = self.b.add(self.b.mul(self.block, I64(self.form.rows)), I64(row))
        return self.b.mul(rows, I64(self.form.columns))

    def _part(self, x: Any, i: int) -> Any:
        """The vector i of a row's."""
        return shuffle(self.b, x, range(i * self.form.lanes, (i + 1) * self.form.lanes))

    def _scalar(self, rows: Any, k: Any, row: int, kind: ir.Type) -> Any:
        b = self.b
        place = b.add(b.mul(self.block, self.d["a_block"]), b.add(b.mul(k, I64(self.form.rows)), I64(row)))
        return self.v.get(rows, place, kind)

    def _row(self, rows: Any, k: Any, row: int, kind: ir.Type) -> Any:
        return splat(self.b, self._scalar(rows, k, row, kind), self.form.columns)

    def _column(self, columns: Any, k: Any) -> Any:
        address = self.v.at(columns, self.b.mul(k, I64(self.form.columns)), self.form.integer)
        return self.b.load(address, typ=self.short, align=1)
