"""Registers that saturate where slots hold one signed product, as LLVM vector IR: slot by slot, in lanes of 16 bits.

Lanes are output pixels, 32 of them a column. A product and a clipped sum are few instructions, but those that multiply,
and add with an end, run on two of a processor's four pipes. So some columns of a tile are held so that they have more
of those, and others so that they have fewer, and all pipes are busy:

    held    multiply, add with both ends, which are those of 16 bits       2 of 2 on those pipes; small weights
    up      multiply, add with the upper end, moved up to theirs, larger   2 of 3
    middle  multiply, add, smaller, larger                                 1 of 4

A register that saturates often forgets: whatever it was before, what follows leads to the same. No step changes the
order of two registers, so if the last slots lead from both ends to one number they do so from all between. They are
added from both ends first, and from the start only for output channels where that is not so in all lanes of a tile.

Legend: n columns of 32 pixels, a tile; K slots' taps in their order, in B blocks; O output channels. All distances are
in bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llvmlite import ir

from recoup.kernels import llvm
from recoup.kernels.llvm import I1, I8, I16, I32, I64, P, Target, loop
from recoup.kernels.signature import Definition, Kernel, Signature
from recoup.kernels.vector import Vector
from recoup.nbsmt.emit_runs import LANES, VECTOR, planes_of, turn_of
from recoup.network.scales import SIGNED

COLUMN = 2 * LANES
"""Pixels of a column: words of a vector."""

AT_ONCE = 4
"""Slots that are written out."""

WEIGHT = 8
"""Bytes of a weight: two words for the first columns, two for the others."""

FILL = Signature.of(size=I64, rows=P, words=P)
WALK = Signature.of(
    outputs=I64, size=I64, weights=P, words=P, sums=P, open=P, begin=I32, low=I32, high=I32, up=I32, shift=I32
)  # fmt: skip
SETTLE = Signature.of(outputs=I64, sums=P, open=P, left=P)
NUMBERS = Signature.of(outputs=I64, sums=P, up=I32, shift=I32)
TILES = Signature.of(
    first=I64, last=I64, pixels=I64, x=P, base=P, near=P,
    channels=I64, taps=I64, outputs=I64, vectors=I64, blocks=I64, size=I64, tail=I64, weights=P,
    planes=P, words=P, sums=P, open=P, left=P, out=P, row=I64, start=I32,
    low=I32, high=I32, up=I32, shift=I32,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Form:
    """What a kernel is specialised for.

    Attributes:
        columns: n.
        first: how many of them are held, or up; the others are in the middle.
        held: whether it is both ends that these hold by themselves.
        floats: the results are float32.
    """

    columns: int
    first: int
    held: bool
    floats: bool


@lru_cache(32)
def tiles(form: Form, target: Target) -> Kernel:
    """The registers of output pixels after all slots, tiles ``first .. last`` of 32 n pixels each.

    Args:
        pixels: how many there are; a tile's beyond the last one repeat it, and are not kept.
        x: codes, of which whole vectors can be read. Those of pixel m, tap l begin at ``base[m] + near[l]``.
        base, near: int64.
        channels, taps, outputs: C, L and O.
        vectors: of output channels, whole ones.
        blocks, size: slots are added in so many blocks of ``size``, a multiple of `AT_ONCE`; weights beyond the last
            are 0.
        tail: the last blocks, which are added from both ends first; 0: none are.
        weights: int32 [B, O, size, 2]: two words of a weight times 2^shift, and two of the weight.
        planes: memory, [B size, 32 n] codes, which are zero from K on.
        words, sums: memory: int16 [size, n, 32], int32 [vectors 16, n, 32].
        open: memory, uint8 [O].
        left: int64, to which the number of output channels of a tile that ``tail`` did not settle is added.
        out: float32 or int32, [vectors 16] for each pixel, ``row`` apart.
        start: 0, what stands for it.
        low, high: the register's ends, of at most 15 bits.
        up, shift: what the first columns' registers have more, and then the power of two that they are taken times.
    """
    return Kernel(tiles_module(form), "tiles", TILES, target)


def tiles_module(form: Form) -> ir.Module:
    """Code of `tiles`."""
    module, groups = ir.Module("nbsmt"), 2 * form.columns
    planes, fill = planes_of(module, groups), _fill(module, form)
    single, both = _Walk(module, form, 1).d, _Walk(module, form, 2).d
    settle, numbers, turn = _settle(module, form), _numbers(module, form), turn_of(module, groups, form.floats)
    d = TILES.define(module, "tiles")
    b, at = d.b, Vector(d.b, LANES).at
    wide = I64(groups * LANES)

    def added(walk: Definition, first: Any) -> None:
        with loop(b, first, d["blocks"]) as block:
            fill.call(d, rows=at(d["planes"], b.mul(b.mul(block.index, d["size"]), wide), I8))
            own = b.mul(b.mul(block.index, d["outputs"]), d["size"])
            begin = b.zext(b.icmp_signed("==", block.index, first), I32)
            walk.call(d, weights=at(d["weights"], b.mul(own, I64(WEIGHT)), I8), begin=begin)

    with loop(b, d["first"], d["last"]) as tile:
        done = b.mul(tile.index, wide)
        planes.call(d, first=done)
        with loop(b, I64(0), d["outputs"]) as output:
            b.store(I8(1), at(d["open"], output.index, I8))
        before = b.load(d["left"], typ=I64)
        with b.if_else(b.icmp_signed(">", d["tail"], I64(0))) as (some, none):
            with some:
                added(both, b.sub(d["blocks"], d["tail"]))
                settle.call(d)
            with none:
                b.store(b.add(before, d["outputs"]), d["left"])
        with b.if_then(b.icmp_signed("!=", before, b.load(d["left"], typ=I64))):
            added(single, I64(0))
        numbers.call(d)
        turn.call(d, count=b.sub(d["pixels"], done), to=at(d["out"], b.mul(done, d["row"]), I8))
    b.ret_void()
    return module


def _fill(module: ir.Module, form: Form) -> Definition:
    """A block's rows of codes as values in words, [size, n] vectors."""
    d = FILL.define(module, "fill")
    b, v = d.b, Vector(d.b, COLUMN)
    with loop(b, I64(0), b.mul(d["size"], I64(form.columns))) as column:
        place = b.mul(column.index, I64(COLUMN))
        code = v.load(d["rows"], place, kind=v.of(I8))
        v.store(b.sext(b.xor(code, v.constant(-SIGNED, v.of(I8))), v.of(I16)), d["words"], place)
    b.ret_void()
    return d


