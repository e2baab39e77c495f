"""Triton kernels from float weights and activations to the operands of every NB-SMT group.

What a group takes of a code depends on the code and on its *case*; a group is a *table* of 2 bits a case, known when
the kernel is compiled (`recoup.nbsmt.gpu_plan.tables`). The codes of a slot's threads travel packed in one 32-bit
number. Unsigned activation operands are stored less 128, signed ones as they are: the GPU's 8-bit products are signed
on both sides.

Everything but the divisions is whole numbers, and those are IEEE's (``/`` would be an approximation), so that blocks
and layouts never change a bit.

Shape suffixes: O output channels, L the kernel's taps, K = G * T * V columns: G groups, then T threads, then V slots (S
slots and padding; T * V is a multiple of 16); P pixels of the input with its zero padding around it.
"""


# Triton's language is typed for its own compiler:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from recoup.nbsmt.faults import BAD_WEIGHT, NEGATIVE, NOT_FINITE
from recoup.nbsmt.gpu_plan import Plan, tables

_NEGATIVE, _NOT_FINITE, _BAD_WEIGHT = tl.constexpr(NEGATIVE), tl.constexpr(NOT_FINITE), tl.constexpr(BAD_WEIGHT)
_ONES = tl.constexpr(0x55555555)  # a 1 in every case of a table

WEIGHT_BLOCK = 512  # slots and taps at a time
ACTIVATION_BLOCK = 2048  # slots times pixels at a time


