"""The formats' numba kernels, over ranges of elements; cpu.py calls them.

Legend: ``u`` x's magnitude as an integer; ``sig`` its significand with the hidden bit; ``base`` what was taken off
``u`` to leave ``sig``, so that ``base >> fraction`` is the exponent field less one; ``drop`` how many low bits go;
``q`` the result's magnitude. constants.py explains the constants.

Every sum is cast back to the element's own integer type and shifts are our own: numba widens both to 64 bits, which
halves the speed. ``T`` is that type.
"""

# ruff: noqa: ARG001 - numba fixes an intrinsic's arguments

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["LANES", "block_kernel", "float_kernel", "float_nearest_kernel", "float_random_kernel", "int_kernel"]

_intrinsic: Any = intrinsic  # numba is untyped
LANES = 512  # block columns at a time: their exponents and elements stay in the first-level cache


@_intrinsic
def _left(typing_context, a, b):
    """``a << b`` in a's own width."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.shl(*arguments)

    return a(a, a), generate


@_intrinsic
def _right(typing_context, a, b):
    """``a >> b`` without sign in a's own width."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.lshr(*arguments)

    return a(a, a), generate


@_intrinsic
def _float_bits(typing_context, a):
    """The bits of ``float(a)``, of a's own width."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.FloatType() if a.bitwidth == 32 else ir.DoubleType()
        return builder.bitcast(builder.sitofp(arguments[0], wide), arguments[0].type)

    return a(a), generate


@_intrinsic
def as_float(typing_context, a):
    """The float with a's bits."""
    wide = types.float32 if a.bitwidth == 32 else types.float64

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return wide(a), generate


@_intrinsic
def as_integer(typing_context, a):
    """The integer with the bits of the float a."""
    wide = types.int32 if a.bitwidth == 32 else types.int64

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return wide(a), generate


@njit(nogil=True, cache=True)
def _split(u, fraction):
    """``base`` and ``sig``: ``u = base + sig``; a subnormal u has no hidden bit and base 0."""
    T = type(u)
    hidden = _left(T(1), fraction)
    infinity = T(_right(T(-1), T(1)) & T(-hidden))
    base = T(max(T(u & infinity), hidden) - hidden)
    return base, T(u - base)


@njit(nogil=True, cache=True)
def _rounded(sig, drop, fraction, nearest):
    """``sig`` without its low bits: to nearest even where ``nearest`` is -1, toward zero where it is 0."""
    T = type(sig)
    one = T(1)
    bit = _left(one, min(drop, T(fraction + T(2))))
    # Half of bit, less one where the kept part is even; max, since where no bit is dropped there is no half.
    add = max(T(_right(bit, one) - (T(0) if T(sig & bit) != T(0) else one)), T(0))
    return T(T(sig + T(add & nearest)) & T(-bit))


@njit(nogil=True, cache=True)
def _rounded_randomly(sig, drop, fraction, random):
    """``sig`` without its low bits, up with the probability that they are worth; 0 or one bit where drop > fraction."""
    T = type(sig)
    random_bits = T(30) if fraction == T(23) else T(62)
    sig = _right(sig, min(max(T(drop - random_bits), T(0)), random_bits))
    drop = min(drop, random_bits)
    return T(T(sig + _right(random, T(random_bits - drop))) & T(-_left(T(1), drop)))


@njit(nogil=True, cache=True)
def float_kernel(x, y, first, last, constants):
    T = x.dtype.type
    fraction, start, shift, zero_below, largest, _, infinite_from, top, _, nearest = constants
    fraction, start, shift, nearest = T(fraction), T(start), T(shift), T(nearest)
    zero_below, largest, infinite_from, top = T(zero_below), T(largest), T(infinite_from), T(top)
    absolute = _right(T(-1), T(1))
    infinity = T(absolute & T(-_left(T(1), fraction)))
    source, result = x[first:last], y[first:last]
    for i in range(source.size):
        v = source[i]
        u = T(v & absolute)
        base, sig = _split(u, fraction)
        drop = max(T(start - _right(base, fraction)), shift)
        q = T(_rounded(sig, drop, fraction, nearest) + base)
        q = T(0) if u < zero_below else q
        q = min(q, largest)
        q = top if u >= infinite_from else q
        q = u if u > infinity else q  # NaN, its bits kept
        result[i] = T(q | T(v ^ u))


@njit(nogil=True, cache=True)
def float_nearest_kernel(x, y, first, last, constants):
    """The same in half the operations, for formats that leave room above and below them."""
    T = x.dtype.type
    fraction, lowest, raise_by, zero_below, largest, infinite_from, top = constants
    lowest, raise_by, zero_below = T(lowest), T(raise_by), T(zero_below)
    largest, infinite_from, top = T(largest), T(infinite_from), T(top)
    absolute = _right(T(-1), T(1))
    infinity = T(absolute & T(-_left(T(1), T(fraction))))
    source, result = x[first:last], y[first:last]
    for i in range(source.size):
        v = source[i]
        u = T(v & absolute)
        w = min(u, largest)
        power = as_float(T(max(T(w & infinity), lowest) + raise_by))
        q = as_integer((as_float(w) + power) - power)
        q = T(0) if u < zero_below else q
        q = top if u >= infinite_from else q
        q = u if u > infinity else q
        result[i] = T(q | T(v ^ u))


