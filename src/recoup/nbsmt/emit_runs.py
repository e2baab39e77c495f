"""Registers that saturate where slots hold one unsigned product, as LLVM vector IR: run by run of products of one sign.

Values are not negative, so that products have their weights' signs. While they keep one sign only one end of the
register is in reach, and clipping once after a run equals clipping after each of its products. Which products make a
run depends on the output channel alone: lanes are output pixels, and each output channel has a list of steps of its
own (`recoup.nbsmt.runs`): one window of four neighbouring slots, of which the run's have their weights and others 0.

Legend: G groups of 16 pixels, K slots' taps in their order, O output channels. A window starts at every second slot.
"""

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
"""Bytes of a vector of windows: four of each pixel."""

WINDOW, EVERY = 4, 2
"""Slots of a window, and from one window's first to the next one's."""

PLANES = Signature.of(
    first=I64, last=I64, x=P, base=P, near=P, taps=I64, channels=I64, pixels=I64, to=P, row=I64
)  # fmt: skip
WINDOWS = Signature.of(first=I64, last=I64, groups=I64, x=P, row=I64, to=P)
WALK = Signature.of(outputs=I64, steps=P, ends=P, x=P, sums=P, begin=I32, start=I32, low=I32)
TURN = Signature.of(groups=I64, vectors=I64, pixels=I64, sums=P, out=P, row=I64, start=I32)


@lru_cache(8)
def planes(target: Target) -> Kernel:
    """Values by slot: byte ``16 g + p`` of row ``c taps + l`` of ``to`` is pixel p's of group g, channel c at tap l.

    Args:
        first, last: groups; pixels beyond ``pixels`` repeat the last one.
        x: values, whole vectors of which can be read. Those of pixel m at tap l begin at ``base[m] + near[l]``.
        base, near: int64, bytes.
        row: bytes of a row.
    """
    return Kernel(planes_module(target), "planes", PLANES, target)


def planes_module(target: Target) -> ir.Module:
    """Code of `planes`."""
    module = ir.Module("nbsmt")
    d = PLANES.define(module, "planes")
    b, v = d.b, Vector(d.b, LANES)
    final = b.sub(d["pixels"], I64(1))
    with loop(b, d["first"], d["last"]) as group:
        starts, column = [], v.at(d["to"], b.mul(b.sub(group.index, d["first"]), I64(LANES)), I8)
        for p in range(LANES):
            pixel = b.add(b.mul(group.index, I64(LANES)), I64(p))
            pixel = b.select(b.icmp_signed("<", pixel, final), pixel, final)
            starts.append(v.at(d["x"], v.get(d["base"], pixel, I64), I8))
        with loop(b, I64(0), d["taps"]) as tap, loop(b, I64(0), d["channels"], LANES) as channel:
            place = b.add(v.get(d["near"], tap.index, I64), channel.index)
            rows = v.transposed([v.load(v.at(start, place, I8), I64(0), kind=v.of(I8)) for start in starts])
            for i, values in enumerate(rows):
                own = b.add(channel.index, I64(i))
                with b.if_then(b.icmp_signed("<", own, d["channels"])):
                    to = b.mul(b.add(b.mul(own, d["taps"]), tap.index), d["row"])
                    v.store(values, v.at(column, to, I8), I64(0))
    b.ret_void()
    return module


@lru_cache(8)
def windows(target: Target) -> Kernel:
    """Windows ``first .. last`` of the rows of `planes`: [windows, groups, 16 pixels, 4 slots] from ``to`` on."""
    return Kernel(windows_module(target), "windows", WINDOWS, target)


def windows_module(target: Target) -> ir.Module:
    """Code of `windows`."""
    module = ir.Module("nbsmt")
    d = WINDOWS.define(module, "windows")
    b, v = d.b, Vector(d.b, LANES)
    with loop(b, d["first"], d["last"]) as window, loop(b, I64(0), d["groups"]) as group:
        row = v.at(d["x"], b.mul(window.index, b.mul(d["row"], I64(EVERY))), I8)
        column = v.at(row, b.mul(group.index, I64(LANES)), I8)
        rows = [
            v.load(v.at(column, b.mul(d["row"], I64(i)), I8), I64(0), kind=v.of(I8)) for i in range(WINDOW)
        ]
        pairs = [llvm.shuffle(b, rows[i], range(2 * LANES), rows[i + 1]) for i in (0, 2)]
        order = [slot * LANES + lane for lane in range(LANES) for slot in range(WINDOW)]
        place = b.add(b.mul(b.sub(window.index, d["first"]), d["groups"]), group.index)
        v.store(llvm.shuffle(b, pairs[0], order, pairs[1]), v.at(d["to"], b.mul(place, I64(VECTOR)), I8), I64(0))
    b.ret_void()
    return module


