"""One multiply-add of the unit on CUDA, for every format: the Triton functions that both kernels share.

In float32 (``wide`` False) a step is `emit_narrow`'s: operands come scaled so that flush-to-zero does the underflow,
and product and sum round toward zero. Triton has no such arithmetic, so it is PTX; Triton's interpreter, and kernels
built with PTX False, compute the same bits in float64. In float64 a step is `emit_wide`'s, with sums rounded to odd.

The constants are those of a `plan.Plan`: tables of floats and integers, by the places that emit_narrow and emit_wide
name.
"""

# Triton's language is typed for its own compiler, which drops branches of constants only whole:
# ruff: noqa: PLR1714, RET505, SIM102
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from recoup.lba import emit_integer, emit_narrow, emit_wide
from recoup.lba.emit_code import OUTER, PRODUCT, SUM

RATIO, PRODUCT_TOP, SUM_TOP = (
    tl.constexpr(place) for place in (emit_narrow.RATIO, emit_narrow.PRODUCT_TOP, emit_narrow.SUM_TOP)
)
PRODUCT_MASK, SUM_MASK = (tl.constexpr(place) for place in (emit_narrow.PRODUCT_MASK, emit_narrow.SUM_MASK))
TOP, BOTTOM = tl.constexpr(emit_integer.TOP), tl.constexpr(emit_integer.BOTTOM)
SLOT = tl.constexpr(emit_wide.SLOT)
AT_PRODUCT, AT_SUM, AT_OUTER = (tl.constexpr(place) for place in (PRODUCT, SUM, OUTER))
LOW, LARGEST, SCALE, INVERSE, SMALLEST, RANGE, INVERSE_RANGE = (tl.constexpr(place) for place in range(7))
MASK, SPREAD, DEPTH = (tl.constexpr(place) for place in range(3))
INTEGER, MULTIPLES = tl.constexpr(emit_wide.INTEGER), tl.constexpr(emit_wide.MULTIPLES)
EXPONENT = tl.constexpr(emit_wide.EXPONENT)
MAGNITUDE32, MAGNITUDE64 = tl.constexpr(0x7FFFFFFF), tl.constexpr(0x7FFFFFFFFFFFFFFF)
SIGN64 = tl.constexpr(-(1 << 63))
DROPPED = tl.constexpr(-(1 << 29))  # leaves 24 of a float64's 53 bits
SMALLEST_NORMAL32 = tl.constexpr(2.0**-126)


@triton.jit
def multiply(x, w, PTX: tl.constexpr):
    """x w in float32 toward zero, flushed."""
    if PTX:
        return tl.inline_asm_elementwise(
            "mul.rz.ftz.f32 $0, $1, $2;", "=f,f,f", [x, w], dtype=tl.float32, is_pure=True, pack=1
        )
    return _toward_zero(x.to(tl.float64) * w.to(tl.float64))


@triton.jit
def multiply_add(x, ratio, s, PTX: tl.constexpr):
    """x ratio + s in float32, rounded once, toward zero, flushed."""
    if PTX:
        return tl.inline_asm_elementwise(
            "fma.rz.ftz.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, ratio, s], dtype=tl.float32, is_pure=True, pack=1
        )
    return _toward_zero(odd_sum(x.to(tl.float64) * ratio.to(tl.float64), s.to(tl.float64)))


@triton.jit
def _toward_zero(x):
    cut = (x.to(tl.int64, bitcast=True) & DROPPED).to(tl.float64, bitcast=True)
    return tl.where(tl.abs(cut) < SMALLEST_NORMAL32, 0.0, cut).to(tl.float32)


@triton.jit
def odd_sum(x, y):
    """x + y in float64, rounded to odd: `reference.exact_sum`."""
    total = x + y
    part = total - x
    error = (x - (total - part)) + (y - part)
    bits = total.to(tl.int64, bitcast=True)
    moved = tl.where((error > 0) == (total > 0), bits + 1, bits - 1)
    return tl.where((error != 0) & ((bits & 1) == 0), moved, bits).to(tl.float64, bitcast=True)


