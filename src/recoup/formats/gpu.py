"""The formats on the GPU: Triton kernels, equal to reference.py bit for bit.

The steps and names are those of cpu_kernels.py. Kernels see floats as integers of the same width, so nothing here
depends on flush-to-zero. With TRITON_INTERPRET=1 in the environment before triton is imported they run on CPU tensors.
"""

# ruff: noqa: A002, SIM108 - format is the word of the contract; branches on types are no expressions to triton
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# (inside a kernel plain numbers become constexpr)

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from recoup.formats.constants import LAYOUTS, block_constants, float_constants
from recoup.formats.spec import BlockFloat, Float, Int

__all__ = ["quantize"]

INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
LANES = 1024
COLUMNS = 256  # of blocks, whose exponents stay in registers
FUSION = {"enable_fp_fusion": False}


@triton.jit
def _split(u, FRACTION: tl.constexpr):
    hidden: tl.constexpr = 1 << FRACTION
    infinity: tl.constexpr = 0x7F800000 if FRACTION == 23 else 0x7FF0000000000000
    base = tl.maximum(u & infinity, hidden) - hidden
    return base, u - base


@triton.jit
def _rounded(sig, drop, nearest, FRACTION: tl.constexpr):
    one = sig * 0 + 1
    bit = one << tl.minimum(drop, FRACTION + 2)
    add = tl.maximum((bit >> 1) - tl.where((sig & bit) != 0, 0, one), 0)
    return (sig + (add & nearest)) & -bit


@triton.jit
def _rounded_randomly(sig, drop, random, FRACTION: tl.constexpr):
    random_bits: tl.constexpr = 30 if FRACTION == 23 else 62
    sig = sig >> tl.minimum(tl.maximum(drop - random_bits, 0), random_bits)
    drop = tl.minimum(drop, random_bits)
    one = sig * 0 + 1
    return (sig + (random >> (random_bits - drop))) & -(one << drop)


@triton.jit
def _exponent_field(u, FRACTION: tl.constexpr):
    infinity: tl.constexpr = 0x7F800000 if FRACTION == 23 else 0x7FF0000000000000
    bias: tl.constexpr = 127 if FRACTION == 23 else 1023
    if FRACTION == 23:
        bits = u.to(tl.float32).to(tl.int32, bitcast=True)
    else:
        bits = u.to(tl.float64).to(tl.int64, bitcast=True)
    field = u >> FRACTION
    field = tl.where(field == 0, (bits >> FRACTION) - (bias + FRACTION - 1), field)
    return tl.where(u > infinity, -FRACTION - bias, field)