def weight_operands(plan: Plan, weight: Tensor, order: Tensor | None, faults: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Operands int8 [O, L, K], what their sums need int32 [O], and the scales float32 [O] of weight [O, I, kh, kw].

    What they need is what activations are stored less, 128 or 0, times the sum of the operands.
    """
    columns = plan.weight_columns
    outputs = weight.shape[0]
    operand_OLK = weight.new_empty(outputs, plan.taps, columns.total, dtype=torch.int8)
    offset_O, scale_O = weight.new_empty(outputs, dtype=torch.int32), weight.new_empty(outputs)
    _weight_kernel[(outputs,)](
        *(weight, weight if order is None else order, operand_OLK, offset_O, scale_O, faults),
        *(*weight.stride(), columns.channels, columns.slots, columns.width, plan.taps, weight.shape[3]),
        **columns.constants(tables(plan.config)[1], order is not None),
        LESS=128 - plan.zero,
        BLOCK=WEIGHT_BLOCK,
        enable_fp_fusion=False,
    )
    return operand_OLK, offset_O, scale_O


def activation_operands(plan: Plan, x: Tensor, order: Tensor | None, scale: float, faults: Tensor) -> Tensor:
    """Operands int8 [N, H + padding, W + padding, K], unsigned less 128, of float32 x [N, C, H, W]; sets ``faults``."""
    columns = plan.activation_columns
    operand_PK = x.new_empty(x.shape[0], *plan.padded, columns.total, dtype=torch.int8)
    pixels = x.shape[0] * plan.padded[0] * plan.padded[1]
    block_s = min(64, triton.next_power_of_2(columns.width))
    block_p = ACTIVATION_BLOCK // block_s
    _activation_kernel[(triton.cdiv(pixels, block_p), triton.cdiv(columns.width, block_s))](
        *(x, x if order is None else order, operand_PK, faults, *x.stride(), scale),
        *(*x.shape[2:], *plan.geometry.padding, *plan.padded, pixels, columns.channels, columns.slots, columns.width),
        **columns.constants(tables(plan.config)[0], order is not None),
        **columns.port(plan.zero),
        BLOCK_S=block_s,
        BLOCK_P=block_p,
        enable_fp_fusion=False,
    )
    return operand_PK


@triton.jit
def _channel(
    t: tl.constexpr, s, slots, channels, order, ADJACENT: tl.constexpr, THREADS: tl.constexpr, ORDERED: tl.constexpr
):
    """The channel that thread t has in slot s, and whether there is one."""
    c = s * THREADS + t if ADJACENT else t * slots + s
    known = (s < slots) & (c < channels)
    if ORDERED:
        c = tl.load(order + c, mask=known, other=0)
    return c.to(tl.int64), known


@triton.jit
def _reduced(v, KEEP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr, ROUNDING: tl.constexpr):
    """r or q of values: step * clip(round(v / step), LOW, HIGH), step 2^SHIFT; with KEEP only outside LOW .. HIGH."""
    step: tl.constexpr = 1 << SHIFT
    if ROUNDING == "nearest":
        steps = (v + (step // 2 - 1) + ((v >> SHIFT) & 1)) >> SHIFT
    elif ROUNDING == "half_up":
        steps = (v + step // 2) >> SHIFT
    else:
        steps = (v + tl.where(v < 0, step - 1, 0)) >> SHIFT
    r = tl.minimum(tl.maximum(steps, LOW), HIGH) * step
    if KEEP:
        r = tl.where((v < LOW) | (v > HIGH), r, v)
    return r


@triton.jit
def _shift(v, active, t, THREADS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Where thread t's code v finds its 2 bits in a table; bit i of ``active``: thread i's code is not zero."""
    partners = ((active | (active << THREADS)) >> (t + 1)) & ((1 << (THREADS - 1)) - 1)
    return (partners << 2) | tl.where((v < LOW) | (v > HIGH), 2, 0)


@triton.jit
def _choose(v, r, shift, TABLE: tl.constexpr):
    """A group's operand: 0, v, r or r - v where the table says 0, 1, 2 or 3. What it never says is not compiled."""
    if _ONES == TABLE:
        chosen = v
    else:
        bits = TABLE >> shift
        one, two = (bits & 1) != 0, (bits & 2) != 0
        if _ONES & (TABLE >> 1) == 0:
            chosen = tl.where(one, v, 0)
        elif _ONES & TABLE == 0:
            chosen = tl.where(two, r, 0)
        elif _ONES & TABLE & (TABLE >> 1) == 0:
            chosen = tl.where(one, v, tl.where(two, r, 0))
        else:
            chosen = tl.where(two, r, 0) + tl.where(one, tl.where(two, -v, v), 0)
    return chosen


@triton.jit
def _weight_kernel(
    weight, order, operand_OLK, offset_O, scale_O, faults,
    stride_o, stride_i, stride_y, stride_x, channels, slots, width, taps, kernel_w,
    TABLES: tl.constexpr, GROUPS: tl.constexpr, THREADS: tl.constexpr, ADJACENT: tl.constexpr, ORDERED: tl.constexpr,
    KEEP: tl.constexpr, ROUNDING: tl.constexpr, LESS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One output channel: scale = 2 max|w| / 255, code = clip(round(w / scale), -128, 127), the groups' operands."""
    o = tl.program_id(0)
    row = weight + o.to(tl.int64) * stride_o
    lanes = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    finite = tl.full([BLOCK], 1, tl.int32)
    for start in range(0, taps * width, BLOCK):
        tap, s = (start + lanes) // width, (start + lanes) % width
        place = (tap // kernel_w) * stride_y + (tap % kernel_w) * stride_x
        for t in tl.static_range(THREADS):
            c, known = _channel(t, s, slots, channels, order, ADJACENT, THREADS, ORDERED)
            magnitude = tl.abs(tl.load(row + c * stride_i + place, mask=known & (tap < taps), other=0.0))
            finite = tl.where(magnitude < float("inf"), finite, 0)
            largest = tl.maximum(largest, magnitude)
    if tl.min(finite) == 0:
        tl.atomic_or(faults, _BAD_WEIGHT)
    top = tl.max(largest)
    scale = tl.where(top > 0, tl.maximum(tl.div_rn(2 * top, 255.0), 1.1754943508222875e-38), 1.0)
    tl.store(scale_O + o, scale)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, taps * width, BLOCK):
        tap, s = (start + lanes) // width, (start + lanes) % width
        place = (tap // kernel_w) * stride_y + (tap % kernel_w) * stride_x
        packed = tl.zeros([BLOCK], tl.int32)
        active = tl.zeros([BLOCK], tl.int32)
        for t in tl.static_range(THREADS):
            c, known = _channel(t, s, slots, channels, order, ADJACENT, THREADS, ORDERED)
            w = tl.load(row + c * stride_i + place, mask=known & (tap < taps), other=0.0)
            quotient = tl.minimum(tl.maximum(tl.div_rn(w, scale), -128.0), 127.0)
            # A float's last place at 1.5 * 2^23 is 1: the sum rounds half to even, and its low byte is the code.
            code = (quotient + 12582912.0).to(tl.int32, bitcast=True) & 255
            packed |= code << (8 * t)
            active |= tl.where(code != 0, 1 << t, 0)
        columns = operand_OLK + (o.to(tl.int64) * taps + tap) * (GROUPS * THREADS * width) + s
        # A loop at run time: unrolled, four threads and sixteen groups take many seconds to compile.
        for t in range(THREADS):
            v = (packed << (24 - 8 * t)) >> 24
            q = _reduced(v, KEEP, -8, 7, 4, ROUNDING)
            shift = _shift(v, active, t, THREADS, -8, 7)
            for g in tl.static_range(GROUPS):
                operand = _choose(v, q, shift, TABLES[g])
                total += operand
                tl.store(columns + (g * THREADS + t) * width, operand.to(tl.int8), mask=tap < taps)
    tl.store(offset_O + o, tl.sum(total) * LESS)


@triton.jit(do_not_specialize=["height", "width_in", "top", "left", "padded_h", "padded_w", "pixels"])
def _activation_kernel(
    x, order, operand_PK, faults,
    stride_n, stride_c, stride_y, stride_x, scale, height, width_in, top, left, padded_h, padded_w, pixels,
    channels, slots, width,
    TABLES: tl.constexpr, GROUPS: tl.constexpr, THREADS: tl.constexpr, ADJACENT: tl.constexpr, ORDERED: tl.constexpr,
    KEEP: tl.constexpr, ROUNDING: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr,
    ZERO: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A block of slots and pixels: value = clip(round(x / scale), -ZERO, 255 - ZERO), ties to even; operands of it.

    Slots come first: where strides say nothing (NCHW, permuted channels) the GPU's lanes then run along the pixels.
    """
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    n, within = p // (padded_h * padded_w), p % (padded_h * padded_w)
    i, j = within // padded_w - top, within % padded_w - left
    inside = (p < pixels) & (i >= 0) & (i < height) & (j >= 0) & (j < width_in)
    pixel = n.to(tl.int64) * stride_n + i.to(tl.int64) * stride_y + j.to(tl.int64) * stride_x
    packed = tl.zeros([BLOCK_S, BLOCK_P], tl.int32)
    active = tl.zeros([BLOCK_S, BLOCK_P], tl.int32)
    fault = tl.zeros([BLOCK_S, BLOCK_P], tl.int32)
    for t in tl.static_range(THREADS):
        c, known = _channel(t, s, slots, channels, order, ADJACENT, THREADS, ORDERED)
        value = tl.load(x + (c * stride_c)[:, None] + pixel[None, :], mask=known[:, None] & inside[None, :], other=0.0)
        fault |= tl.where(tl.abs(value) < float("inf"), 0, _NOT_FINITE)
        if ZERO == 0:
            fault |= tl.where(value < 0, _NEGATIVE, 0)
        quotient = tl.minimum(tl.maximum(tl.div_rn(value, scale), -1.0 * ZERO), 255.0 - ZERO)
        # A float's last place at 2^23 is 1: the sum rounds half to even, and its low byte is the code.
        code = (quotient + (8388608.0 + ZERO)).to(tl.int32, bitcast=True) & 255
        packed |= code << (8 * t)
        active |= tl.where(code != ZERO, 1 << t, 0)
    found = tl.max(tl.max(fault & _NEGATIVE, 0), 0) | tl.max(tl.max(fault & _NOT_FINITE, 0), 0)
    if found != 0:
        tl.atomic_or(faults, found)
    mask = (s < width)[:, None] & (p < pixels)[None, :]
    columns = operand_PK + p.to(tl.int64)[None, :] * (GROUPS * THREADS * width) + s[:, None]
    for t in range(THREADS):
        v = ((packed >> (8 * t)) & 255) - ZERO
        r = _reduced(v, KEEP, LOW, HIGH, SHIFT, ROUNDING)
        shift = _shift(v, active, t, THREADS, LOW, HIGH)
        for g in tl.static_range(GROUPS):
            operand = _choose(v, r, shift, TABLES[g]) - (128 - ZERO)
            tl.store(columns + (g * THREADS + t) * width, operand.to(tl.int8), mask=mask)