@njit(nogil=True, cache=True)
def float_random_kernel(x, y, first, last, constants, random):
    T = x.dtype.type
    fraction, start, shift, zero_below, largest, beyond, infinite_from, top, quantum, _ = constants
    fraction, start, shift, quantum = T(fraction), T(start), T(shift), T(quantum)
    zero_below, largest, beyond, infinite_from, top = T(zero_below), T(largest), T(beyond), T(infinite_from), T(top)
    absolute = _right(T(-1), T(1))
    infinity = T(absolute & T(-_left(T(1), fraction)))
    source, result, chance = x[first:last], y[first:last], random[first:last]
    for i in range(source.size):
        v = source[i]
        u = T(v & absolute)
        base, sig = _split(u, fraction)
        drop = max(T(start - _right(base, fraction)), shift)
        r = _rounded_randomly(sig, drop, fraction, chance[i])
        q = T(r + base) if drop <= fraction else (quantum if r != T(0) else T(0))
        q = T(0) if u < zero_below else q
        q = beyond if q > largest else q
        q = top if u >= infinite_from else q
        q = u if u > infinity else q
        result[i] = T(q | T(v ^ u))


@njit(nogil=True, cache=True)
def int_kernel(x, y, first, last, limits, wrap):
    F = x.dtype.type
    low, high, span, per_span = F(limits[0]), F(limits[1]), F(limits[2]), F(1 / limits[2])
    source, result = x[first:last], y[first:last]
    for i in range(source.size):
        r = np.rint(source[i])
        if wrap:
            # Exact: span is a power of two, and what is left is an integer below it.
            r = F(r - span * np.floor(r * per_span))
            r = F(r - span) if r > high else r
        else:
            r = low if r < low else r
            r = high if r > high else r
        result[i] = F(r + F(0))  # no negative zero


@njit(nogil=True, cache=True)
def _exponent_field(u, fraction):
    """The exponent field, continued below 1 for subnormals as if they were normalised; NaN counts as zero."""
    T = type(u)
    one = T(1)
    hidden = _left(one, fraction)
    infinity = T(_right(T(-1), one) & T(-hidden))
    field = _right(u, fraction)
    bias = _right(infinity, T(fraction + one))
    tiny = T(_right(_float_bits(u), fraction) - T(T(bias + fraction) - one))
    field = tiny if field == T(0) else field
    return T(-fraction - bias) if u > infinity else field


@njit(nogil=True, cache=True)
def block_kernel(x, y, first, last, shape, constants, random):
    channels, inner, block, blocks, tiles = shape
    fraction, lowest, highest, significand, outlier, nearest = constants
    T = x.dtype.type
    fraction, lowest, highest, significand, nearest = T(fraction), T(lowest), T(highest), T(significand), T(nearest)
    absolute, hidden = _right(T(-1), T(1)), _left(T(1), fraction)
    infinity = T(absolute & T(-hidden))
    shift = T(fraction + T(1) - significand)
    largest_below = _left(T(1), shift)  # from the next power of two down to the largest multiple
    stochastic = random.size > 0
    largest_exponent, second_exponent = np.empty(LANES, x.dtype), np.empty(LANES, x.dtype)
    for row in range(first, last):
        group, tile = row // tiles, row % tiles
        outer, index = group // blocks, group % blocks
        width = min(block, channels - index * block)
        lanes = min(LANES, inner - tile * LANES)
        begin = (outer * channels + index * block) * inner + tile * LANES
        largest_exponent[:] = -absolute
        second_exponent[:] = -absolute
        for c in range(width):
            source = x[begin + c * inner : begin + c * inner + lanes]
            for i in range(source.size):
                field = _exponent_field(T(source[i] & absolute), fraction)
                second_exponent[i] = max(second_exponent[i], min(field, largest_exponent[i]))
                largest_exponent[i] = max(largest_exponent[i], field)
        # The second exponent, ties counted, is the shared one of the outlier rule; what lies above it is the outlier.
        shared_exponent = second_exponent if outlier else largest_exponent
        for c in range(width):
            at = begin + c * inner
            source, result, chance = x[at : at + lanes], y[at : at + lanes], random[at : at + lanes]
            for i in range(source.size):
                v = source[i]
                u = T(v & absolute)
                shared = min(max(shared_exponent[i], lowest), highest)
                base, sig = _split(u, fraction)
                drop = max(T(shift + shared - T(1) - _right(base, fraction)), T(0))
                if stochastic:
                    r = _rounded_randomly(sig, drop, fraction, chance[i])
                    field = T(shared - significand + T(1))
                    quantum = _left(field, fraction) if field > T(0) else _right(hidden, T(T(1) - field))
                    q = T(r + base) if drop <= fraction else (quantum if r != T(0) else T(0))
                else:
                    r = _rounded(sig, drop, fraction, nearest)
                    q = T(r + base) if r != T(0) else T(0)
                q = min(q, T(_left(T(shared + T(1)), fraction) - largest_below))
                kept = u > infinity or (outlier and _exponent_field(u, fraction) > shared_exponent[i])
                q = u if kept else q
                result[i] = T(q | T(v ^ u))
