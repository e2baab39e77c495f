"""Registers that saturate where slots hold one signed product, as LLVM vector IR: slot by slot, in lanes of 16 bits.

Lanes are output pixels, 32 of them a column. A value is a part that is not negative less one that is, v = p - n, and
one of both is 0. So a slot adds two products, one up and one down, in either order, as one of them is 0; and where
every other slot has them in the other order, two neighbours' products up are next to each other, and then two
products down:

    down 0, up 0 and 1, down 1 and 2, up 2 and 3, down 3 and 4, ...

Both of a pair are added at once, as a sum of one sign meets one end of the register: an instruction multiplies and adds
two bytes by two (vpmaddubsw). Whether p or n is what a weight takes up is the weight's sign, so that pairs of values
lie in memory in all four ways. All products are below 0, where a word has room for two of -128 times 128; up they are
taken off.

A register's lower end is that of a word, which the instruction that adds then holds by itself; so is the upper one of a
register of 16 bits. Where those that multiply and that hold an end run on two of a processor's four pipes, both ends
are held by plain instructions in some columns, the light ones, so that all pipes are busy.

A register that saturates often forgets: whatever it was before, what follows leads to the same. No step changes the
order of two registers, so if the last slots lead from both ends to one number they do so from all between. They are
added from both ends first, on two paths until these meet in all lanes of a tile, and from the start only for output
channels where they never do.

Legend: n columns of 32 pixels, a tile; K slots' taps in their order, after one of zeros; steps, from one slot to the
next, in B blocks; O output channels. All distances are in bytes.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llvmlite import ir

from recoup.kernels import llvm
from recoup.kernels.llvm import I8, I16, I32, I64, P, Target, loop
from recoup.kernels.signature import Definition, Kernel, Signature
from recoup.kernels.vector import Vector
from recoup.nbsmt.emit_runs import LANES, VECTOR, planes_of, turn_of
from recoup.network.scales import SIGNED

COLUMN = 2 * LANES
"""Pixels of a column: words of a vector."""

AT_ONCE = 4
"""Steps that are written out, an even number: one goes down, the next one up."""

STEP = 8
"""Bytes of a step: two pairs of weights, and from the first of a step's pairs of values to the one that it takes."""

WORD = 16
"""Bits of a word. A register has as many, or fewer."""

SIGNS = 4
"""Ways that pairs of values lie in: up or down, up or down."""

