"""Triton kernels that convolve NB-SMT operands: signed 8-bit products, 32-bit sums, one rounding to float32.

A register that wraps holds the sum's lowest bits, so it is cut once. One that saturates is followed slot by slot, tap
by tap in each, on plain integer units: a matrix unit adds in an order of its own.

The activation operands come with their zero padding around them, so that every tap of every output pixel is a load
without a mask; ``offset_O`` puts back the 128 that they are stored less.

Shape suffixes: those of gpu_operands.py, and M output pixels.
"""


# Triton's language is typed for its own compiler:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from recoup.formats import Int
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.gpu_plan import Plan

GROUPED_PIXELS, GROUPED_OUTPUTS = 64, 64  # the block of a convolution in groups
SATURATING_PIXELS, SATURATING_OUTPUTS = 32, 32  # and of one whose registers saturate
SUM_BITS = 32  # of a register that nobody limits


@dataclass(frozen=True, slots=True)
class Tile:
    """A block of the convolution: output pixels, output channels, columns a step; warps and pipeline stages."""

    pixels: int
    outputs: int
    columns: int
    warps: int
    stages: int


def tile(rows: int, outputs: int, columns: int) -> Tile:
    """The block for ``rows`` output pixels: large enough to reuse operands, small enough to occupy a GPU.

    Any block gives the same bits; ``benchmarks/nbsmt_gpu.py --tiles`` measures the alternatives.
    """
    across = min(128, max(16, triton.next_power_of_2(outputs)))
    blocks = triton.cdiv(rows, 128) * triton.cdiv(outputs, across)
    down = 128 if blocks >= 256 else 64
    deep = min(128, max(32, triton.next_power_of_2(columns)))
    return Tile(down, across, deep, warps=8 if down * across > 128 * 64 else 4, stages=3)


