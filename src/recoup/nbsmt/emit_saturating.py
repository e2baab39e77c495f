"""Registers that saturate, slot by slot, as LLVM vector IR: a tile of output pixels by output channels in registers.

Lanes are output channels. A slot's products are four, or a multiple of it, and one instruction multiplies four bytes by
four bytes and adds all to the register (vpdpbusd), which is then clipped; or one or two, of words. Of four threads up
to 64 products meet in a slot, but at most eight of an output channel weigh anything: lanes choose the values of these
among the slot's (vpermb), which leaves two instructions of sixteen that multiply. Words have room:
values and weights are taken times powers of two, so that the register's ends are those of 32 bits, and the instruction
that adds saturates by itself (vpdpwssds). What stays below the scale when it does is cut off at the end. Where there is
no room, a register moved up to the end of 32 bits still has that end for nothing.

Legend: K steps, a slot's at one tap of the kernel each, Q quads of products of one, 16 lanes. A vector of weights is
64 bytes: [16] lanes of four bytes, or of a pair of words. A tile is `Form.pixels` pixels by `Form.blocks` vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from llvmlite import ir
from torch import Tensor

from recoup.kernels import llvm
from recoup.kernels.llvm import I8, I16, I32, I64, P, Target, loop
from recoup.kernels.signature import Kernel, Signature
from recoup.kernels.vector import Vector

LANES = 16
"""Output channels of a vector."""

VECTOR = 64
"""Bytes of a vector of weights."""

NEAR = 8
"""Values that lanes of several groups choose theirs from, 16 bytes: 16 lanes of at least two a group are of so many."""

SUMS = Signature.of(
    first=I64, last=I64, steps=I64, quads=I64,
    x=P, base=P, near=P, quad_step=I64, lanes=P,
    weight=P, correction=P,
    out=P, row=I64, begin=I32, end=I32, start=I32, low=I32, high=I32, shift=I32,
)  # fmt: skip

Sharing = Literal["all", "few", "none"]
"""Lanes that share a value: all of them; those of a group of the convolution, of at least two lanes; none."""


Ends = Literal["both", "upper", "none"]
"""The ends of the register that the instruction which adds holds by itself, as they are those of 32 bits."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a kernel is specialised for.

    Attributes:
        words: the operands are words, one pair a slot; else quads of bytes.
        sharing: which lanes have the same values; `blocks` is 1 unless all have.
        pixels, blocks: of a tile.
        ends: which of the register's are held without being asked for; "upper" where Q is 1 and nothing is corrected.
        many: Q is not 1.
        corrected: every slot adds its ``correction``.
        floats: the results are float32.
        chosen: quads of values that lanes choose among a slot's, which lie side by side; 0: they have them all.
    """

    words: bool
    sharing: Sharing
    pixels: int
    blocks: int
    ends: Ends
    many: bool
    corrected: bool
    floats: bool
    chosen: int = 0


def choice(near_L: Tensor) -> Tensor:
    """Which bytes every lane takes, uint8 [16, 4], of 16: a word, and what meets weights of zero."""
    zero = torch.full_like(near_L, 128)
    return torch.stack([2 * near_L, 2 * near_L + 1, zero, zero], 1).to(torch.uint8)


def scaled(bits: int, products: int, zero: int, target: Target) -> tuple[int, int] | None:
    """Powers of two that values and weights are multiplied by, for a register of so many bits to saturate as one of 32.

    None: they have no room for it, or the processor has no such instruction. Weights take 2^8 (-128 * 256 fits 16
    bits), signed values (``zero`` is not 0) as much, unsigned ones 2^7 (255 * 128 does): a register of 16 bits or more,
    or of 17.
    """
    missing, most = 32 - bits, 8 if zero else 7
    if products > 2 or missing > most + 8 or "avx512vnni" not in target.features:
        return None
    return min(missing, most), max(missing - most, 0)


def started(bits: int, ends: Ends) -> dict[str, int]:
    """A register's ``start``, ``low`` and ``high``: where the upper end alone is held, all moves up to it."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    start = (1 << 31) - 1 - high if ends == "upper" else 0
    return {"start": start, "low": low + start, "high": high + start}