FILL = Signature.of(size=I64, rows=P, words=P)
WALK = Signature.of(outputs=I64, size=I64, steps=P, words=P, sums=P, paths=P, begin=I32, half=I32)
SETTLE = Signature.of(outputs=I64, sums=P, paths=P)
OPENED = Signature.of(outputs=I64, paths=P, left=P)
NUMBERS = Signature.of(outputs=I64, sums=P, half=I32)
TILES = Signature.of(
    first=I64, last=I64, pixels=I64, x=P, base=P, near=P,
    channels=I64, taps=I64, outputs=I64, vectors=I64, blocks=I64, size=I64, tail=I64, steps=P,
    planes=P, words=P, sums=P, paths=P, left=P, out=P, row=I64, start=I32, half=I32,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Form:
    """What a kernel is specialised for.

    Attributes:
        columns: n.
        whole: whether the register has the 16 bits of a word; else at most 15.
        light: how many of the columns are.
        floats: the results are float32.
    """

    columns: int
    whole: bool
    light: int
    floats: bool

    def zero(self, column: int) -> int:
        """The distance from a register's lower end to what is 0 as a word in a column."""
        return 0 if column < self.light and not self.whole else 1 << (WORD - 1)


@lru_cache(32)
def tiles(form: Form, target: Target) -> Kernel:
    """The registers of output pixels after all slots, tiles ``first .. last`` of 32 n pixels each.

    Args:
        pixels: how many there are; a tile's beyond the last one repeat it, and are not kept.
        x: codes, of which whole vectors can be read. Those of pixel m, tap l begin at ``base[m] + near[l]``.
        base, near: int64.
        channels, taps, outputs: C, L and O.
        vectors: of output channels, whole ones.
        blocks, size: so many blocks of ``size`` steps, a multiple of `AT_ONCE`; more steps than slots, of which those
            beyond the last weigh 0.
        tail: the last blocks, which are added from both ends first; 0: none are.
        steps: [B, O, size], see `recoup.nbsmt.walked.steps`.
        planes: memory, [1 + B size, 32 n] codes, which are zero before the first slot and from the last one on.
        words, sums: memory: [size, 4, n, 32] pairs of bytes, int32 [vectors 16, n, 32].
        paths: memory, uint8 [O].
        left: int64, to which the number of output channels of a tile that ``tail`` did not settle is added.
        out: float32 or int32, [vectors 16] for each pixel, ``row`` apart.
        start: 0, what stands for it.
        half: 2^(bits - 1): a register's lower end, negated.
    """
    return Kernel(tiles_module(form), "tiles", TILES, target)


def tiles_module(form: Form) -> ir.Module:
    """Code of `tiles`."""
    module, groups = ir.Module("nbsmt"), 2 * form.columns
    planes, fill = planes_of(module, groups), _fill(module, form)
    single, both = _Walk(module, form, 1).d, _Walk(module, form, 2).d
    settle, opened = _settle(module, form), _opened(module)
    numbers, turn = _numbers(module, form), turn_of(module, groups, form.floats)
    d = TILES.define(module, "tiles")
    b, at = d.b, Vector(d.b, LANES).at
    wide = I64(groups * LANES)

    def added(first: Any, *walks: Definition) -> None:
        with loop(b, first, d["blocks"]) as block:
            fill.call(d, rows=at(d["planes"], b.mul(b.mul(block.index, d["size"]), wide), I8))
            own = b.mul(b.mul(block.index, d["outputs"]), d["size"])
            begin = b.zext(b.icmp_signed("==", block.index, first), I32)
            for walk in walks:
                walk.call(d, steps=at(d["steps"], b.mul(own, I64(STEP)), I8), begin=begin)
            if len(walks) > 1:
                settle.call(d)

    with loop(b, d["first"], d["last"]) as tile:
        done = b.mul(tile.index, wide)
        planes.call(d, planes=at(d["planes"], wide, I8), first=done)
        with loop(b, I64(0), d["outputs"]) as output:
            b.store(I8(2), at(d["paths"], output.index, I8))
        with b.if_then(b.icmp_signed(">", d["tail"], I64(0))):
            added(b.sub(d["blocks"], d["tail"]), single, both)
        before = b.load(d["left"], typ=I64)
        opened.call(d)
        with b.if_then(b.icmp_signed("!=", before, b.load(d["left"], typ=I64))):
            added(I64(0), single)
        numbers.call(d)
        turn.call(d, count=b.sub(d["pixels"], done), to=at(d["out"], b.mul(done, d["row"]), I8))
    b.ret_void()
    return module


def _fill(module: ir.Module, form: Form) -> Definition:
    """A block's pairs of values, [size, 4, n] vectors: of a step's slot and the next one, p and p, p n, n p, n n."""
    d = FILL.define(module, "fill")
    b, v, n = d.b, Vector(d.b, COLUMN), form.columns
    eight, nothing = v.constant(8, v.of(I16)), ir.Constant(v.of(I16), None)

    def parts(row: Any) -> tuple[Any, Any]:
        code = v.load(row, I64(0), kind=v.of(I8))
        value = b.sext(b.xor(code, v.constant(-SIGNED, v.of(I8))), v.of(I16))
        return v.larger(value, nothing), v.larger(b.neg(value), nothing)

    with loop(b, I64(0), d["size"]) as step:
        row = v.at(d["rows"], b.mul(step.index, I64(n * COLUMN)), I8)
        to = v.at(d["words"], b.mul(step.index, I64(SIGNS * n * VECTOR)), I8)
        for column in range(n):
            first, second = (parts(v.at(row, I64(COLUMN * place), I8)) for place in (column, column + n))
            pairs = [b.or_(one, b.shl(other, eight)) for one in first for other in second]
            for way, pair in enumerate(pairs):
                v.store(pair, to, I64(COLUMN * (way * n + column)))
    b.ret_void()
    return d


class _Walk:
    """All steps of a block one by one, output channel by output channel of those that are on so many ``paths``.

    ``sums``, words [O, 2, n, 32], keeps the registers from block to block; ``begin``: this one is the first. On two
    paths they begin at the lower end and at the upper one, on one at the number 0.
    """

    def __init__(self, module: ir.Module, form: Form, paths: int) -> None:
        self.form, self.d = form, WALK.define(module, f"walk_{paths}")
        self.b, self.v, d, n = self.d.b, Vector(self.d.b, COLUMN), self.d, form.columns
        b, v, self.kind = self.b, self.v, self.v.of(I16)
        high = b.sub(b.shl(d["half"], I32(1)), I32(1))
        self.high = [v.everywhere(b.trunc(b.sub(high, I32(form.zero(i))), I16)) for i in range(n)]
        starts = [
            [v.everywhere(b.trunc(b.sub(value, I32(form.zero(i))), I16)) for i in range(n)]
            for value in ((I32(0), high) if paths == 2 else (d["half"],))
        ]
        fresh = b.icmp_signed("!=", d["begin"], I32(0))
        with loop(b, I64(0), d["outputs"]) as output, _on(b, d["paths"], output.index, paths):
            sums = v.at(d["sums"], b.mul(output.index, I64(2 * VECTOR * n)), I8)
            own = v.at(d["steps"], b.mul(b.mul(output.index, d["size"]), I64(STEP)), I8)
            registers = [
                b.select(fresh, starts[i // n][i % n], v.load(sums, I64(COLUMN * i), kind=self.kind))
                for i in range(paths * n)
            ]
            with loop(b, I64(0), d["size"], AT_ONCE, registers, unroll=False) as step:
                after = step.values
                for i in range(AT_ONCE):
                    products = self._products(b.add(step.index, I64(i)), own)
                    moved = self._up if i % 2 else self._down
                    after = [moved(value, products[c % n], c % n) for c, value in enumerate(after)]
                step.carry(*after)
            for i, register in enumerate(step.values):
                v.store(register, sums, I64(COLUMN * i))
        b.ret_void()

    def _products(self, step: Any, own: Any) -> list[Any]:
        """What a step adds down, and takes off up, column by column."""
        b, v, n = self.b, self.v, self.form.columns
        at = v.at(own, b.mul(step, I64(STEP)), I8)
        bytes_of_pairs = ir.VectorType(I8, VECTOR)
        weight = b.bitcast(Vector(b, LANES).everywhere(v.get(at, I64(0), I32)), bytes_of_pairs)
        x = v.at(self.d["words"], b.add(b.mul(step, I64(SIGNS * n * VECTOR)), b.sext(v.get(at, I64(1), I32), I64)), I8)
        values = [b.load(v.at(x, I64(VECTOR * i), I8), typ=bytes_of_pairs, align=1) for i in range(n)]
        multiply = llvm.declared(b, "llvm.x86.avx512.pmaddubs.w.512", self.kind, [bytes_of_pairs] * 2)
        return [b.call(multiply, [value, weight]) for value in values]

    def _down(self, register: Any, product: Any, column: int) -> Any:
        """The register and a product, at least its lower end."""
        b, v = self.b, self.v
        if column >= self.form.light:
            return self._ended("sadd", register, product)
        if not self.form.whole:
            return v.larger(b.add(register, product), ir.Constant(self.kind, None))
        lowest = v.constant(-(1 << (WORD - 1)), self.kind)
        return b.add(v.larger(register, b.sub(lowest, product)), product)

    def _up(self, register: Any, product: Any, column: int) -> Any:
        """The register less a product, at most its upper end."""
        b, high = self.b, self.high[column]
        if self.form.whole:
            return self._ended("ssub", register, product)
        moved = b.sub(register, product)
        # Counted from 0 it may leave a word's positive numbers, not a word.
        compared = b.icmp_unsigned if column < self.form.light else b.icmp_signed
        return b.select(compared("<", moved, high), moved, high)

    def _ended(self, name: str, x: Any, y: Any) -> Any:
        """By the instruction that ends where a word does."""
        return self.b.call(llvm.declared(self.b, f"llvm.{name}.sat.v32i16", self.kind, [self.kind] * 2), [x, y])


def _on(b: ir.IRBuilder, paths: Any, output: Any, count: int) -> Any:
    """Where an output channel is on so many paths."""
    own = b.load(b.gep(paths, [output], source_etype=I8), typ=I8)
    return b.if_then(b.icmp_signed("==", own, I8(count)))


def _settle(module: ir.Module, form: Form) -> Definition:
    """Put output channels on one path whose two have met."""
    d = SETTLE.define(module, "settle")
    b, v, n = d.b, Vector(d.b, COLUMN), form.columns
    kind = v.of(I16)
    with loop(b, I64(0), d["outputs"]) as output, _on(b, d["paths"], output.index, 2):
        sums = v.at(d["sums"], b.mul(output.index, I64(2 * VECTOR * n)), I8)
        apart = ir.Constant(kind, None)
        for i in range(n):
            apart = b.or_(apart, b.xor(*(v.load(sums, I64(COLUMN * own), kind=kind) for own in (i, i + n))))
        differ = v.any(b.icmp_signed("!=", apart, ir.Constant(kind, None)))
        b.store(b.add(I8(1), b.zext(differ, I8)), v.at(d["paths"], output.index, I8))
    b.ret_void()
    return d


def _opened(module: ir.Module) -> Definition:
    """Put output channels on one path, from the start, that are on two still, which ``left`` counts, others on none."""
    d = OPENED.define(module, "opened")
    b, at = d.b, Vector(d.b, LANES).at
    with loop(b, I64(0), d["outputs"]) as output:
        own = at(d["paths"], output.index, I8)
        apart = b.icmp_signed("==", b.load(own, typ=I8), I8(2))
        b.store(b.zext(apart, I8), own)
        b.store(b.add(b.load(d["left"], typ=I64), b.zext(apart, I64)), d["left"])
    b.ret_void()
    return d


def _numbers(module: ir.Module, form: Form) -> Definition:
    """Registers, words, as numbers of 32 bits in their place."""
    d = NUMBERS.define(module, "numbers")
    b, v, n = d.b, Vector(d.b, COLUMN), form.columns
    zeros = [v.everywhere(b.sub(I32(form.zero(i)), d["half"])) for i in range(n)]
    with loop(b, I64(0), d["outputs"]) as output:
        sums = v.at(d["sums"], b.mul(output.index, I64(2 * VECTOR * n)), I8)
        numbers = [b.sext(v.load(sums, I64(COLUMN * i), kind=v.of(I16)), v.integers) for i in range(n)]
        for i, number in enumerate(numbers):
            v.store(b.add(number, zeros[i]), sums, I64(COLUMN * i))
    b.ret_void()
    return d
