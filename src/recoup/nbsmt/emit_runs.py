"""Registers that saturate where slots hold one unsigned product, as LLVM vector IR: run by run of products of one sign.

Values are not negative, so that products have their weights' signs. While they keep one sign only one end of the
register is in reach, and clipping once after a run equals clipping after each of its products. Which products make a
run depends on the output channel alone: lanes are output pixels, and each output channel has a list of steps of its
own (`recoup.nbsmt.runs`): one window of four neighbouring slots, of which the run's have their weights and others 0.

Legend: G groups of 16 pixels, a tile; C channels, L taps, K = C L slots' taps in their order; O output channels. All
distances are in bytes.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from llvmlite import ir

from recoup.kernels import llvm
from recoup.kernels.llvm import I8, I32, I64, P, Target, loop
from recoup.kernels.signature import Definition, Kernel, Signature
from recoup.kernels.vector import Vector

LANES = 16
"""Pixels of a vector."""

VECTOR = 64
"""Bytes of a vector of windows: four of each pixel; and of registers."""

WINDOW, EVERY = 4, 2
"""Slots of a window, and from one window's first to the next one's."""

STEP, AT_ONCE = 8, 8
"""Bytes of a step, and how many are written out: fewer turns of the loop, the last of which is foreseen more often."""

PLANES = Signature.of(first=I64, x=P, base=P, near=P, taps=I64, channels=I64, pixels=I64, planes=P)
WINDOWS = Signature.of(count=I64, rows=P, windows=P)
WALK = Signature.of(outputs=I64, steps=P, ends=P, windows=P, sums=P, begin=I32, start=I32, low=I32)
TURN = Signature.of(vectors=I64, count=I64, sums=P, to=P, row=I64, start=I32)
TILES = Signature.of(
    first=I64, last=I64, pixels=I64, x=P, base=P, near=P,
    channels=I64, taps=I64, outputs=I64, vectors=I64, blocks=I64, size=I64, steps=P, ends=P,
    planes=P, windows=P, sums=P, out=P, row=I64, start=I32, low=I32,
)  # fmt: skip


@lru_cache(32)
def tiles(groups: int, floats: bool, target: Target) -> Kernel:
    """The registers of output pixels after all slots, tiles ``first .. last`` of 16 G pixels each.

    Args:
        pixels: how many there are; a tile's beyond the last one repeat it, and are not kept.
        x: values, of which whole vectors can be read. Those of pixel m, tap l begin at ``base[m] + near[l]``.
        base, near: int64.
        channels, taps, outputs: C, L and O.
        vectors: of output channels, whole ones.
        blocks, size: slots are added in so many blocks of ``size``, an even number; the last may have fewer.
        steps: int32 [steps, 2]: from a block's first window to a step's, were G 1, and four weights.
        ends: int64 [blocks, O + 1]: where the steps of a block's output channels begin, and where the last one's end.
        planes, windows, sums: memory: [K + 4, 16 G] bytes, [size / 2, G] vectors, int32 [vectors 16, G 16].
        out: float32 (``floats``) or int32, [vectors 16] for each pixel, ``row`` apart.
        start: what stands for 0: the register's upper end is that of 32 bits, which the instruction that adds holds.
        low: the lower end, ``start`` included.
    """
    return Kernel(tiles_module(groups, floats), "tiles", TILES, target)


def tiles_module(groups: int, floats: bool) -> ir.Module:
    """Code of `tiles`."""
    module = ir.Module("nbsmt")
    planes, windows = planes_of(module, groups), _windows(module, groups)
    walk, turn = _walk(module, groups), turn_of(module, groups, floats)
    d = TILES.define(module, "tiles")
    b, at = d.b, Vector(d.b, LANES).at
    slots, wide = b.mul(d["channels"], d["taps"]), I64(groups * LANES)
    with loop(b, d["first"], d["last"]) as tile:
        done = b.mul(tile.index, wide)
        planes.call(d, first=done)
        with loop(b, I64(0), d["blocks"]) as block:
            first = b.mul(block.index, d["size"])
            left = b.sub(slots, first)
            count = b.select(b.icmp_signed("<", left, d["size"]), left, d["size"])
            count = b.sdiv(b.add(count, I64(EVERY - 1)), I64(EVERY))
            windows.call(d, count=count, rows=at(d["planes"], b.mul(first, wide), I8))
            ends = b.mul(block.index, b.add(d["outputs"], I64(1)))
            begin = b.zext(b.icmp_signed("==", block.index, I64(0)), I32)
            walk.call(d, ends=at(d["ends"], ends, I64), begin=begin)
        turn.call(d, count=b.sub(d["pixels"], done), to=at(d["out"], b.mul(done, d["row"]), I8))
    b.ret_void()
    return module


def planes_of(module: ir.Module, groups: int) -> Definition:
    """Values slot by slot: row ``c L + l`` of ``planes`` holds channel c at tap l of the pixels from ``first`` on."""
    d = PLANES.define(module, "planes_of")
    b, v = d.b, Vector(d.b, LANES)
    final = b.sub(d["pixels"], I64(1))
    with loop(b, I64(0), I64(groups)) as group:
        column, starts = b.mul(group.index, I64(LANES)), []
        for p in range(LANES):
            pixel = b.add(b.add(d["first"], column), I64(p))
            pixel = b.select(b.icmp_signed("<", pixel, final), pixel, final)
            starts.append(v.at(d["x"], v.get(d["base"], pixel, I64), I8))
        with loop(b, I64(0), d["taps"]) as tap, loop(b, I64(0), d["channels"], LANES) as channel:
            place = b.add(v.get(d["near"], tap.index, I64), channel.index)
            rows = v.transposed([v.load(v.at(start, place, I8), I64(0), kind=v.of(I8)) for start in starts])
            for i, values in enumerate(rows):
                own = b.add(channel.index, I64(i))
                with b.if_then(b.icmp_signed("<", own, d["channels"])):
                    row = b.add(b.mul(own, d["taps"]), tap.index)
                    v.store(values, v.at(d["planes"], b.mul(row, I64(groups * LANES)), I8), column)
    b.ret_void()
    return d


def _windows(module: ir.Module, groups: int) -> Definition:
    """Windows of four rows each: vectors [count, G] of ``windows``, [16 pixels, 4 slots]."""
    d = WINDOWS.define(module, "windows_of")
    b, v = d.b, Vector(d.b, LANES)
    order = [slot * LANES + lane for lane in range(LANES) for slot in range(WINDOW)]
    with loop(b, I64(0), d["count"]) as window:
        row = v.at(d["rows"], b.mul(window.index, I64(EVERY * groups * LANES)), I8)
        to = v.at(d["windows"], b.mul(window.index, I64(groups * VECTOR)), I8)
        for group in range(groups):
            places = [I64((slot * groups + group) * LANES) for slot in range(WINDOW)]
            rows = [b.load(v.at(row, place, I8), typ=v.of(I8), align=1) for place in places]
            pairs = [llvm.shuffle(b, rows[i], range(2 * LANES), rows[i + 1]) for i in (0, 2)]
            v.store(llvm.shuffle(b, pairs[0], order, pairs[1]), v.at(to, I64(group * VECTOR), I8), I64(0))
    b.ret_void()
    return d


def _walk(module: ir.Module, groups: int) -> Definition:
    """register = clip(register + a step's products), step after step of a block, output channel by output channel.

    ``sums``, int32 [O, G, 16], keeps the registers from block to block; ``begin``: this one is the first.
    """
    d = WALK.define(module, "walk")
    b, v = d.b, Vector(d.b, LANES)
    low, fresh = v.everywhere(d["low"]), b.icmp_signed("!=", d["begin"], I32(0))
    with loop(b, I64(0), d["outputs"]) as output:
        sums = v.at(d["sums"], b.mul(output.index, I64(VECTOR * groups)), I8)
        registers = _begun(d, v, sums, groups, fresh)
        first, last = (v.get(d["ends"], place, I64) for place in (output.index, b.add(output.index, I64(1))))
        whole = b.add(first, b.and_(b.sub(last, first), I64(-AT_ONCE)))
        with loop(b, first, whole, AT_ONCE, registers, unroll=False) as step:
            for i in range(AT_ONCE):
                registers = _stepped(d, v, b.add(step.index, I64(i)), step.values if i == 0 else registers, low)
            step.carry(*registers)
        with loop(b, whole, last, 1, step.values, unroll=False) as step:
            step.carry(*_stepped(d, v, step.index, step.values, low))
        for g, register in enumerate(step.values):
            v.store(register, sums, I64(LANES * g))
    b.ret_void()
    return d


def _begun(d: Definition, v: Vector, sums: Any, groups: int, fresh: Any) -> list[Any]:
    """The registers, of which there are none to read where they begin."""
    b, start = d.b, v.everywhere(d["start"])
    with b.if_else(fresh) as (first, later):
        with first:
            begun = b.block
        with later:
            kept = [v.load(sums, I64(LANES * g), kind=v.integers) for g in range(groups)]
            going_on = b.block
    registers = []
    for value in kept:
        register = b.phi(v.integers)
        register.add_incoming(start, begun)
        register.add_incoming(value, going_on)
        registers.append(register)
    return registers


def _stepped(d: Definition, v: Vector, step: Any, registers: Sequence[Any], low: Any) -> list[Any]:
    """The registers after one step."""
    b, at = d.b, v.at(d["steps"], d.b.mul(step, I64(STEP)), I8)
    x = v.at(d["windows"], b.mul(b.sext(v.get(at, I64(0), I32), I64), I64(len(registers))), I8)
    weights = v.everywhere(v.get(at, I64(1), I32))
    after = []
    for g, register in enumerate(registers):
        values = b.load(v.at(x, I64(VECTOR * g), I8), typ=v.integers, align=1)
        after.append(v.larger(_added(d, register, values, weights), low))
    return after


def _added(d: Definition, register: Any, x: Any, w: Any) -> Any:
    """The register plus four products of every lane, no higher than 32 bits go."""
    kind = register.type
    function = llvm.declared(d.b, "llvm.x86.avx512.vpdpbusds.512", kind, [kind, kind, kind])
    return d.b.call(function, [register, x, w])


def turn_of(module: ir.Module, groups: int, floats: bool) -> Definition:
    """Registers [vectors 16, G, 16 pixels] as numbers, pixel by pixel, of the first ``count`` pixels."""
    d = TURN.define(module, "turn")
    b, v = d.b, Vector(d.b, LANES)
    with loop(b, I64(0), d["vectors"]) as vector, loop(b, I64(0), I64(groups)) as group:
        place = b.add(b.mul(vector.index, I64(LANES * groups)), group.index)
        channel = v.at(d["sums"], b.mul(place, I64(VECTOR)), I8)
        places = [I64(i * groups * LANES) for i in range(LANES)]
        for p, register in enumerate(v.transposed([v.load(channel, i, kind=v.integers) for i in places])):
            pixel = b.add(b.mul(group.index, I64(LANES)), I64(p))
            with b.if_then(b.icmp_signed("<", pixel, d["count"])):
                number = b.sub(register, v.everywhere(d["start"]))
                number = v.bits(b.sitofp(number, v.vector)) if floats else number
                v.store(number, v.at(d["to"], b.mul(pixel, d["row"]), I8), b.mul(vector.index, I64(LANES)))
    b.ret_void()
    return d