@lru_cache(64)
def saturating(form: Form, target: Target) -> Kernel:
    """register = clip(register + a slot's products), for output pixels ``first .. last`` and ``steps`` steps.

    Args (all distances are in bytes):
        x: values. Those of output pixel m, step k, quad q lie at ``base[m] + near[k] + q quad_step``; a whole vector
            can be read there where lanes choose.
        base, near: int64 [M], int64 [K].
        lanes: uint8 [16, 4], see `choice`, where few lanes share a value.
        weight: [K, Q, blocks] vectors; where lanes choose [K, Q, blocks, 2], of weights and of which values they meet.
        correction: int32 [K, blocks, 16].
        out: int32 or float32; of pixel m at ``out + m row``. It keeps the registers between calls.
        begin, end: whether these are the first slots, and the last.
        start: what stands for 0, from `started`.
        low, high: the register's ends, those that are not held, ``start`` included.
        shift: the powers of `scaled`, which the result is divided by.
    """
    return Kernel(saturating_module(form, target), "sums", SUMS, target)


def saturating_module(form: Form, target: Target) -> ir.Module:
    """Code of `saturating`."""
    module = ir.Module("nbsmt")
    _Sums(module, form, target).write()
    return module


class _Sums:
    def __init__(self, module: ir.Module, form: Form, target: Target) -> None:
        self.d = SUMS.define(module, "sums")
        self.b, self.form, self.target = self.d.b, form, target
        self.v = Vector(self.b, LANES)
        self.bytes, self.words = ir.VectorType(I8, 4 * LANES), ir.VectorType(I16, 2 * LANES)
        self.low, self.high = (self.v.everywhere(self.d[name]) for name in ("low", "high"))
        lanes = form.sharing == "few" and "avx2" in target.features
        self.lanes = self.v.load(self.d["lanes"], I64(0), kind=self.bytes) if lanes else None

    def write(self) -> None:
        b, d, form = self.b, self.d, self.form
        final = b.sub(d["last"], I64(1))
        with loop(b, d["first"], d["last"], form.pixels) as turn:
            # Beyond the last pixel it is done again, with the same result: all are read before any is written.
            places = [b.add(turn.index, I64(i)) for i in range(form.pixels)]
            places = [b.select(b.icmp_signed("<", place, final), place, final) for place in places]
            starts = [self.v.at(d["x"], self.v.get(d["base"], place, I64), I8) for place in places]
            rows = [self.v.at(d["out"], b.mul(place, d["row"]), I8) for place in places]
            for row, registers in zip(rows, self._tile(starts, self._begun(rows)), strict=True):
                for i, register in enumerate(registers):
                    self.v.store(self._ended(register), row, I64(LANES * i))
        b.ret_void()

    def _begun(self, rows: list[Any]) -> list[Any]:
        """The registers, pixel by pixel. Where they begin nothing is read: new pages would be faulted in twice."""
        b, start = self.b, self.v.everywhere(self.d["start"])
        with b.if_else(b.icmp_signed("!=", self.d["begin"], I32(0))) as (first, later):
            with first:
                begun = b.block
            with later:
                kept = [
                    self.v.load(row, I64(LANES * i), kind=self.v.integers)
                    for row in rows
                    for i in range(self.form.blocks)
                ]
                going_on = b.block
        registers = []
        for value in kept:
            register = b.phi(self.v.integers)
            register.add_incoming(start, begun)
            register.add_incoming(value, going_on)
            registers.append(register)
        return registers

    def _ended(self, register: Any) -> Any:
        b, result = self.b, register
        if self.form.ends == "both":
            result = b.ashr(result, self.v.everywhere(self.d["shift"]))
        elif self.form.ends == "upper":
            result = b.sub(result, self.v.everywhere(self.d["start"]))
        if self.form.floats:
            result = self.v.bits(b.sitofp(result, self.v.vector))
        last = self.v.everywhere(b.icmp_signed("!=", self.d["end"], I32(0)))
        return b.select(last, result, register)

    def _tile(self, starts: list[Any], registers: list[Any]) -> list[list[Any]]:
        """All steps."""
        b, d, form = self.b, self.d, self.form
        size = b.mul(d["quads"], I64(VECTOR * form.blocks * (2 if form.chosen else 1)))
        with loop(b, I64(0), d["steps"], 1, registers, unroll=False) as step:
            at = self.v.get(d["near"], step.index, I64)
            weight = self.v.at(d["weight"], b.mul(step.index, size), I8)
            step.carry(*self._slot(step.values, starts, at, weight, step.index))
        found = step.values
        return [found[i : i + form.blocks] for i in range(0, len(found), form.blocks)]

    def _slot(self, registers: Sequence[Any], starts: list[Any], at: Any, weight: Any, step: Any) -> list[Any]:
        """The registers after a slot."""
        b, d, form, v = self.b, self.d, self.form, self.v
        if form.corrected:
            all_lanes = b.mul(step, I64(LANES * form.blocks))
            parts = [
                v.load(d["correction"], b.add(all_lanes, I64(LANES * i)), kind=v.integers) for i in range(form.blocks)
            ]
            registers = [b.add(register, parts[i % form.blocks]) for i, register in enumerate(registers)]
        if form.chosen:
            registers = self._chosen(registers, starts, at, weight)
        elif form.many:
            with loop(b, I64(0), d["quads"], 1, registers, unroll=False) as quad:
                there = b.add(at, b.mul(quad.index, d["quad_step"]))
                own = v.at(weight, b.mul(quad.index, I64(VECTOR * form.blocks)), I8)
                quad.carry(*self._products(quad.values, starts, there, own))
            registers = quad.values
        else:
            registers = self._products(registers, starts, at, weight)
        return [self._clipped(register) for register in registers]

    def _products(self, registers: Sequence[Any], starts: list[Any], at: Any, weight: Any) -> list[Any]:
        """Four products, or two, added to every register."""
        form = self.form
        weights = [self._operand(self.v.load(weight, I64(LANES * i), kind=self.v.integers)) for i in range(form.blocks)]
        out = []
        for p, start in enumerate(starts):
            x = self._operand(self._values(self.v.at(start, at, I8)), unsigned=True)
            out += [self._added(registers[p * form.blocks + i], x, w) for i, w in enumerate(weights)]
        return out

    def _chosen(self, registers: Sequence[Any], starts: list[Any], at: Any, weight: Any) -> list[Any]:
        """All quads added to every register, of values that each lane chooses among the slot's."""
        form, v = self.form, self.v
        many = range(form.chosen * form.blocks)
        weights = [v.load(weight, I64(2 * LANES * i), kind=v.integers) for i in many]
        choices = [v.load(weight, I64(2 * VECTOR * i + VECTOR), kind=self.bytes) for i in many]
        out = list(registers)
        for p, start in enumerate(starts):
            x = v.load(v.at(start, at, I8), I64(0), kind=self.bytes)
            for i in many:
                own = self.b.bitcast(
                    self._call("llvm.x86.avx512.permvar.qi.512", self.bytes, x, choices[i]), v.integers
                )
                place = p * form.blocks + i % form.blocks
                out[place] = self._added(out[place], [own], [weights[i]])
        return out

    def _values(self, address: Any) -> Any:
        """What every lane multiplies, int32 [16] of four bytes or two words, of which a weight of zero may hide one."""
        b, form = self.b, self.form
        if form.sharing == "all":
            return self.v.everywhere(b.load(address, typ=I32, align=1))
        if form.sharing == "none":
            return b.zext(b.load(address, typ=ir.VectorType(I16, LANES), align=2), self.v.integers)
        if self.lanes is None:
            value = ir.Constant(self.v.integers, ir.Undefined)
            for lane in range(LANES):
                offset = b.zext(self.v.get(self.d["lanes"], I64(4 * lane), I8), I64)
                word = b.load(self.v.at(address, offset, I8), typ=I16, align=2)
                value = b.insert_element(value, b.zext(word, I32), I32(lane))
            return value
        size = VECTOR // 4
        near = b.load(address, typ=ir.VectorType(I8, size), align=2)
        if "avx512vbmi" in self.target.features:
            near = llvm.shuffle(b, near, [*range(size)] + [size] * (VECTOR - size))
            chosen = self._call("llvm.x86.avx512.permvar.qi.512", self.bytes, near, self.lanes)
            return b.bitcast(chosen, self.v.integers)
        # Older shuffles of bytes stay within 16 of them, which are repeated.
        near = llvm.shuffle(b, near, [*range(size)] * 4)
        if "avx512bw" in self.target.features:
            return b.bitcast(self._call("llvm.x86.avx512.pshuf.b.512", self.bytes, near, self.lanes), self.v.integers)
        half = ir.VectorType(I8, VECTOR // 2)
        pieces = [[llvm.shuffle(b, v, range(i, i + half.count)) for v in (near, self.lanes)] for i in (0, half.count)]
        halves = [self._call("llvm.x86.avx2.pshuf.b", half, *piece) for piece in pieces]
        return b.bitcast(llvm.shuffle(b, halves[0], range(VECTOR), halves[1]), self.v.integers)

    def _operand(self, value: Any, unsigned: bool = False) -> list[Any]:
        """int32 [16] as what `_added` takes: itself, or pairs of words."""
        b = self.b
        if "avx512vnni" in self.target.features:
            return [value]
        value = b.bitcast(value, self.words)
        if self.form.words:
            return [value]
        eight = ir.Constant(self.words, [8] * 2 * LANES)
        shift = b.lshr if unsigned else b.ashr
        return [shift(b.shl(value, eight), eight), shift(value, eight)]

    def _added(self, register: Any, x: list[Any], w: list[Any]) -> Any:
        """The register plus the products of every lane's bytes or words."""
        if "avx512vnni" in self.target.features:
            kind = ("wssd" if self.form.words else "busd") + ("" if self.form.ends == "none" else "s")
            return self._call(f"llvm.x86.avx512.vpdp{kind}.512", self.v.integers, register, x[0], w[0])
        for pair in zip(x, w, strict=True):
            register = self.b.add(register, self._multiplied(*pair))
        return register

    def _multiplied(self, x: Any, w: Any) -> Any:
        """The products of pairs of words, each pair's added: int32 [16]."""
        b = self.b
        if "avx512bw" in self.target.features:
            return self._call("llvm.x86.avx512.pmaddw.d.512", self.v.integers, x, w)
        if "avx2" in self.target.features:
            halves = [[llvm.shuffle(b, v, range(i, i + LANES)) for v in (x, w)] for i in (0, LANES)]
            parts = [self._call("llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, LANES // 2), *half) for half in halves]
            return llvm.shuffle(b, parts[0], range(LANES), parts[1])
        ends = [[b.sext(llvm.shuffle(b, v, range(i, 2 * LANES, 2)), self.v.integers) for v in (x, w)] for i in range(2)]
        even, odd = (b.mul(value, weight) for value, weight in ends)
        return b.add(even, odd)

    def _clipped(self, register: Any) -> Any:
        if self.form.ends == "both":
            return register
        register = self.v.larger(register, self.low)
        return register if self.form.ends == "upper" else self.v.smaller(register, self.high)

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        return self.b.call(llvm.declared(self.b, name, result, [v.type for v in arguments]), arguments)
