"""Registers that saturate where slots hold one signed product, as LLVM vector IR: many slots at once, far from an end.

Products of signed values have any sign, so no run of them is known beforehand. But all that some slots add on their
way is at most |v| |w|, the lengths of their values and of their weights (Cauchy and Schwarz). Where no register of a
tile is nearer to an end than that, none leaves within a span, which is added as if there were no ends: four products an
instruction. Else the span is added piece by piece, and what a piece passes on its way lies beyond both of its ends by
half of its |v| |w| or less, for it comes back. If that too reaches an end the piece is walked again, slot by slot.

Legend: G groups of 16 pixels, a tile; K slots' taps in their order, in B blocks of spans of pieces; O output channels.
All distances are in bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from typing import Any, NamedTuple

from llvmlite import ir

from recoup.kernels import llvm
from recoup.kernels.llvm import I8, I16, I32, I64, F, P, Target, loop
from recoup.kernels.signature import Definition, Kernel, Signature
from recoup.kernels.vector import Vector
from recoup.nbsmt.emit_runs import LANES, VECTOR, planes_of, turn_of
from recoup.network.scales import SIGNED

QUAD, PIECE, SPAN = 4, 16, 32
"""Slots of an instruction that adds, of a piece, and of a span."""

PIECES = SPAN // PIECE
"""Pieces of a span."""

ALL = PIECES + 1
"""Numbers of a span: its own, and one for each of its pieces."""

WORD = 16
"""Bits of a register below which it is walked in lanes of words."""

UP = 1 + 2.0**-20
"""What a length is multiplied by, lest rounding makes it shorter."""

FILL = Signature.of(spans=I64, rows=P, windows=P, words=P, reach=P, shift=I32)
WALK = Signature.of(
    outputs=I64, spans=I64, quads=P, singles=P, lengths=P, zeros=P,
    windows=P, words=P, reach=P, sums=P, walked=P, begin=I32,
    low=I32, high=I32, missing=I32,
)  # fmt: skip
TILES = Signature.of(
    first=I64, last=I64, pixels=I64, x=P, base=P, near=P,
    channels=I64, taps=I64, outputs=I64, vectors=I64, blocks=I64, size=I64, quads=P, singles=P, lengths=P, zeros=P,
    planes=P, windows=P, words=P, reach=P, sums=P, walked=P, out=P, row=I64, start=I32,
    low=I32, high=I32, shift=I32, missing=I32,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Form:
    """What a kernel is specialised for.

    Attributes:
        narrow: whether registers are walked in words, which hold the upper end by themselves, moved up to theirs; else
            in 32 bits, times a power of two, which hold both.
        groups: G, even.
        floats: the results are float32.
    """

    narrow: bool
    groups: int
    floats: bool


class Register(NamedTuple):
    """How a register is walked: its ends, and powers of two that values and weights are taken times."""

    low: int
    high: int
    shift: int
    shift_of_weights: int

    @classmethod
    def of(cls, bits: int) -> "Register":
        """Of so many bits. Values and weights times 2^8 fit words, which lift the ends of 16 bits to those of 32."""
        missing = 0 if bits < WORD else 32 - bits
        return cls(-(1 << (bits - 1)), (1 << (bits - 1)) - 1, min(missing, 8), max(missing - 8, 0))


@lru_cache(32)
def tiles(form: Form, target: Target) -> Kernel:
    """The registers of output pixels after all slots, tiles ``first .. last`` of 16 G pixels each.

    Args:
        pixels: how many there are; a tile's beyond the last one repeat it, and are not kept.
        x: codes, of which whole vectors can be read. Those of pixel m, tap l begin at ``base[m] + near[l]``.
        base, near: int64.
        channels, taps, outputs: C, L and O.
        vectors: of output channels, whole ones.
        blocks, size: slots are added in so many blocks of ``size``, whole spans; weights beyond the last are 0.
        quads: int8 [B, O, size].
        singles: int32 [B, O, size]: two words of one weight, or of a weight and 0, see `recoup.nbsmt.bounded`.
        lengths: float32 [B, O, size / 32, 3], at least the lengths of a span's weights, and of its pieces'.
        zeros: int32 [B, O, size / 32, 3], what the zeros of the codes add there, negated.
        planes: memory, [B size, 16 G] codes, which are zero from K on.
        windows, words, reach, sums: memory: [size / 4, G] vectors, [size / 2, G] vectors, float32 [size / 32, 3],
            int32 [vectors 16, G 16].
        walked: int64, to which the number of pieces that were walked is added.
        out: float32 or int32, [vectors 16] for each pixel, ``row`` apart.
        start: 0, what stands for it.
        low, high: the register's ends.
        shift, missing: powers of two that values are taken times, and registers, while they are walked.
    """
    return Kernel(tiles_module(form), "tiles", TILES, target)


def tiles_module(form: Form) -> ir.Module:
    """Code of `tiles`."""
    module, groups = ir.Module("nbsmt"), form.groups
    planes, fill, walk = planes_of(module, groups), _fill(module, form), _Walk(module, form).d
    turn = turn_of(module, groups, form.floats)
    d = TILES.define(module, "tiles")
    b, at = d.b, Vector(d.b, LANES).at
    wide, spans = I64(groups * LANES), b.sdiv(d["size"], I64(SPAN))
    with loop(b, d["first"], d["last"]) as tile:
        done = b.mul(tile.index, wide)
        planes.call(d, first=done)
        with loop(b, I64(0), d["blocks"]) as block:
            fill.call(d, spans=spans, rows=at(d["planes"], b.mul(b.mul(block.index, d["size"]), wide), I8))
            own = b.mul(b.mul(block.index, d["outputs"]), spans)
            places = {
                name: at(d[name], b.mul(own, I64(size)), I8)
                for name, size in (("quads", SPAN), ("singles", 4 * SPAN), ("lengths", 4 * ALL), ("zeros", 4 * ALL))
            }
            begin = b.zext(b.icmp_signed("==", block.index, I64(0)), I32)
            walk.call(d, spans=spans, begin=begin, **places)
        turn.call(d, count=b.sub(d["pixels"], done), to=at(d["out"], b.mul(done, d["row"]), I8))
    b.ret_void()
    return module


def _fill(module: ir.Module, form: Form) -> Definition:
    """A block's rows of codes as windows of four slots, as values in words, and how long their values can be.

    Words are [slots / 2, G] vectors of [16 pixels, 2 slots], or [slots, 16 G pixels] where the register is narrow.
    """
    d = FILL.define(module, "fill")
    b, v, groups = d.b, Vector(d.b, LANES), form.groups
    none = ir.Constant(v.integers, None)
    with loop(b, I64(0), d["spans"]) as span:
        rows = v.at(d["rows"], b.mul(span.index, I64(SPAN * groups * LANES)), I8)
        windows = v.at(d["windows"], b.mul(span.index, I64(SPAN // QUAD * groups * VECTOR)), I8)
        words = v.at(d["words"], b.mul(span.index, I64(SPAN // 2 * groups * VECTOR)), I8)
        with loop(b, I64(0), I64(groups), 1, [none] * ALL, unroll=False) as group:
            column, vector = b.mul(group.index, I64(LANES)), b.mul(group.index, I64(VECTOR))
            of_pieces = []
            for first in range(0, SPAN, PIECE):
                length = none
                for slot in range(first, first + PIECE, QUAD):
                    places = [b.add(column, I64((slot + i) * groups * LANES)) for i in range(QUAD)]
                    codes = [v.load(rows, place, kind=v.of(I8)) for place in places]
                    window = v.at(windows, b.add(vector, I64(slot // QUAD * groups * VECTOR)), I8)
                    v.store(_window(v, codes), window, I64(0))
                    length = _words(d, form, codes, length, words, slot, group.index)
                of_pieces.append(length)
            whole = reduce(b.add, of_pieces)
            group.carry(*map(v.larger, group.values, [whole, *of_pieces]))
        for i, lengths in enumerate(group.values):
            squared = b.sitofp(v.reduced(lengths, lambda x, y: b.select(b.icmp_signed(">", x, y), x, y)), F)
            root = b.call(llvm.declared(b, "llvm.sqrt.f32", F, [F]), [squared])
            v.put(b.fmul(root, F(UP)), d["reach"], b.add(b.mul(span.index, I64(ALL)), I64(i)))
    b.ret_void()
    return d


def _window(v: Vector, codes: Sequence[Any]) -> Any:
    """Four slots' codes of 16 pixels, pixel by pixel."""
    order = [slot * LANES + lane for lane in range(LANES) for slot in range(QUAD)]
    halves = [llvm.shuffle(v.b, codes[i], range(2 * LANES), codes[i + 1]) for i in (0, 2)]
    return llvm.shuffle(v.b, halves[0], order, halves[1])