# Numbers are not specialised on: one machine code for all their values, 1 and multiples of 16 included.
@triton.jit(do_not_specialize=range(3, 13))
def _float_kernel(
    x_ptr, y_ptr, random_ptr, size, start, shift, zero_below, largest, beyond, infinite_from, top, quantum, nearest,
    FRACTION: tl.constexpr, STOCHASTIC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    absolute: tl.constexpr = 0x7FFFFFFF if FRACTION == 23 else 0x7FFFFFFFFFFFFFFF
    infinity: tl.constexpr = 0x7F800000 if FRACTION == 23 else 0x7FF0000000000000
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = at < size
    v = tl.load(x_ptr + at, mask=inside, other=0)
    u = v & absolute
    base, sig = _split(u, FRACTION)
    drop = tl.maximum(start - (base >> FRACTION), shift)
    if STOCHASTIC:
        r = _rounded_randomly(sig, drop, tl.load(random_ptr + at, mask=inside, other=0), FRACTION)
        q = tl.where(drop <= FRACTION, r + base, tl.where(r != 0, quantum, r))
    else:
        q = _rounded(sig, drop, nearest, FRACTION) + base
    q = tl.where(u < zero_below, 0, q)
    q = tl.where(q > largest, beyond, q)
    q = tl.where(u >= infinite_from, top, q)
    q = tl.where(u > infinity, u, q)
    tl.store(y_ptr + at, q | (v ^ u), mask=inside)


@triton.jit(do_not_specialize=[2])
def _int_kernel(
    x_ptr, y_ptr, size,
    LOW: tl.constexpr, HIGH: tl.constexpr, SPAN: tl.constexpr, WRAP: tl.constexpr,
    FRACTION: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    absolute: tl.constexpr = 0x7FFFFFFF if FRACTION == 23 else 0x7FFFFFFFFFFFFFFF
    infinity: tl.constexpr = 0x7F800000 if FRACTION == 23 else 0x7FF0000000000000
    bias: tl.constexpr = 127 if FRACTION == 23 else 1023
    half: tl.constexpr = (bias - 1) << FRACTION
    quiet: tl.constexpr = 1 << (FRACTION - 1)
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = at < size
    v = tl.load(x_ptr + at, mask=inside, other=0)
    u = v & absolute
    base, sig = _split(u, FRACTION)
    drop = tl.maximum(bias + FRACTION - 1 - (base >> FRACTION), 0)
    q = tl.where(u <= half, 0, _rounded(sig, drop, -1, FRACTION) + base)
    nan = u > infinity
    if WRAP:
        nan = u >= infinity  # an infinity has no residue
    q = tl.where(nan, 0, q)
    if FRACTION == 23:
        r = (q | (v ^ u)).to(tl.float32, bitcast=True)
    else:
        r = (q | (v ^ u)).to(tl.float64, bitcast=True)
    low = tl.full((1,), LOW, r.dtype)
    high = tl.full((1,), HIGH, r.dtype)
    if WRAP:
        # Exact, and not a division, which triton makes approximate: span is a power of two.
        span = tl.full((1,), SPAN, r.dtype)
        r = r - span * tl.floor(r * tl.full((1,), 1 / SPAN, r.dtype))
        r = tl.where(r > high, r - span, r)
    else:
        r = tl.where(r < low, low, r)
        r = tl.where(r > high, high, r)
    r = r + tl.full((1,), 0.0, r.dtype)
    result = tl.where(nan, v | quiet, r.to(v.dtype, bitcast=True))
    tl.store(y_ptr + at, result, mask=inside)


@triton.jit(do_not_specialize=range(3, 12))
def _block_kernel(
    x_ptr, y_ptr, random_ptr, channels, inner, block, blocks, tiles, lowest, highest, significand, nearest,
    OUTLIER: tl.constexpr, STOCHASTIC: tl.constexpr, FRACTION: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    absolute: tl.constexpr = 0x7FFFFFFF if FRACTION == 23 else 0x7FFFFFFFFFFFFFFF
    infinity: tl.constexpr = 0x7F800000 if FRACTION == 23 else 0x7FF0000000000000
    row = tl.program_id(0).to(tl.int64)
    group, tile = row // tiles, row % tiles
    outer, index = group // blocks, group % blocks
    width = tl.minimum(block, channels - index * block).to(tl.int32)
    lane = tile * LANES + tl.arange(0, LANES)
    inside = lane < inner
    begin = (outer * channels + index * block) * inner + lane
    first = tl.full((LANES,), -absolute, x_ptr.dtype.element_ty)
    second = first
    for c in range(width):
        u = tl.load(x_ptr + begin + c * inner, mask=inside, other=0) & absolute
        field = _exponent_field(u, FRACTION)
        second = tl.maximum(second, tl.minimum(field, first))
        first = tl.maximum(first, field)
    if not OUTLIER:
        second = first
    one = first * 0 + 1
    shared = tl.minimum(tl.maximum(second, lowest), highest)
    least = shared - significand + 1
    quantum = tl.where(
        least > 0, tl.maximum(least, 1) << FRACTION, (one << FRACTION) >> tl.minimum(tl.maximum(1 - least, 0), FRACTION)
    )
    largest = ((shared + 1) << FRACTION) - (one << (FRACTION + 1 - significand))
    for c in range(width):
        at = begin + c * inner
        v = tl.load(x_ptr + at, mask=inside, other=0)
        u = v & absolute
        base, sig = _split(u, FRACTION)
        drop = tl.maximum(FRACTION - significand + shared - (base >> FRACTION), 0)
        if STOCHASTIC:
            r = _rounded_randomly(sig, drop, tl.load(random_ptr + at, mask=inside, other=0), FRACTION)
            q = tl.where(drop <= FRACTION, r + base, tl.where(r != 0, quantum, r))
        else:
            r = _rounded(sig, drop, nearest, FRACTION)
            q = tl.where(r != 0, r + base, r)
        q = tl.minimum(q, largest)
        if OUTLIER:
            q = tl.where(_exponent_field(u, FRACTION) > second, u, q)
        q = tl.where(u > infinity, u, q)
        tl.store(y_ptr + at, q | (v ^ u), mask=inside)


def quantize(x: Tensor, format: Float | Int | BlockFloat, random: Tensor | None = None) -> Tensor:
    """``x`` in ``format``: what `reference.quantize` defines, with x's strides where x is dense.

    Args:
        x: float32 or float64 on a CUDA device; its dtype holds the format (see `constants.kernel_dtype`).
        format: the format.
        random: for stochastic rounding, random integers of x's shape as reference.py describes them.
    """
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        if isinstance(format, BlockFloat):
            _quantize_blocks(x, y, format, random)
        else:
            _quantize_elements(x, y, format, random)
    return y


def _quantize_elements(x: Tensor, y: Tensor, format: Float | Int, random: Tensor | None) -> None:
    if x.stride() != y.stride():
        x = torch.empty_like(x).copy_(x)
    size, fraction = x.numel(), LAYOUTS[x.dtype].fraction
    source, result, grid = _flat(x), _flat(y), (triton.cdiv(size, LANES),)
    if isinstance(format, Int):
        span, wrap = 2.0**format.bits, format.overflow == "wrap"
        _int_kernel[grid](
            source, result, size, format.smallest_value, format.largest_value, span, wrap, fraction, LANES, **FUSION
        )
        return
    chance = source
    if random is not None:
        same = random.stride() == x.stride()
        chance = (random if same else torch.empty_like(x, dtype=random.dtype).copy_(random)).as_strided((size,), (1,))
    constants = float_constants(format, x.dtype)[1:]
    _float_kernel[grid](source, result, chance, size, *constants, fraction, random is not None, LANES, **FUSION)


def _quantize_blocks(x: Tensor, y: Tensor, format: BlockFloat, random: Tensor | None) -> None:
    dim = format.dim % x.dim()
    front = dim if math.prod(x.shape[dim + 1 :]) >= COLUMNS // 16 else 0
    columns = x.movedim(dim, front).contiguous()
    channels, inner = columns.shape[front], math.prod(columns.shape[front + 1 :])
    rounded = torch.empty_like(columns)
    chance = _flat(columns) if random is None else random.movedim(dim, front).contiguous().view(-1)
    blocks, tiles = -(-channels // format.block), -(-inner // COLUMNS)
    rows = x.numel() // (channels * inner) * blocks * tiles
    c = block_constants(format, x.dtype)
    _block_kernel[(rows,)](
        _flat(columns), _flat(rounded), chance, channels, inner, format.block, blocks, tiles,
        c.lowest, c.highest, c.significand, c.nearest, c.outlier, random is not None, c.fraction, COLUMNS, **FUSION,
    )  # fmt: skip
    y.movedim(dim, front).copy_(rounded)


def _flat(x: Tensor) -> Tensor:
    """The memory of a dense tensor in order, as integers."""
    return x.as_strided((x.numel(),), (1,)).view(INTEGERS[x.dtype])