def convolve(
    plan: Plan, operand_PK: Tensor, weight_OLK: Tensor, offset_O: Tensor, out: Tensor, *, block: Tile | None = None
) -> None:
    """Write what the registers hold after all products to ``out``, float32 [N, h, w, O].

    Args:
        plan: configuration and sizes.
        operand_PK: from `gpu_operands.activation_operands`; any part of the batch.
        weight_OLK, offset_O: from `gpu_operands.weight_operands`.
        out: contiguous, for the same part of the batch.
        block: another block than `tile` would choose.
    """
    outputs, taps, columns = weight_OLK.shape
    rows, geometry = out.shape[0] * plan.out[0] * plan.out[1], plan.geometry
    sizes = (*plan.padded, *plan.out, *geometry.stride, *geometry.dilation, taps, plan.weight[3])
    arguments = (operand_PK, weight_OLK, offset_O, out, rows, outputs, operand_PK.shape[-1], *sizes)
    register = plan.register
    if register is not None and plan.saturates:
        dealt = plan.weight_columns
        _saturate(register, plan.zero, arguments, (columns, dealt.width, dealt.slots), geometry.groups, plan.weight[1])
        return
    bits = SUM_BITS if register is None else register.bits
    if geometry.groups > 1:
        across = min(GROUPED_OUTPUTS, triton.next_power_of_2(outputs))
        grid = (triton.cdiv(rows, GROUPED_PIXELS) * triton.cdiv(outputs, across),)
        each = (columns, plan.weight[1], outputs // geometry.groups)
        blocks = {"BLOCK_M": GROUPED_PIXELS, "BLOCK_O": across}
        _grouped_kernel[grid](*arguments, *each, BITS=bits, **blocks, enable_fp_fusion=False)
        return
    block = block or tile(rows, outputs, columns)
    _convolution_kernel[(triton.cdiv(rows, block.pixels) * triton.cdiv(outputs, block.outputs),)](
        *arguments,
        EVEN=columns % block.columns == 0,
        BITS=bits,
        BLOCK_M=block.pixels,
        BLOCK_O=block.outputs,
        BLOCK_K=block.columns,
        num_warps=block.warps,
        num_stages=block.stages,
        enable_fp_fusion=False,
    )


@triton.jit
def _block(rows, outputs, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr):
    """The output pixels and channels of this program: neighbours share their pixels, the larger operand."""
    tiles = tl.cdiv(outputs, BLOCK_O)
    m = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = (tl.program_id(0) % tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    return m, o, (m < rows)[:, None] & (o < outputs)[None, :]


@triton.jit
def _wrapped(sums, BITS: tl.constexpr):
    """The lowest bits of int32 sums, as two's complement."""
    if BITS < 32:
        sums = (sums << (32 - BITS)) >> (32 - BITS)
    return sums


@triton.jit
def _first_pixel(m, out_h, out_w, stride_h, stride_w, padded_h, padded_w):
    """Where the first tap of output pixel m lies among the padded input's pixels."""
    n, within = m // (out_h * out_w), m % (out_h * out_w)
    return (n * padded_h + (within // out_w) * stride_h).to(tl.int64) * padded_w + (within % out_w) * stride_w


@triton.jit(do_not_specialize=[
    "rows", "padded_h", "padded_w", "out_h", "out_w", "stride_h", "stride_w", "dilation_h", "dilation_w", "taps",
    "kernel_w",
])  # fmt: skip
def _convolution_kernel(
    operand_PK, weight_OLK, offset_O, out_MO,
    rows, outputs, columns, padded_h, padded_w, out_h, out_w, stride_h, stride_w, dilation_h, dilation_w, taps,
    kernel_w,
    EVEN: tl.constexpr, BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of sums as an implicit matrix product over taps and columns.

    Beyond the last pixel or channel a block repeats it and stores nothing, so that only columns need a mask, and they
    only where they are no multiple of BLOCK_K (not EVEN). There both operands are 0.
    """
    m, o, inside = _block(rows, outputs, BLOCK_M, BLOCK_O)
    k = tl.arange(0, BLOCK_K)
    pixel = _first_pixel(tl.minimum(m, rows - 1), out_h, out_w, stride_h, stride_w, padded_h, padded_w)
    a_MK = operand_PK + pixel[:, None] * columns + k[None, :]
    b_KO = weight_OLK + tl.minimum(o, outputs - 1).to(tl.int64)[None, :] * (taps * columns) + k[:, None]
    sums = tl.zeros([BLOCK_M, BLOCK_O], tl.int32)
    steps = tl.cdiv(columns, BLOCK_K)
    # One loop rather than two, so that loads are pipelined across taps.
    for step in range(taps * steps):
        tap, first = step // steps, (step % steps) * BLOCK_K
        near = (tap // kernel_w * dilation_h).to(tl.int64) * padded_w + (tap % kernel_w) * dilation_w
        a_at, b_at = a_MK + (near * columns + first), b_KO + (tap * columns + first)
        if EVEN:
            a, b = tl.load(a_at), tl.load(b_at)
        else:
            left = columns - first
            a, b = tl.load(a_at, mask=k[None, :] < left, other=0), tl.load(b_at, mask=k[:, None] < left, other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    sums = _wrapped(sums + tl.load(offset_O + o, mask=o < outputs, other=0)[None, :], BITS)
    tl.store(out_MO + m.to(tl.int64)[:, None] * outputs + o[None, :], sums.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=[
    "rows", "padded_h", "padded_w", "out_h", "out_w", "stride_h", "stride_w", "dilation_h", "dilation_w", "taps",
    "kernel_w", "inputs_each", "outputs_each",
])  # fmt: skip
def _grouped_kernel(
    operand_PK, weight_OLK, offset_O, out_MO,
    rows, outputs, columns, padded_h, padded_w, out_h, out_w, stride_h, stride_w, dilation_h, dilation_w, taps,
    kernel_w, weight_columns, inputs_each, outputs_each,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """A block of sums of a convolution in groups, on one thread: a group's few inputs would not fill a matrix unit."""
    m, o, inside = _block(rows, outputs, BLOCK_M, BLOCK_O)
    o = tl.minimum(o, outputs - 1)
    pixel = _first_pixel(tl.minimum(m, rows - 1), out_h, out_w, stride_h, stride_w, padded_h, padded_w)
    a_MO = operand_PK + pixel[:, None] * columns + (o // outputs_each * inputs_each)[None, :]
    b_O = weight_OLK + o.to(tl.int64) * (taps * weight_columns)
    sums = tl.zeros([BLOCK_M, BLOCK_O], tl.int32) + tl.load(offset_O + o)[None, :]
    for step in range(taps * inputs_each):
        tap, c = step // inputs_each, step % inputs_each
        near = (tap // kernel_w * dilation_h).to(tl.int64) * padded_w + (tap % kernel_w) * dilation_w
        a, b = tl.load(a_MO + (near * columns + c)), tl.load(b_O + (tap * weight_columns + c))
        sums += a.to(tl.int32) * b.to(tl.int32)[None, :]
    sums = _wrapped(sums, BITS)
    tl.store(out_MO + m.to(tl.int64)[:, None] * outputs + o[None, :], sums.to(tl.float32), mask=inside)


def saturated_products(
    a_MJ: Tensor, b_NJ: Tensor, zero: int, config: NBSMT, slots: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What saturating registers hold after every slot, [M, N].

    Args:
        a_MJ: activation operands [M, J] as whole numbers, all groups side by side, in `reference.merge_threads`' order.
        b_NJ: weight operands int8 [N, J], on the same device.
        zero: of the activation codes.
        config: with the accumulator.
        slots: of a thread.
        dtype: float32, rounded once, or int32.
    """
    assert config.accumulator is not None
    (M, J), N = a_MJ.shape, len(b_NJ)
    stored = (a_MJ - (128 - zero)).to(torch.int8)
    if config.pairing == "adjacent":
        stored, b_NJ = (v.unflatten(1, (-1, slots, config.threads)).mT.flatten(1) for v in (stored, b_NJ))
    out = torch.empty(M, N, dtype=dtype, device=a_MJ.device)
    pixel = (1, 1, 1, 1, 1, 1, 1, 1, 1, 1)  # an image of one pixel, a kernel of one tap
    with torch.cuda.device_of(a_MJ):
        arguments = (stored.contiguous(), b_NJ.contiguous(), None, out, M, N, J, *pixel)
        _saturate(config.accumulator, zero, arguments, (J, slots, slots), 1, 1)
    return out


def _saturate(
    register: Int, zero: int, arguments: tuple, columns: tuple[int, int, int], groups: int, inputs: int
) -> None:
    """Launch `_saturating_kernel`; ``columns``: of the weights, of a thread with padding, of a thread."""
    operand_PK, weight_OLK, _, *rest = arguments
    rows, outputs = rest[1], rest[2]
    grid = triton.cdiv(rows, SATURATING_PIXELS) * triton.cdiv(outputs, SATURATING_OUTPUTS)
    total, width, slots = columns
    _saturating_kernel[(grid,)](
        *(operand_PK, weight_OLK, *rest, total, width, slots, total // width, inputs, outputs // groups),
        LESS=128 - zero,
        BITS=register.bits,
        GROUPED=groups > 1,
        BLOCK_M=SATURATING_PIXELS,
        BLOCK_O=SATURATING_OUTPUTS,
        enable_fp_fusion=False,
    )


@triton.jit(do_not_specialize=[
    "rows", "padded_h", "padded_w", "out_h", "out_w", "stride_h", "stride_w", "dilation_h", "dilation_w", "taps",
    "kernel_w", "slots", "parts", "inputs_each", "outputs_each",
])  # fmt: skip
def _saturating_kernel(
    operand_PK, weight_OLK, out_MO,
    rows, outputs, columns, padded_h, padded_w, out_h, out_w, stride_h, stride_w, dilation_h, dilation_w, taps,
    kernel_w, weight_columns, width, slots, parts, inputs_each, outputs_each,
    LESS: tl.constexpr, BITS: tl.constexpr, GROUPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """A block of registers, which saturate after every slot and tap. ``parts``: a slot's operands, of all groups and
    threads, ``width`` columns apart."""
    m, o, inside = _block(rows, outputs, BLOCK_M, BLOCK_O)
    o = tl.minimum(o, outputs - 1)
    pixel = _first_pixel(tl.minimum(m, rows - 1), out_h, out_w, stride_h, stride_w, padded_h, padded_w)
    a_MO = operand_PK + pixel[:, None] * columns
    if GROUPED:
        a_MO = a_MO + (o // outputs_each * inputs_each)[None, :]
    b_O = weight_OLK + o.to(tl.int64) * (taps * weight_columns)
    number = tl.int64 if BITS > 30 else tl.int32  # a slot's products are below 2^18
    top = tl.full([], (1 << (BITS - 1)) - 1, number)
    sums = tl.zeros([BLOCK_M, BLOCK_O], number)
    for step in range(slots * taps):
        slot, tap = step // taps, step % taps
        near = (tap // kernel_w * dilation_h).to(tl.int64) * padded_w + (tap % kernel_w) * dilation_w
        products = tl.zeros([BLOCK_M, BLOCK_O], tl.int32)
        for part in range(parts):
            a = tl.load(a_MO + (near * columns + part * width + slot)).to(tl.int32) + LESS
            products += a * tl.load(b_O + (tap * weight_columns + part * width + slot)).to(tl.int32)[None, :]
        sums = tl.minimum(tl.maximum(sums + products, -top - 1), top)
    place = out_MO + m.to(tl.int64)[:, None] * outputs + o[None, :]
    tl.store(place, sums.to(out_MO.dtype.element_ty), mask=inside)
