"""The Triton kernels: operands taken apart into integers, and all steps of a tile of sums.

Everything is integer arithmetic, so that neither fused multiply-adds nor flush-to-zero can change a bit; only the
promoted sums are added as float32 numbers. An element s 2^(e - m), m its format's fraction bits, is one int32:
s << 8 | e + 126. A product in units of q = 2^(E - n) is then |s_a s_b| 2^(n - m_a - m_b) >> E - e_a - e_b, with the
low bits cut as the unit cuts them.

Legend: B matrices of a batch, M rows, N columns, K terms.
"""

# Triton's language is typed for its own compiler:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

import triton
import triton.language as tl

from recoup.tensorcore import emit_form, emit_prepare

NOT_IN_FORMAT, NOT_FINITE = tl.constexpr(emit_prepare.NOT_IN_FORMAT), tl.constexpr(emit_prepare.NOT_FINITE)
ZERO = tl.constexpr(emit_form.ZERO)
MAGNITUDE, INFINITY = tl.constexpr(0x7FFFFFFF), tl.constexpr(0x7F800000)
SIGN = tl.constexpr(-(1 << 31))
HIDDEN, HALF_INFINITE = tl.constexpr(1 << 23), tl.constexpr(65536.0)
EXPONENT_BITS, EXPONENT_MASK = tl.constexpr(8), tl.constexpr(255)
DEEPEST = tl.constexpr(62)  # shifts of int64: every magnitude is gone by then