class _Walk:
    """All slots of a block added one by one, output channel by output channel of those that are ``open``.

    ``sums``, words [O, 2, n, 32], keeps the registers from block to block; ``begin``: this one is the first. On two
    paths they begin at the lower end and at the upper one, on one at 0.
    """

    def __init__(self, module: ir.Module, form: Form, paths: int) -> None:
        self.form, self.d = form, WALK.define(module, f"walk_{paths}")
        self.b, self.v, d, n = self.d.b, Vector(self.d.b, COLUMN), self.d, form.columns
        b, v, self.kind = self.b, self.v, self.v.of(I16)
        self.low, self.high, self.low_up = (
            v.everywhere(b.trunc(value, I16)) for value in (d["low"], d["high"], b.add(d["low"], d["up"]))
        )
        starts = [self._started(value) for value in ((d["low"], d["high"]) if paths == 2 else (I32(0),))]
        fresh = b.icmp_signed("!=", d["begin"], I32(0))
        with loop(b, I64(0), d["outputs"]) as output, b.if_then(b.trunc(v.get(d["open"], output.index, I8), I1)):
            sums = v.at(d["sums"], b.mul(output.index, I64(2 * VECTOR * n)), I8)
            own = v.at(d["weights"], b.mul(b.mul(output.index, d["size"]), I64(WEIGHT)), I8)
            registers = [
                b.select(fresh, starts[i // n][i % n >= form.first], v.load(sums, I64(COLUMN * i), kind=self.kind))
                for i in range(paths * n)
            ]
            with loop(b, I64(0), d["size"], AT_ONCE, registers, unroll=False) as slot:
                after = slot.values
                for i in range(AT_ONCE):
                    after = self._stepped(after, b.add(slot.index, I64(i)), own)
                slot.carry(*after)
            for i, register in enumerate(slot.values):
                v.store(register, sums, I64(COLUMN * i))
        b.ret_void()

    def _started(self, value: Any) -> list[Any]:
        """A number as the first columns hold it, and as the others do, in all lanes."""
        b, d = self.b, self.d
        # At the upper end what is below the scale is as it is after saturating.
        below = b.sub(b.shl(I32(1), d["shift"]), I32(1))
        below = b.select(b.icmp_signed("==", value, d["high"]), below, I32(0))
        first = b.add(b.shl(b.add(value, d["up"]), d["shift"]), below)
        return [self.v.everywhere(b.trunc(number, I16)) for number in (first, value)]

    def _stepped(self, registers: Sequence[Any], slot: Any, own: Any) -> list[Any]:
        """The registers after a slot. Each kind of instruction for all of them, so that none waits for the one before
        it: what waits is in the way of what would find a pipe."""
        b, v, n, form = self.b, self.v, self.form.columns, self.form
        two = I64(2)
        weight = [
            b.bitcast(Vector(b, LANES).everywhere(v.get(own, b.add(b.mul(slot, two), I64(i)), I32)), self.kind)
            for i in range(2)
        ]
        x = v.at(self.d["words"], b.mul(slot, I64(VECTOR * n)), I8)
        values = [v.load(x, I64(COLUMN * column), kind=self.kind) for column in range(n)]
        products = together(b, [b.mul(value, weight[i >= form.first]) for i, value in enumerate(values)])
        add = llvm.declared(b, "llvm.sadd.sat.v32i16", self.kind, [self.kind] * 2)
        kinds = [i % n < form.first for i in range(len(registers))]
        pairs = [(register, products[i % n]) for i, register in enumerate(registers)]
        after = together(b, [b.call(add, p) if first else b.add(*p) for first, p in zip(kinds, pairs, strict=True)])
        after = together(b, [r if first else v.smaller(r, self.high) for first, r in zip(kinds, after, strict=True)])
        low = None if form.held else self.low_up
        ends = [low if first else self.low for first in kinds]
        return [r if end is None else v.larger(r, end) for end, r in zip(ends, after, strict=True)]


def together(b: ir.IRBuilder, values: Sequence[Any]) -> list[Any]:
    """The same vectors, all computed before anything that takes them: LLVM would put what takes one next to it."""
    if len(values) < 2:
        return list(values)
    kinds = [value.type for value in values]
    places = ",".join(["=v"] * len(kinds) + [str(i) for i in range(len(kinds))])
    result = ir.LiteralStructType(kinds)
    nothing = ir.InlineAsm(ir.FunctionType(result, kinds), "", places, side_effect=True)
    found = b.call(nothing, values)
    return [b.extract_value(found, i) for i in range(len(kinds))]


def _settle(module: ir.Module, form: Form) -> Definition:
    """Close output channels whose registers agree on both paths; ``left`` counts the others."""
    d = SETTLE.define(module, "settle")
    b, v, n = d.b, Vector(d.b, COLUMN), form.columns
    kind = v.of(I16)
    with loop(b, I64(0), d["outputs"]) as output:
        sums = v.at(d["sums"], b.mul(output.index, I64(2 * VECTOR * n)), I8)
        apart = ir.Constant(kind, None)
        for i in range(n):
            apart = b.or_(apart, b.xor(*(v.load(sums, I64(COLUMN * own), kind=kind) for own in (i, i + n))))
        differ = v.any(b.icmp_signed("!=", apart, ir.Constant(kind, None)))
        b.store(b.zext(differ, I8), v.at(d["open"], output.index, I8))
        b.store(b.add(b.load(d["left"], typ=I64), b.zext(differ, I64)), d["left"])
    b.ret_void()
    return d


def _numbers(module: ir.Module, form: Form) -> Definition:
    """Registers, words, as numbers of 32 bits in their place."""
    d = NUMBERS.define(module, "numbers")
    b, v, n = d.b, Vector(d.b, COLUMN), form.columns
    up, shift = (v.everywhere(d[name]) for name in ("up", "shift"))
    with loop(b, I64(0), d["outputs"]) as output:
        sums = v.at(d["sums"], b.mul(output.index, I64(2 * VECTOR * n)), I8)
        numbers = [b.sext(v.load(sums, I64(COLUMN * i), kind=v.of(I16)), v.integers) for i in range(n)]
        for i, number in enumerate(numbers):
            v.store(b.sub(b.ashr(number, shift), up) if i < form.first else number, sums, I64(COLUMN * i))
    b.ret_void()
    return d