@triton.jit
def masked(x, mask):
    """x without the bits that the mask lacks, float32."""
    return (x.to(tl.int32, bitcast=True) & mask).to(tl.float32, bitcast=True)


@triton.jit
def limited(x, top):
    """x within -top .. top."""
    return tl.minimum(tl.maximum(x, -top), top)


@triton.jit
def mix(x):
    """`reference.mix` of uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_base(seed_base, index):
    """`reference.random_base` of int64 indices: uint32."""
    seed = tl.full((), seed_base, tl.int64).to(tl.uint32)
    return mix((index & 0xFFFFFFFF).to(tl.uint32) ^ mix((index >> 32).to(tl.uint32) ^ seed))


@triton.jit
def random_bits(base, counter):
    """24 random bits for one rounding, as float64."""
    step = tl.full((), counter, tl.int64).to(tl.uint32)
    return (mix(base + step * 0x9E3779B9) >> 8).to(tl.float64)


@triton.jit
def term(x, w, s, base, k, floats, integers, FORM: tl.constexpr):
    """s = Q_acc(Q_prod(x w) + s) for the k-th term.

    FORM: what `gpu.form_of` makes of the plan.

    Returns:
        the sum; the total before its limit, and the product before its own, for `inside`.
    """
    if FORM[0] == "narrow":
        p = x  # replaced below unless fused
        if FORM[1]:  # fused
            total = masked(multiply_add(x, w, s, FORM[4]), tl.load(integers + SUM_MASK))
            p = total
        else:
            p = masked(multiply(x, w, FORM[4]), tl.load(integers + PRODUCT_MASK))
            kept = limited(p, tl.load(floats + PRODUCT_TOP)) if FORM[2] else p
            ratio = tl.load(floats + RATIO)
            total = masked(multiply_add(kept, ratio, s, FORM[4]), tl.load(integers + SUM_MASK))
        after = limited(total, tl.load(floats + SUM_TOP)) if FORM[3] else total
        return after, total, p
    elif FORM[0] == "whole":
        total = x * w + s
        return tl.minimum(tl.maximum(total, tl.load(floats + BOTTOM)), tl.load(floats + TOP)), total, total
    else:
        # An element of FORM is a constant only once it has a name: Triton 3.6 passes it on as what it holds.
        product_kind: tl.constexpr = FORM[1]
        product_flush: tl.constexpr = FORM[2]
        kind: tl.constexpr = FORM[3]
        flush: tl.constexpr = FORM[4]
        exact_sums: tl.constexpr = FORM[7]
        exact = x * w
        p = exact
        if product_kind != "none":
            p = quantise(exact, base, 2 * k, floats, integers, AT_PRODUCT, product_kind, product_flush)
        if kind == "saturate" or kind == "wrap":
            p = p * tl.load(floats + AT_SUM * SLOT + INVERSE)
        total = wide_sum(p, s, exact_sums)
        near = total
        if FORM[8]:
            near = wide_sum(reduced(p, floats), s, exact_sums)
        after = quantise(near, base, 2 * k + 1, floats, integers, AT_SUM, kind, flush)
        return after, total, exact


@triton.jit
def add(s, y, base, counter, floats, integers, FORM: tl.constexpr):
    """y = Q_acc(s + y); also the total before its limit."""
    if FORM[0] == "narrow":
        one = tl.full((), 1.0, tl.float32)
        total = masked(multiply_add(s, one, y, FORM[4]), tl.load(integers + SUM_MASK))
        return limited(total, tl.load(floats + SUM_TOP)), total
    elif FORM[0] == "whole":
        total = s + y
        return tl.minimum(tl.maximum(total, tl.load(floats + BOTTOM)), tl.load(floats + TOP)), total
    else:
        outer_kind: tl.constexpr = FORM[5]
        outer_flush: tl.constexpr = FORM[6]
        exact_outer: tl.constexpr = FORM[7]
        if FORM[3] == "saturate" or FORM[3] == "wrap":
            if outer_kind != "saturate" and outer_kind != "wrap":
                s = s * tl.load(floats + AT_SUM * SLOT + SCALE)
        total = wide_sum(s, y, exact_outer)
        return quantise(total, base, counter, floats, integers, AT_OUTER, outer_kind, outer_flush), total


@triton.jit
def wide_sum(x, y, ODD: tl.constexpr):
    """x + y in float64: rounded to odd, or to nearest where that is enough."""
    if ODD:
        return odd_sum(x, y)
    return x + y


@triton.jit
def whole_number(x):
    """The nearest integer, ties to even, below 2^51."""
    return (x + INTEGER) - INTEGER


@triton.jit
def reduced(p, floats):
    """A product without whole ranges of a sum that wraps: `emit_wide._reduced`."""
    turns = p * tl.load(floats + AT_SUM * SLOT + INVERSE_RANGE)
    rest = p - whole_number(turns) * tl.load(floats + AT_SUM * SLOT + RANGE)
    return tl.where(tl.abs(turns) < MULTIPLES, rest, 0.0)


@triton.jit
def quantise(x, base, counter, floats, integers, PLACE: tl.constexpr, KIND: tl.constexpr, FLUSH: tl.constexpr):
    """Q of an exact (or odd) float64: `emit_wide.quantise`."""
    at = PLACE * SLOT
    top = tl.load(floats + at + LARGEST)
    if KIND == "saturate":
        return tl.minimum(tl.maximum(whole_number(x), tl.load(floats + at + SMALLEST)), top)
    elif KIND == "wrap":
        units, bottom = whole_number(x), tl.load(floats + at + SMALLEST)
        return units - tl.floor((units - bottom) * tl.load(floats + at + INVERSE_RANGE)) * tl.load(floats + at + RANGE)
    else:
        low = tl.load(floats + at + LOW)
        bits = x.to(tl.int64, bitcast=True)
        size = (bits & MAGNITUDE64).to(tl.float64, bitcast=True)
        if KIND == "mask":
            cut = (bits & tl.load(integers + at + MASK)).to(tl.float64, bitcast=True)
            if FLUSH:
                cut = tl.where(size >= low, cut, 0.0)
            return limited(cut, top)
        normal = tl.maximum(size, low).to(tl.int64, bitcast=True) & EXPONENT  # the binade's power of two
        large = (normal + tl.load(integers + at + SPREAD)).to(tl.float64, bitcast=True)
        rounded = (size + large) - large
        if KIND != "nearest":
            quantum = (normal - tl.load(integers + at + DEPTH)).to(tl.float64, bitcast=True)
            rounded = rounded - tl.where(rounded > size, quantum, 0.0)
            if KIND == "stochastic":
                needed = (16777216.0 - random_bits(base, counter)) * 5.9604644775390625e-08 * quantum
                rounded = rounded + tl.where(size - rounded >= needed, quantum, 0.0)
        if FLUSH:
            rounded = tl.where(size >= low, rounded, 0.0)
        rounded = tl.minimum(rounded, top)
        return (rounded.to(tl.int64, bitcast=True) | (bits & SIGN64)).to(tl.float64, bitcast=True)


@triton.jit
def inside(value, floats, PLACE: tl.constexpr, FORM: tl.constexpr):
    """Whether a product or total did not overflow the format at PLACE (product, sum or outer sum)."""
    if FORM[0] == "narrow":
        top = tl.load(floats + (PRODUCT_TOP if PLACE == AT_PRODUCT else SUM_TOP))
        return tl.abs(value) < top
    elif FORM[0] == "whole":
        return (value <= tl.load(floats + TOP)) & (value >= tl.load(floats + BOTTOM))
    else:
        kind: tl.constexpr = FORM[1 + 2 * PLACE]
        top = tl.load(floats + PLACE * SLOT + LARGEST)
        if kind == "saturate" or kind == "wrap":
            units = whole_number(value)
            return (units <= top) & (units >= tl.load(floats + PLACE * SLOT + SMALLEST))
        return tl.abs(value) < top