@lru_cache(16)
def walk(groups: int, target: Target) -> Kernel:
    """register = clip(register + a step's products), step after step, for so many groups of pixels.

    The upper end of the registers is that of 32 bits, which the instruction that adds holds by itself.

    Args:
        outputs: O.
        steps: int32 [steps, 2]: bytes from ``x`` to a window, were there one group, and four weights.
        ends: int64 [O + 1]: where each output channel's steps begin, and where the last one's end.
        x: windows, as `windows` lays them out.
        sums: int32 [O, groups, 16], the registers, kept between calls.
        begin: whether these are the first slots.
        start: what stands for 0.
        low: the lower end, ``start`` included.
    """
    return Kernel(walk_module(groups, target), "walk", WALK, target)


def walk_module(groups: int, target: Target) -> ir.Module:
    """Code of `walk`."""
    module = ir.Module("nbsmt")
    d = WALK.define(module, "walk")
    b, v = d.b, Vector(d.b, LANES)
    low = v.everywhere(d["low"])
    fresh = b.icmp_signed("!=", d["begin"], I32(0))
    with loop(b, I64(0), d["outputs"]) as output:
        sums = v.at(d["sums"], b.mul(output.index, I64(VECTOR * groups)), I8)
        registers = _begun(d, v, sums, groups, fresh)
        first, last = (v.get(d["ends"], place, I64) for place in (output.index, b.add(output.index, I64(1))))
        with loop(b, first, last, 1, registers) as step:
            at = v.at(d["steps"], b.mul(step.index, I64(8)), I8)
            x = v.at(d["x"], b.mul(b.sext(v.get(at, I64(0), I32), I64), I64(groups)), I8)
            weights = v.everywhere(v.get(at, I64(1), I32))
            after = []
            for g, register in enumerate(step.values):
                values = b.load(v.at(x, I64(VECTOR * g), I8), typ=v.integers, align=1)
                after.append(v.larger(_added(d, register, values, weights), low))
            step.carry(*after)
        for g, register in enumerate(step.values):
            v.store(register, sums, I64(LANES * g))
    b.ret_void()
    return module


def _begun(d: Definition, v: Vector, sums: Any, groups: int, fresh: Any) -> list[Any]:
    """The registers. Where they begin nothing is read: new pages would be faulted in twice."""
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


def _added(d: Definition, register: Any, x: Any, w: Any) -> Any:
    """The register plus four products of every lane, no higher than 32 bits go."""
    kind = register.type
    function = llvm.declared(d.b, "llvm.x86.avx512.vpdpbusds.512", kind, [kind, kind, kind])
    return d.b.call(function, [register, x, w])


@lru_cache(8)
def turn(floats: bool, target: Target) -> Kernel:
    """Registers [16 vectors, groups, 16 pixels] as numbers, pixel by pixel, int32 or float32 [pixels, 16 vectors].

    Args:
        groups, vectors, pixels: how many; pixels beyond the last one are left out.
        sums: the registers.
        out: pixel m's numbers begin at ``out + m row``.
        start: what stands for 0.
    """
    return Kernel(turn_module(floats, target), "turn", TURN, target)


def turn_module(floats: bool, target: Target) -> ir.Module:
    """Code of `turn`."""
    module = ir.Module("nbsmt")
    d = TURN.define(module, "turn")
    b, v = d.b, Vector(d.b, LANES)
    size = b.mul(d["groups"], I64(VECTOR))
    with loop(b, I64(0), d["vectors"]) as vector, loop(b, I64(0), d["groups"]) as group:
        channel = v.at(d["sums"], b.mul(vector.index, b.mul(size, I64(LANES))), I8)
        channel = v.at(channel, b.mul(group.index, I64(VECTOR)), I8)
        rows = [v.load(v.at(channel, b.mul(size, I64(i)), I8), I64(0), kind=v.integers) for i in range(LANES)]
        for p, register in enumerate(v.transposed(rows)):
            pixel = b.add(b.mul(group.index, I64(LANES)), I64(p))
            with b.if_then(b.icmp_signed("<", pixel, d["pixels"])):
                number = b.sub(register, v.everywhere(d["start"]))
                number = v.bits(b.sitofp(number, v.vector)) if floats else number
                to = v.at(d["out"], b.mul(pixel, d["row"]), I8)
                v.store(number, to, b.mul(vector.index, I64(LANES)))
    b.ret_void()
    return module
