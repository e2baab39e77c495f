"""Sums in a register that saturates, slot by slot: the emitted kernel, in vector code.

Where a sum saturates depends on the order of its parts, so no matrix product gives it. A slot's products are those of
`recoup.nbsmt.groups`, of values: T threads times G groups, pairs of 16 bits that one instruction multiplies and adds.

Lanes are output channels, which share a pixel's values. Where a group of the convolution has too few of them, as in
depthwise ones, lanes are channels of several groups instead, each with ``own`` values, laid out beside each other.

Legend: S slots, L the kernel's taps, V = G * T products of a slot in pairs (padded to even), M output pixels, O output
channels in blocks of 16.
"""

import ctypes
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from llvmlite import ir
from torch import Tensor

from recoup.kernels import llvm
from recoup.kernels.llvm import I16, I32, I64
from recoup.kernels.threads import over_rows
from recoup.nbsmt import reference
from recoup.nbsmt.config import NBSMT
from recoup.network.convolution import Geometry

LANES, PIXELS = 16, 4
"""Output channels and output pixels at a time."""

FEW = 4
"""Output channels of a group up to which lanes have values of their own: they are copied for each of them."""

WORK = 1 << 16
"""Products that pay for one more thread."""

_TYPES = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 5 + [ctypes.c_int32] * 2