@triton.jit
def prepare_kernel(
    x,  # [B, K, C] float32 as int32 of any strides; C rows of the left operand or columns of the right one
    parts,  # [B, K, C] int32
    faults,  # [programs] int32
    C,
    size,  # K C
    batch_stride,
    k_stride,
    stride,
    MANTISSA: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the steps take of each element, and whether any is foreign to its format or not finite."""
    batch, at = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(x + batch * batch_stride + at // C * k_stride + at % C * stride, mask=at < size, other=0)
    magnitude = bits & MAGNITUDE
    field = magnitude >> 23
    place = tl.maximum(field, 1) - 127  # of the hidden bit
    significand = (magnitude & (HIDDEN - 1)) | tl.where(field > 0, HIDDEN, 0)
    exponent = tl.maximum(place, MIN_EXPONENT)
    drop = tl.minimum(exponent - place + (23 - MANTISSA), 31)
    kept = significand >> drop
    finite, zero = magnitude < INFINITY, magnitude == 0
    foreign = finite & (((kept << drop) != significand) | (magnitude > LARGEST))
    kept = tl.where(finite, tl.where(bits < 0, -kept, kept), 0)
    exponent = tl.where(zero, ZERO, tl.minimum(exponent, 127))
    tl.store(parts + batch * size + at, (kept << EXPONENT_BITS) | (exponent - ZERO), mask=at < size)
    wrong = tl.max(tl.where(foreign, 1, 0), 0) * NOT_IN_FORMAT + tl.max(tl.where(finite, 0, 1), 0) * NOT_FINITE
    tl.store(faults + batch * tl.num_programs(0) + tl.program_id(0), wrong)


@triton.jit
def product_kernel(
    a,  # [B, K, M] int32, of `prepare_kernel`
    b,  # [B, K, N] int32
    y,  # [B, M, N] float32 as int32
    M,
    N,
    K,
    part,  # terms of a chain: the promotion, or K
    GROUP: tl.constexpr,
    FRACTION: tl.constexpr,
    PRODUCT_FRACTION: tl.constexpr,
    OUTPUT: tl.constexpr,
    PROMOTED: tl.constexpr,
    WIDE_TERMS: tl.constexpr,
    WIDE_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums of one tile."""
    batch = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) // tl.cdiv(N, BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, columns = a + batch * K * M + m, b + batch * K * N + n
    below, beside = tl.full((), 1, tl.int64) * M, tl.full((), 1, tl.int64) * N  # from one k to the next
    whole = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    c = tl.full((BLOCK_M, BLOCK_N), 0, tl.int32)
    for begin in range(0, K, part):
        end = tl.minimum(begin + part, K)
        c = tl.full((BLOCK_M, BLOCK_N), 0, tl.int32)
        for first in range(begin, end, GROUP):
            stop = tl.minimum(first + GROUP, end)
            top = _top(c, OUTPUT)
            for k in range(first, stop):
                left = tl.load(rows + k * below, mask=m < M, other=0) & EXPONENT_MASK
                right = tl.load(columns + k * beside, mask=n < N, other=0) & EXPONENT_MASK
                top = tl.maximum(top, left[:, None] + right[None, :] + 2 * ZERO)
            total = _cut_accumulator(c, top, FRACTION, WIDE_TERMS, WIDE_SUMS)
            for k in range(first, stop):
                left = tl.load(rows + k * below, mask=m < M, other=0)
                right = tl.load(columns + k * beside, mask=n < N, other=0)
                total += _cut_product(left[:, None], right[None, :], top, FRACTION, PRODUCT_FRACTION, WIDE_TERMS)
            found = _rounded(total, top - FRACTION, OUTPUT)
            c = tl.where((c & MAGNITUDE) == INFINITY, c, found)
        if PROMOTED:
            whole += c.to(tl.float32, bitcast=True)
    place = y + (batch * M + m[:, None]) * N + n[None, :]
    result = whole.to(tl.int32, bitcast=True) if PROMOTED else c
    tl.store(place, result, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def _top(c, OUTPUT: tl.constexpr):
    """The accumulators' exponents as the unit sees them."""
    magnitude = c & MAGNITUDE
    exponent = tl.maximum(magnitude >> 23, 1) - 127
    if OUTPUT == "float16":
        exponent = tl.where(magnitude == 0, ZERO, tl.maximum(exponent, -14))
    return exponent


@triton.jit
def _cut_accumulator(c, top, FRACTION: tl.constexpr, WIDE_TERMS: tl.constexpr, WIDE_SUMS: tl.constexpr):
    """The accumulators in units of q, toward zero."""
    ahead: tl.constexpr = FRACTION - 23 if FRACTION > 23 else 0
    magnitude = c & MAGNITUDE
    field = magnitude >> 23
    significand = (magnitude & (HIDDEN - 1)) | tl.where(field > 0, HIDDEN, 0)
    if WIDE_TERMS:
        significand = significand.to(tl.int64)
    drop = top - FRACTION - (tl.maximum(field, 1) - 150) + ahead
    cut = (significand << ahead) >> tl.minimum(tl.maximum(drop, 0), DEEPEST if WIDE_TERMS else 31)
    cut = tl.where(c < 0, -cut, cut)
    return cut.to(tl.int64) if WIDE_SUMS else cut


@triton.jit
def _cut_product(left, right, top, FRACTION: tl.constexpr, PRODUCT_FRACTION: tl.constexpr, WIDE_TERMS: tl.constexpr):
    """Products in units of q, toward zero."""
    product = (left >> EXPONENT_BITS) * (right >> EXPONENT_BITS)
    drop = top - (left & EXPONENT_MASK) - (right & EXPONENT_MASK) - 2 * ZERO
    magnitude = tl.abs(product)
    if WIDE_TERMS:
        magnitude = magnitude.to(tl.int64)
    if FRACTION >= PRODUCT_FRACTION:
        magnitude = magnitude << (FRACTION - PRODUCT_FRACTION)
    else:
        magnitude = magnitude >> (PRODUCT_FRACTION - FRACTION)
    cut = magnitude >> tl.minimum(drop, DEEPEST if WIDE_TERMS else 31)
    return tl.where(product < 0, -cut, cut)


@triton.jit
def _rounded(total, exponent, OUTPUT: tl.constexpr):
    """The bits of total 2^exponent in the accumulator's format: `reference.output`."""
    fraction: tl.constexpr = 23 if OUTPUT == "float32" else 13 if OUTPUT == "e8m13" else 10
    smallest: tl.constexpr = -14 if OUTPUT == "float16" else -126
    magnitude = tl.abs(total.to(tl.int64))
    # Without the bit after the first no rounding reaches the next power of two: the exponent is that of the first bit.
    first = (magnitude & ~(magnitude >> 1)).to(tl.float32).to(tl.int32, bitcast=True)
    place = tl.maximum(tl.minimum((first >> 23) - 127 + exponent, 200), smallest)
    drop = place - fraction - exponent
    drop = tl.where(magnitude == 0, 0, drop)
    right = tl.minimum(tl.maximum(drop, 0), DEEPEST).to(tl.int64)
    kept = (magnitude << tl.minimum(tl.maximum(-drop, 0), fraction).to(tl.int64)) >> right
    if OUTPUT == "float16":
        rest, half = magnitude - (kept << right), ((right * 0 + 1) << right) >> 1
        up = (rest > half) | ((rest == half) & ((kept & 1) != 0))
        kept += tl.where((right > 0) & up, 1, 0)
        unit = (tl.minimum(place, 20) + (127 - fraction)) << 23
        value = kept.to(tl.float32) * unit.to(tl.float32, bitcast=True)
        infinite = (place >= 16) | (value >= HALF_INFINITE)
        found = tl.where(infinite, INFINITY, value.to(tl.int32, bitcast=True))
    else:
        number = ((place + 127) << 23) + ((kept.to(tl.int32) << (23 - fraction)) - HIDDEN)
        found = tl.where(place >= 128, INFINITY, number)
    return tl.where(kept == 0, 0, tl.where(total < 0, found | SIGN, found))  # a zero is +0
