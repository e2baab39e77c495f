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
lowest set bit, which for columns comes twice: for rows' positive values, with ``never`` where the product is positive,
and for negative ones; rows keep where, in bytes, as ``signs``. Where seven bits hold sums of lowest bits the eighth is
the sign, of rows' and columns' alike (`Form.folded`): sums then have the product's sign, there is one array and no
``signs``, and one signed comparison finds the negative products that are cut. Exponents and lowest bits of a
tile's columns lie in another order: of lane d of the vectors i side by side, [d][i], which lets shifts and masks take
them apart. The accumulators are [row][tile][columns], float32.
"""

import math
from dataclasses import replace
from functools import cache, reduce
from typing import Any

from llvmlite import ir

from recoup.kernels.llvm import I8, I32, I64, D, F, P, Target, declared, loop, shuffle, splat
from recoup.kernels.rounding import EXCEPTIONS_MASKED, TOWARD_ZERO, internal, rounding
from recoup.kernels.signature import Definition, Kernel, Signature
from recoup.kernels.vector import Vector
from recoup.tensorcore.emit_form import AVX512, BIAS, FLOAT16_MIN, INFINITE, VECTORS, Form

LINE = 64  # bytes of the caches'
PANEL = 64  # columns whose terms of some groups stay in the second-level cache
CHUNK = {False: 576, True: 384}  # terms of those groups, in lanes of float32 and of float64: found by trying
GROUP = 64  # terms of a group that are asked for ahead: more would be much code

STEPS = Signature.of(
    tiles=I64, blocks=I64, K=I64, cut_offset=I32,
    a=P, a_exponents=P, a_lowest=P, a_signs=P, a_block=I64,
    b=P, b_exponents=P, b_lowest=P, b_tile=I64,
    c=P, c_row=I64,
)  # fmt: skip


@cache
def steps(form: Form, target: Target) -> Kernel:
    """All steps of ``tiles`` column tiles by ``blocks`` blocks of rows, from the accumulators in c.

    ``a_block``, ``b_tile`` and ``c_row``: elements from one block, tile, and row of accumulators to the next.
    """
    module = ir.Module("tensorcore")
    inner = internal(module, "panel", STEPS)
    inner.function.attributes.alignstack = LINE  # so that no register that leaves for memory lies in two lines
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
            b_lowest=at(outer["b_lowest"], b.mul(place, I64(form.copies)), form.integer),
            c=at(outer["c"], b.mul(turn.index, I64(form.columns)), F),
        )
    b.ret_void()
    return Kernel(module, "steps", STEPS, target)


def _panel(d: Definition, form: Form) -> None:
    """Some groups outside, then rows, then a few tiles, then each of the groups: the groups' columns stay in the
    second-level cache for all rows, the rows' terms are fetched once for all columns of the panel, in one stretch, and
    accumulators go back to memory only when the groups are done."""
    b, v = d.b, Vector(d.b, form.lanes, form.wide)
    groups = form.group * max(1, CHUNK[form.wide] // form.group)
    with loop(b, I64(0), d["K"], groups) as chunk:
        last = _least(b, b.add(chunk.index, I64(groups)), d["K"])
        with loop(b, I64(0), d["blocks"]) as block, loop(b, I64(0), d["tiles"]) as tile:
            place = b.mul(tile.index, d["b_tile"])
            moved = {
                "b": v.at(d["b"], place, v.scalar),
                "b_exponents": v.at(d["b_exponents"], place, form.integer),
                "b_lowest": v.at(d["b_lowest"], b.mul(place, I64(form.copies)), form.integer),
                "c": v.at(d["c"], b.mul(tile.index, I64(form.columns)), F),
            }
            step = _Step(replace(d, arguments=d.arguments | moved), form, block.index)
            with loop(b, chunk.index, last, form.group, step.loaded()) as group:
                end = _least(b, b.add(group.index, I64(form.group)), last)
                group.carry(*step.written(group.index, end, group.values))
            step.store(group.values)
    b.ret_void()


def _least(b: ir.IRBuilder, x: Any, y: Any) -> Any:
    return b.select(b.icmp_signed("<", x, y), x, y)


class _Step:
    """One group for one block of rows, being written."""

    def __init__(self, d: Definition, form: Form, block: Any) -> None:
        self.d, self.form, self.b, self.block = d, form, d.b, block
        self.v = Vector(d.b, form.lanes, form.wide)  # sums
        self.short = ir.VectorType(form.integer, form.columns)  # a row's exponents
        self.piece = ir.VectorType(form.integer, form.columns // form.pieces)

    def loaded(self) -> list[Any]:
        """The accumulators, row by row; and the next block's are asked for."""
        b, places = self.b, self._places()
        ahead = b.mul(self.d["c_row"], I64(self.form.rows))
        for place in places:
            self.v.prefetch(self.d["c"], b.add(place, ahead))
        return [self.v.load(self.d["c"], place, kind=self.v.of(F)) for place in places]

    def store(self, accumulators: list[Any]) -> None:
        """Put them back."""
        for x, place in zip(accumulators, self._places(), strict=True):
            self.v.store(x, self.d["c"], place)

    def written(self, first: Any, end: Any, accumulators: list[Any]) -> list[Any]:
        """The accumulators after the terms ``first <= k < end``."""
        rows, before, after = range(self.form.rows), _split(accumulators, VECTORS), []
        self._ahead(first)
        tops = self._exponents(first, end, [self._own(c) for c in before])
        starts, middles, cuts = [], [], []
        for row, top in zip(rows, tops, strict=True):
            begun = [self._begin(scale, before[row][i]) for i, scale in enumerate(self._scales(top))]
            starts.append([start for start, _ in begun])
            middles.append([middle for _, middle in begun])
            cuts.append(self._cut(top))
        sums, counts = self._products(first, end, starts, cuts)
        for row in rows:
            for i, missing in enumerate(self._counted(counts[row])):
                total = self.v.floats(self.b.add(self.v.bits(sums[row][i]), missing))
                exact = self.b.fsub(total, middles[row][i])  # a multiple of q; +0 where it is zero
                after.append(self._output(exact, before[row][i]))
        return after

    def _ahead(self, first: Any) -> None:
        """Ask for the next block's terms of the group: its rows lie too far from these for processors to foresee."""
        b, form = self.b, self.form
        place = b.add(b.mul(b.add(self.block, I64(1)), self.d["a_block"]), b.mul(first, I64(form.rows)))
        value = (self.v.scalar, 8 if form.wide else 4)
        exponent = (form.kept, form.kept.width // 8)
        names = {"a": value, "a_exponents": exponent, "a_lowest": exponent}
        for name, (kind, size) in (names | ({} if form.folded else {"a_signs": (I32, 4)})).items():
            for line in range(0, min(form.group, GROUP) * form.rows, LINE // size):
                self.v.prefetch(self.d[name], b.add(place, I64(line)), kind)

    def _exponents(self, first: Any, end: Any, own: list[Any]) -> list[Any]:
        """The largest of the accumulators' exponents and those of a group's products, per row."""
        b, form = self.b, self.form
        with loop(b, first, end, 1, own, unroll=False) as turn:
            place = b.mul(turn.index, I64(form.columns))
            theirs = b.load(self.v.at(self.d["b_exponents"], place, form.integer), typ=self.short, align=1)
            found = []
            for row, top in enumerate(turn.values):
                missing = self._everywhere("a_exponents", turn.index, row, self.short)
                # A core with four ports for subtractions has two for those that saturate.
                product = b.sub(theirs, missing) if form.folded else self._saturating("usub", theirs, missing)
                found.append(self._larger(product, top))
            turn.carry(*found)
        return turn.values

    def _own(self, accumulators: list[Any]) -> Any:
        """The exponents of a row's accumulators, as those of products are kept."""
        b, form = self.b, self.form
        bits = [self.b.bitcast(c, self.v.of(I32)) for c in accumulators]
        width = form.integer.width
        if form.short:  # byte i of a lane is that of vector i
            placed = [b.lshr(bits[0], self._lane(23)), b.lshr(bits[1], self._lane(15))]
            placed += [b.lshr(bits[2], self._lane(7)), b.shl(bits[3], self._lane(1))]
        else:
            fields = [b.zext(b.lshr(c, self._lane(23)), self.v.of(I64)) for c in bits]
            placed = [b.shl(field, self._lane(width * i, I64)) for i, field in enumerate(fields)]
        kept = [b.and_(x, self._lane(0xFF << (width * i), form.packed)) for i, x in enumerate(placed)]
        own = b.bitcast(reduce(b.or_, kept), self.short)
        smallest = BIAS + FLOAT16_MIN if form.output == "float16" else 1
        if smallest == 1 and form.short:
            return own  # there are no subnormal ones, and a zero loses with 0 as with 1
        zero = b.icmp_unsigned("==", own, self._bytes(0))
        own = b.select(zero, self._bytes(1), self._larger(own, self._bytes(smallest)))
        return b.add(own, self._bytes(form.bias - BIAS))

    def _scales(self, top: Any) -> list[Any]:
        """M of every vector, as bits: 2^(p - n + E)."""
        b, v, form = self.b, self.v, self.form
        fraction, bias = (52, 1023) if form.wide else (23, 127)
        width = form.integer.width
        lanes = b.bitcast(top, v.of(form.packed))
        lanes = b.zext(lanes, v.integers) if form.packed.width < v.integer.width else lanes
        field = v.constant(_signed((1 << (8 if form.short else 12)) - 1 << fraction, v.integer.width), v.integers)
        offset = v.constant(
            _signed(fraction - form.fraction + bias - form.bias << fraction, v.integer.width), v.integers
        )
        found = []
        for i in range(VECTORS):
            apart = v.constant(abs(fraction - width * i), v.integers)
            moved = b.shl(lanes, apart) if fraction >= width * i else b.lshr(lanes, apart)
            found.append(b.add(b.and_(moved, field), offset))
        return found

    def _begin(self, scale: Any, c: Any) -> tuple[Any, Any]:
        """Where a vector's sums start, 1.5 M plus what the cut leaves of c; and 1.5 M."""
        b, v, form = self.b, self.v, self.form
        middle = v.floats(b.add(scale, v.constant(1 << (51 if form.wide else 22), v.integers)))
        c = b.fpext(c, v.vector) if form.wide else c
        if form.register == AVX512:  # of a sum that stays positive, up is toward zero where c is negative
            negative = b.icmp_signed("<", v.bits(c), v.constant(0, v.integers))
            return b.select(negative, v.add_upward(middle, c), b.fadd(middle, c)), middle
        sign = b.and_(v.bits(c), v.constant(-1 << (v.integer.width - 1), v.integers))
        like = v.floats(b.or_(scale, sign))
        return b.fadd(b.fsub(b.fadd(c, like), like), middle), middle

    def _cut(self, top: Any) -> list[Any]:
        """The exponents of q as sums of lowest bits have them."""
        b, form = self.b, self.form
        offset = splat(b, b.trunc(self.d["cut_offset"], form.integer), form.columns)
        if form.folded:  # negative products below the cut are those below -128 and the cut
            above = self._saturating("usub", top, offset)
            limit = self._bytes(form.clip)
            above = b.select(b.icmp_unsigned("<", above, limit), above, limit)
            return self._cut_up(b.xor(above, self._bytes(-128)))
        signed = b.xor(top, self._bytes(-128)) if form.short else top
        return self._cut_up(self.v.smaller(self._saturating("ssub", signed, offset), self._bytes(form.clip)))

    def _products(
        self, first: Any, end: Any, starts: list[list[Any]], cuts: list[list[Any]]
    ) -> tuple[list[list[Any]], list[list[Any]]]:
        """Sums, and by how many q they are too low."""
        b, v, form = self.b, self.v, self.form
        pieces, terms = range(form.pieces), form.rows * VECTORS
        carried = [acc for row in starts for acc in row] + [ir.Constant(self.piece, None)] * (form.rows * form.pieces)
        with loop(b, first, end, 1, carried) as turn:
            k, values = turn.index, turn.values
            place = b.mul(k, I64(form.columns))
            theirs = [v.load(self.d["b"], b.add(place, I64(i * form.lanes))) for i in range(VECTORS)]
            sums, counts, lowest = [], [], []
            if form.folded:
                lowest = self._lowest(v.at(self.d["b_lowest"], place, form.integer))
            for row in range(form.rows):
                mine = v.everywhere(self._scalar("a", k, row, v.scalar))
                sums += [v.multiply_add(mine, theirs[i], values[row * VECTORS + i]) for i in range(VECTORS)]
                if not form.folded:
                    sign = b.zext(self._scalar("a_signs", k, row, I32), I64)
                    twice = v.at(self.d["b_lowest"], b.mul(place, I64(2)), form.integer)
                    lowest = self._lowest(b.gep(twice, [sign], source_etype=I8))
                mine = self._everywhere("a_lowest", k, row, self.piece)
                for piece in pieces:
                    cut = b.icmp_signed(">", cuts[row][piece], b.add(lowest[piece], mine))
                    counts.append(self._more(values[terms + row * form.pieces + piece], cut))
            turn.carry(*sums, *counts)
        sums, counts = turn.values[:terms], turn.values[terms:]
        return _split(sums, VECTORS), _split(counts, form.pieces)

    def _lowest(self, address: Any) -> list[Any]:
        """A tile's lowest bits of one k, in the vectors that count."""
        places = [self.v.at(address, I64(i * self.piece.count), self.form.integer) for i in range(self.form.pieces)]
        return [self.b.load(place, typ=self.piece, align=1) for place in places]

    def _more(self, count: Any, cut: Any) -> Any:
        b = self.b
        if self.form.weight == 1:
            return b.sub(count, b.sext(cut, self.piece))
        one = ir.Constant(self.piece, [self.form.weight] * self.piece.count)
        return b.add(count, b.select(cut, one, ir.Constant(self.piece, None)))

    def _counted(self, pieces: list[Any]) -> list[Any]:
        """A row's counts, per vector of sums."""
        b, v, form = self.b, self.v, self.form
        width, spare = form.integer.width, form.weight - 1
        lanes = b.bitcast(self._joined(pieces), v.of(form.packed))
        lanes = b.zext(lanes, v.integers) if form.packed.width < v.integer.width else lanes
        mask = v.constant((1 << (width - spare)) - 1, v.integers)
        return [b.and_(b.lshr(lanes, v.constant(width * i + spare, v.integers)), mask) for i in range(VECTORS)]

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
        if form.bounded:
            return found  # and so large that nothing negative became a zero
        found = b.fadd(found, single.zero)  # a zero is +0
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

    def _places(self) -> list[Any]:
        """Of the vectors of all rows' accumulators."""
        b, form = self.b, self.form
        first = b.mul(self.block, I64(form.rows))
        starts = [b.mul(b.add(first, I64(row)), self.d["c_row"]) for row in range(form.rows)]
        return [b.add(start, I64(i * form.lanes)) for start in starts for i in range(VECTORS)]

    def _cut_up(self, x: Any) -> list[Any]:
        """A row's exponents as vectors of the size that counts."""
        size = self.piece.count
        return [shuffle(self.b, x, range(first, first + size)) for first in range(0, self.form.columns, size)]

    def _joined(self, pieces: list[Any]) -> Any:
        while len(pieces) > 1:
            size = 2 * pieces[0].type.count
            pieces = [shuffle(self.b, x, range(size), y) for x, y in zip(pieces[::2], pieces[1::2], strict=True)]
        return pieces[0]

    def _larger(self, x: Any, y: Any) -> Any:
        """The larger of a row's exponents, which have no sign."""
        return self.b.select(self.b.icmp_unsigned(">", x, y), x, y)

    def _saturating(self, operation: str, x: Any, y: Any) -> Any:
        name = f"llvm.{operation}.sat.v{x.type.count}i{x.type.element.width}"
        return self.b.call(declared(self.b, name, x.type, [x.type, x.type]), [x, y])

    def _bytes(self, value: int) -> Any:
        return ir.Constant(self.short, [value] * self.form.columns)

    def _lane(self, value: int, kind: ir.IntType = I32) -> Any:
        return self.v.constant(_signed(value, kind.width), self.v.of(kind))

    def _scalar(self, array: str, k: Any, row: int, kind: ir.Type) -> Any:
        b = self.b
        place = b.add(b.mul(self.block, self.d["a_block"]), b.add(b.mul(k, I64(self.form.rows)), I64(row)))
        return self.v.get(self.d[array], place, kind)

    def _everywhere(self, array: str, k: Any, row: int, kind: ir.VectorType) -> Any:
        """A row's exponent in every lane, see `Form.repeated`."""
        if not self.form.repeated:
            return splat(self.b, self._scalar(array, k, row, self.form.kept), kind.count)
        count = kind.count * kind.element.width // 32
        return self.b.bitcast(splat(self.b, self._scalar(array, k, row, I32), count), kind)


def _split(values: list[Any], size: int) -> list[list[Any]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def _signed(value: int, width: int) -> int:
    """The same bits as a number that LLVM prints."""
    value &= (1 << width) - 1
    return value - (1 << width) if value >> (width - 1) else value