class Saturating:
    """A weight operand laid out for `saturating`.

    Args:
        weight_OGJkk: int8 [O, G * J, kh, kw], see `recoup.nbsmt.weights.WeightOperand`.
        config: threads and pairing say which channels a slot holds; its accumulator saturates.
        groups: G, the operands side by side.
    """

    def __init__(self, weight_OGJkk: Tensor, config: NBSMT, groups: int) -> None:
        self.config, self.groups = config, groups
        self.outputs = weight_OGJkk.shape[0]
        w_OGTSkk = reference.split_threads(weight_OGJkk.unflatten(1, (groups, -1)), config, 2)
        w_OSLV = _even(w_OGTSkk.flatten(4).permute(0, 3, 4, 1, 2).flatten(3))
        self.slots, self.taps, self.products = w_OSLV.shape[1:]
        self._weight = w_OSLV
        self._blocks: dict[tuple[int, int], Tensor] = {}

    def blocks(self, first: int, last: int) -> Tensor:
        """The weights of some output channels: int16 [blocks, S, L, V / 2, 16, 2]; laid out at the first call."""
        if (first, last) not in self._blocks:
            part = self._weight[first:last]
            part = F.pad(part, (0, 0, 0, 0, 0, 0, 0, -len(part) % LANES)).to(torch.int16)
            laid = part.unflatten(3, (-1, 2)).unflatten(0, (-1, LANES)).permute(0, 2, 3, 4, 1, 5)
            self._blocks[first, last] = laid.contiguous()
        return self._blocks[first, last]

    def __call__(self, operand: Tensor, geometry: Geometry, *, target: llvm.Target | None = None) -> Tensor:
        """The registers after all slots: int32 [N, O, h, w], channels_last.

        Args:
            operand: int16 values [N, H, W, G * Cp], as `recoup.nbsmt.operand.operands` lays them out.
            geometry: of the convolution.
            target: another processor to generate code for, to test its form of the kernel.
        """
        N, H, W = operand.shape[:3]
        x_NHWGTS = reference.split_threads(operand.unflatten(3, (self.groups, -1)), self.config, 4)
        x_NHWSV = x_NHWGTS.movedim(5, 3).flatten(4)
        own = geometry.groups > 1 and self.outputs // geometry.groups <= FEW
        top, left = geometry.padding
        x = self._own(x_NHWSV, geometry) if own else F.pad(_even(x_NHWSV).flatten(3), (0, 0, left, left, top, top))
        x = x.contiguous()
        pixel = x.shape[3:].numel()
        width = W + 2 * left
        down, across = geometry.outputs((H, W))
        image = torch.arange(N)[:, None, None] * ((H + 2 * top) * width)
        row = torch.arange(down)[:, None] * (geometry.stride[0] * width)
        base_M = ((image + row + torch.arange(across) * geometry.stride[1]) * pixel).flatten()
        kernel_row = torch.arange(geometry.kernel[0])[:, None] * (geometry.dilation[0] * width)
        near_L = ((kernel_row + torch.arange(geometry.kernel[1]) * geometry.dilation[1]) * pixel).flatten()
        groups = 1 if own else geometry.groups
        parts = [self._part(x, base_M, near_L, (g, groups), own, target) for g in range(groups)]
        out_MO = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return out_MO.view(N, down, across, self.outputs).permute(0, 3, 1, 2)

    def _own(self, x_NHWSV: Tensor, geometry: Geometry) -> Tensor:
        """Every lane's own values, in padded images: [N, H, W, blocks, S, V / 2, 16, 2]."""
        N, H, W, _, V = x_NHWSV.shape
        (top, left), lanes = geometry.padding, self.outputs + -self.outputs % LANES
        # One copy for lanes, pairs and borders: beside the little that depthwise convolutions compute it is much.
        x = x_NHWSV.new_zeros(N, H + 2 * top, W + 2 * left, lanes, self.slots, self.products)
        each = self.outputs // geometry.groups
        inside = x[:, top : top + H, left : left + W, : self.outputs, :, :V].unflatten(3, (-1, each))
        inside.copy_(x_NHWSV.unflatten(3, (geometry.groups, 1, -1)))
        return x.unflatten(5, (-1, 2)).unflatten(3, (-1, LANES)).permute(0, 1, 2, 3, 5, 6, 4, 7)

    def _part(
        self,
        x: Tensor,
        base_M: Tensor,
        near_L: Tensor,
        part: tuple[int, int],
        own: bool,
        target: llvm.Target | None,
    ) -> Tensor:
        """The output channels of one group of the convolution, of so many, int32 [M, O / groups]."""
        g, groups = part
        each = self.outputs // groups
        weight = self.blocks(g * each, (g + 1) * each)
        out = torch.empty(len(base_M), len(weight) * LANES, dtype=torch.int32)
        register = self.config.accumulator
        assert register is not None
        ends = -(1 << (register.bits - 1)), (1 << (register.bits - 1)) - 1
        kernel = saturating(self.products // 2, target, own)
        addresses = (x.data_ptr() + 2 * g * self.slots * self.products, base_M.data_ptr(), near_L.data_ptr())
        sizes = (len(weight), self.slots, self.taps)

        def rows(first: int, last: int) -> None:
            kernel(*addresses, weight.data_ptr(), out.data_ptr(), first, last, *sizes, *ends)

        if out.numel():
            over_rows(rows, len(base_M), weight.numel(), WORK)
        return out[:, :each]


def _even(v: Tensor) -> Tensor:
    """The last dimension zero-padded to whole pairs."""
    return F.pad(v, (0, v.shape[-1] % 2))


@lru_cache(64)
def saturating(pairs: int, target: llvm.Target | None = None, own: bool = False) -> llvm.Native:
    """``saturating(x, base, near, weight, out, first, last, blocks, S, L, low, high)``; see `saturating_module`."""
    return llvm.Native(saturating_module(pairs, target or llvm.host(), own), "saturating", None, _TYPES, target)


def saturating_module(pairs: int, target: llvm.Target, own: bool = False) -> ir.Module:
    """Code for output pixels ``first .. last``: register = clip(register + a slot's products, low, high), per slot.

    x int16 holds a slot's V values of a pixel side by side, ``base`` int64 [M] where the first tap of an output pixel
    lies, ``near`` int64 [L] how far the others are; ``weight`` int16 [blocks, S, L, V / 2, 16, 2]; out int32.
    ``own``: a pixel's values are int16 [blocks, S, V / 2, 16, 2], those of every lane.
    """
    names = ("x", "base", "near", "weight", "out")
    types = (I16, I64, I64, I16, I32)
    arguments: dict[str, Any] = {name: kind.as_pointer() for name, kind in zip(names, types, strict=True)}
    arguments |= dict.fromkeys(("first", "last", "blocks", "S", "L"), I64) | dict.fromkeys(("low", "high"), I32)
    module, b, arg = llvm.function("saturating", llvm.VOID, arguments)
    low, high = (llvm.splat(b, arg[name], LANES) for name in ("low", "high"))
    steps, final = b.mul(arg["S"], arg["L"]), b.sub(arg["last"], I64(1))
    with llvm.loop(b, arg["first"], arg["last"], PIXELS) as turn:
        # Beyond the last pixel it is done again, with the same result.
        places = [b.add(turn.index, I64(i)) for i in range(PIXELS)]
        places = [b.select(b.icmp_signed("<", place, arg["last"]), place, final) for place in places]
        starts = [b.load(b.gep(arg["base"], [place])) for place in places]
        with llvm.loop(b, I64(0), arg["blocks"]) as block:
            weight = b.gep(arg["weight"], [b.mul(b.mul(block.index, steps), I64(pairs * 2 * LANES))])
            empty = ir.Constant(ir.VectorType(I32, LANES), None)
            with llvm.loop(b, I64(0), arg["S"], 1, [empty] * PIXELS) as slot:
                with llvm.loop(b, I64(0), arg["L"], 1, slot.values) as tap:
                    first = b.add(b.mul(block.index, arg["S"]), slot.index) if own else slot.index
                    each = 2 * pairs * (LANES if own else 1)
                    at = b.add(b.mul(first, I64(each)), b.load(b.gep(arg["near"], [tap.index])))
                    here = b.gep(weight, [b.mul(_step(b, slot, tap, arg["L"]), I64(pairs * 2 * LANES))])
                    sums = _products(b, target, arg["x"], [b.add(start, at) for start in starts], here, pairs, own)
                    tap.carry(*(_clipped(b, b.add(a, s), low, high) for a, s in zip(tap.values, sums, strict=True)))
                slot.carry(*tap.values)
            for place, register in zip(places, slot.values, strict=True):
                row = b.add(b.mul(place, arg["blocks"]), block.index)
                to = b.gep(arg["out"], [b.mul(row, I64(LANES))])
                b.store(register, b.bitcast(to, register.type.as_pointer()), align=4)
    b.ret_void()
    return module


def _step(b: ir.IRBuilder, slot: llvm.Loop, tap: llvm.Loop, taps: Any) -> Any:
    return b.add(b.mul(slot.index, taps), tap.index)


def _products(
    b: ir.IRBuilder, target: llvm.Target, x: Any, starts: list[Any], weight: Any, pairs: int, own: bool
) -> list[Any]:
    """The sum of a slot's products for every pixel: int32 [16] each."""
    sums: list[Any] = [None] * len(starts)
    kind = ir.VectorType(I16, 2 * LANES).as_pointer()
    for pair in range(pairs):
        w = b.load(b.bitcast(b.gep(weight, [I64(pair * 2 * LANES)]), kind), align=2)
        for i, start in enumerate(starts):
            at = b.add(start, I64(2 * pair * (LANES if own else 1)))
            address = b.bitcast(b.gep(x, [at]), kind if own else I32.as_pointer())
            product = _multiplied(b, target, b.load(address, align=2), w)
            sums[i] = product if sums[i] is None else b.add(sums[i], product)
    return sums


def _multiplied(b: ir.IRBuilder, target: llvm.Target, both: Any, w: Any) -> Any:
    """A pair of values (two int16 in an int32), or 16, times 16 pairs of weights, each pair's products added."""
    if not isinstance(both.type, ir.VectorType):
        both = b.bitcast(llvm.splat(b, both, LANES), w.type)
    if "avx512bw" in target.features:
        return _madd(b, "llvm.x86.avx512.pmaddw.d.512", both, w)
    if "avx2" in target.features:
        halves = [[llvm.shuffle(b, v, range(i * LANES, (i + 1) * LANES)) for v in (both, w)] for i in range(2)]
        parts = [_madd(b, "llvm.x86.avx2.pmadd.wd", *half) for half in halves]
        return llvm.shuffle(b, parts[0], range(LANES), parts[1])
    wide = ir.VectorType(I32, LANES)
    ends = [[b.sext(llvm.shuffle(b, v, range(i, 2 * LANES, 2)), wide) for v in (both, w)] for i in range(2)]
    even, odd = (b.mul(value, weight) for value, weight in ends)
    return b.add(even, odd)


def _madd(b: ir.IRBuilder, name: str, both: Any, w: Any) -> Any:
    result = ir.VectorType(I32, w.type.count // 2)
    return b.call(llvm.declared(b, name, result, [w.type, w.type]), [both, w])


def _clipped(b: ir.IRBuilder, v: Any, low: Any, high: Any) -> Any:
    v = b.select(b.icmp_signed(">", v, low), v, low)
    return b.select(b.icmp_signed("<", v, high), v, high)