def _words(d: Definition, form: Form, codes: Sequence[Any], length: Any, words: Any, slot: int, group: Any) -> Any:
    """Store the values of four slots from ``slot`` on; ``length`` and the sums of their squares."""
    b, v, groups = d.b, Vector(d.b, LANES), form.groups
    pair = [slot * LANES + lane for lane in range(LANES) for slot in range(2)]
    shift = llvm.splat(b, b.trunc(d["shift"], I16), 2 * LANES)
    values = [b.sext(b.xor(code, v.constant(-SIGNED, v.of(I8))), v.of(I16)) for code in codes]
    for i in (0, 2):
        both = llvm.shuffle(b, values[i], pair, values[i + 1])
        length = _dotted(b, "wssd", length, both, both)
        if not form.narrow:
            place = b.mul(b.add(group, I64((slot + i) // 2 * groups)), I64(VECTOR))
            v.store(b.shl(both, shift), v.at(words, place, I8), I64(0))
    for i, value in enumerate(values if form.narrow else ()):
        v.store(value, words, b.mul(b.add(group, I64((slot + i) * groups)), I64(LANES)))
    return length


class _Walk:
    """All spans of a block added, output channel by output channel.

    ``sums``, int32 [O, G, 16], keeps the registers from block to block; ``begin``: this one is the first.
    """

    def __init__(self, module: ir.Module, form: Form) -> None:
        self.form, self.d = form, WALK.define(module, "walk")
        self.b, self.v = self.d.b, Vector(self.d.b, LANES)
        self.words = ir.VectorType(I16, 2 * LANES)
        d, b, v, groups = self.d, self.b, self.v, form.groups
        self.low, self.high, self.missing = (v.everywhere(d[name]) for name in ("low", "high", "missing"))
        fresh = v.everywhere(b.icmp_signed("!=", d["begin"], I32(0)))
        with loop(b, I64(0), d["outputs"]) as output:
            sums = v.at(d["sums"], b.mul(output.index, I64(VECTOR * groups)), I8)
            kept = [v.load(sums, I64(LANES * g), kind=v.integers) for g in range(groups)]
            registers = [b.select(fresh, ir.Constant(v.integers, None), register) for register in kept]
            first = b.mul(output.index, d["spans"])
            with loop(b, I64(0), d["spans"], 1, registers, unroll=False) as span:
                span.carry(*self._span(span.values, span.index, b.add(first, span.index)))
            for g, register in enumerate(span.values):
                v.store(register, sums, I64(LANES * g))
        b.ret_void()

    def _reach(self, span: Any, weights: Any, number: int) -> Any:
        """How far a span goes, or a piece of it, at most: float32, about 1 above it."""
        b, v, d = self.b, self.v, self.d
        length, reach = (
            v.get(d[name], b.add(b.mul(at, I64(ALL)), I64(number)), F)
            for name, at in (("lengths", weights), ("reach", span))
        )
        return b.fadd(b.fmul(b.fmul(length, reach), F(UP)), F(1))

    def _outside(self, largest: Any, smallest: Any, reach: Any) -> Any:
        """Whether a register may leave that goes so far from these."""
        b, v = self.b, self.v
        reach = v.everywhere(b.fptosi(reach, I32))
        above = b.icmp_signed(">", largest, b.sub(self.high, reach))
        below = b.icmp_signed("<", smallest, b.add(self.low, reach))
        return v.any(b.or_(above, below))

    def _either(self, holds: Any, one: Callable[[], list[Any]], other: Callable[[], list[Any]]) -> list[Any]:
        """The registers after one way or the other."""
        b = self.b
        with b.if_else(holds, likely=False) as (then, otherwise):
            with then:
                ones, from_one = one(), b.block
            with otherwise:
                others, from_other = other(), b.block
        after = []
        for first, second in zip(ones, others, strict=True):
            register = b.phi(first.type)
            register.add_incoming(first, from_one)
            register.add_incoming(second, from_other)
            after.append(register)
        return after

    def _span(self, registers: Sequence[Any], span: Any, weights: Any) -> list[Any]:
        """The registers after a span of the block, of the weights' ``weights``-th."""
        outside = self._outside(*self._ends(registers), self._reach(span, weights, 0))

        def whole() -> list[Any]:
            return self._added(self._from_zero(registers, weights, 0), span, weights, 0, SPAN)

        return self._either(outside, lambda: self._pieces(registers, span, weights), whole)

    def _ends(self, registers: Sequence[Any]) -> tuple[Any, Any]:
        """The largest and the smallest register of every lane."""
        largest = smallest = registers[0]
        for register in registers[1:]:
            largest, smallest = self.v.larger(largest, register), self.v.smaller(smallest, register)
        return largest, smallest

    def _pieces(self, given: Sequence[Any], span: Any, weights: Any) -> list[Any]:
        """A span piece by piece: a sum goes beyond both of a piece's ends by half of what it can go, or less."""
        b, v, walk = self.b, self.v, self._narrow if self.form.narrow else self._walked
        registers = list(given)
        for piece in range(PIECES):
            first, reach = piece * PIECE, self._reach(span, weights, piece + 1)
            after = self._added(self._from_zero(registers, weights, piece + 1), span, weights, first, PIECE)
            (high, low), (higher, lower) = self._ends(registers), self._ends(after)
            ends = v.larger(high, higher), v.smaller(low, lower)
            outside = self._outside(*ends, b.fadd(b.fmul(reach, F(0.5)), F(1)))
            registers = self._either(outside, partial(walk, registers, span, weights, first), after.copy)
        return registers

    def _from_zero(self, registers: Sequence[Any], weights: Any, number: int) -> list[Any]:
        """The registers less what the zeros of the codes of a span, or of a piece of it, are going to add."""
        place = self.b.add(self.b.mul(weights, I64(ALL)), I64(number))
        zeros = self.v.everywhere(self.v.get(self.d["zeros"], place, I32))
        return [self.b.add(register, zeros) for register in registers]

    def _added(self, registers: list[Any], span: Any, weights: Any, first: int, count: int) -> list[Any]:
        """Some slots of a span, whole quads, added as if the register had no ends."""
        b, v, d, groups = self.b, self.v, self.d, self.form.groups
        windows = v.at(d["windows"], b.mul(span, I64(SPAN // QUAD * groups * VECTOR)), I8)
        own = v.at(d["quads"], b.mul(weights, I64(SPAN)), I8)
        for quad in range(first // QUAD, (first + count) // QUAD):
            weight = v.everywhere(v.get(own, I64(quad), I32))
            for g in range(groups):
                x = v.load(windows, I64((quad * groups + g) * LANES), kind=v.integers)
                registers[g] = _dotted(b, "busd", registers[g], x, weight)
        return registers

    def _walk_from(self, span: Any, weights: Any, first: int) -> tuple[Any, Any]:
        """Where a piece's words lie that begins at slot ``first`` of a span, and its weights; the piece is counted."""
        b, v, d, groups = self.b, self.v, self.d, self.form.groups
        v.put(b.add(v.get(d["walked"], I64(0), I64), I64(1)), d["walked"], I64(0))
        words = v.at(d["words"], b.mul(span, I64(SPAN // 2 * groups * VECTOR)), I8)
        own = v.at(d["singles"], b.mul(weights, I64(4 * SPAN)), I8)
        return v.at(words, I64(first // 2 * groups * VECTOR), I8), v.at(own, I64(first), I32)

    def _walked(self, registers: Sequence[Any], span: Any, weights: Any, first: int) -> list[Any]:
        """Slot by slot, in 32 bits, whose ends are the register's: a pair of words, of which one weighs 0."""
        b, v, groups = self.b, self.v, self.form.groups
        words, own = self._walk_from(span, weights, first)
        with loop(b, I64(0), I64(PIECE), 2, [b.shl(r, self.missing) for r in registers], unroll=False) as slot:
            x = v.at(words, b.mul(slot.index, I64(groups * VECTOR // 2)), I8)
            values = [v.load(x, I64(LANES * g), kind=v.integers) for g in range(groups)]
            after = slot.values
            for i in range(2):
                weight = v.everywhere(v.get(own, b.add(slot.index, I64(i)), I32))
                after = [_dotted(b, "wssds", r, x, weight) for r, x in zip(after, values, strict=True)]
            slot.carry(*after)
        return [b.ashr(register, self.missing) for register in slot.values]

    def _narrow(self, registers: Sequence[Any], span: Any, weights: Any, first: int) -> list[Any]:
        """Slot by slot, two groups in lanes of 16 bits, whose upper end is the register's, moved up to it."""
        b, v, groups = self.b, self.v, self.form.groups
        words, own = self._walk_from(span, weights, first)
        up = b.sub(v.constant((1 << (WORD - 1)) - 1, v.integers), self.high)
        both = range(2 * LANES)
        moved = [b.trunc(b.add(register, up), v.of(I16)) for register in registers]
        pairs = [llvm.shuffle(b, moved[g], both, moved[g + 1]) for g in range(0, groups, 2)]
        low = b.trunc(b.add(self.low, up), v.of(I16))
        low = llvm.shuffle(b, low, both, low)
        with loop(b, I64(0), I64(PIECE), 1, pairs, unroll=False) as slot:
            x = v.at(words, b.mul(slot.index, I64(groups * VECTOR // 2)), I8)
            weight = b.bitcast(v.everywhere(v.get(own, slot.index, I32)), self.words)
            after = []
            for g, register in enumerate(slot.values):
                values = b.load(v.at(x, I64(VECTOR * g), I8), typ=self.words, align=1)
                function = llvm.declared(b, "llvm.sadd.sat.v32i16", self.words, [self.words] * 2)
                after.append(v.larger(b.call(function, [register, b.mul(values, weight)]), low))
            slot.carry(*after)
        halves = [llvm.shuffle(b, r, range(i, i + LANES)) for r in slot.values for i in (0, LANES)]
        return [b.sub(b.sext(half, v.integers), up) for half in halves]


def _dotted(b: ir.IRBuilder, kind: str, register: Any, x: Any, w: Any) -> Any:
    """The register plus the products of every lane's bytes or words."""
    lanes = register.type
    x, w = (value if value.type == lanes else b.bitcast(value, lanes) for value in (x, w))
    return b.call(llvm.declared(b, f"llvm.x86.avx512.vpdp{kind}.512", lanes, [lanes] * 3), [register, x, w])
