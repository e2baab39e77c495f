"""A float64 in a format, as LightNorm's kernels round it: what they need to know of the format, and the arithmetic.

What a format rounds is exact before, or float64 rounded to odd (see exact.py), which formats round to the same.

A kernel takes these numbers as a plain tuple and names them inside, ``Rounding(*numbers)``: numba spends 2 us a call on
every named tuple that it is given, and 0.1 us on a plain one.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numba.extending import intrinsic

from recoup.formats import Float
from recoup.formats.cpu_kernels import as_float, as_integer

NONE, TRUNCATE, GENERAL = 0, 1, 2  # no format; toward zero without subnormals, which a mask does; all others
MAGNITUDE, SIGN, EXPONENT = (1 << 63) - 1, -(1 << 63), 0x7FF << 52
INFINITY = EXPONENT
FRACTION = 52

_BARE: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # numba's type stubs lack them
inner: Any = njit(nogil=True, **_BARE)
"""Compiles what only kernels call: without a way in from Python, which a fifth of the time went into. It is not cached,
and need not be: a kernel's own cache has it. Numba's index of a cache keeps the types of arguments, named tuples by the
path of their class, and cannot be read once that has moved."""


_intrinsic: Any = intrinsic


class Rounding(NamedTuple):
    """What rounds a float64 to a format; bits are those of float64.

    Attributes:
        mode: NONE, TRUNCATE or GENERAL.
        mask: keeps the bits of the format's mantissa.
        low, top: the smallest normal and the largest value, as bits.
        spread: from a binade's power of two to the number whose ulp is the quantum there, in exponent fields.
        depth: from a binade's power of two down to the quantum, in exponent fields.
        nearest: 1 to nearest even, 0 toward zero.
        flush: 1 where what is below the smallest normal becomes zero.
    """

    mode: int
    mask: int
    low: int
    top: int
    spread: int
    depth: int
    nearest: int
    flush: int


@lru_cache(maxsize=256)
def rounding_of(format: Float | None) -> Rounding:  # noqa: A002
    """How kernels round float64 to a format."""
    if format is None:
        return Rounding(NONE, 0, 0, 0, 0, 0, 0, 0)
    low, top = (int(np.float64(v).view(np.int64)) for v in (format.smallest_normal, format.largest_value))
    truncates = format.rounding == "zero" and not format.subnormals
    return Rounding(
        mode=TRUNCATE if truncates else GENERAL,
        mask=-1 << (FRACTION - format.mantissa),
        low=low,
        top=top,
        spread=(FRACTION - format.mantissa) << FRACTION,
        depth=format.mantissa << FRACTION,
        nearest=int(format.rounding == "nearest"),
        flush=int(not format.subnormals),
    )


@_intrinsic
def fma(typing_context, x, y, z):  # noqa: ARG001
    """x y + z of floats, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return builder.fma(*arguments)

    return x(x, y, z), generate


@inner
def two_sum(s, v):
    """s + v, and exactly what rounding took from it."""
    t = s + v
    z = t - s
    return t, (s - (t - z)) + (v - z)


@inner
def _odd(value, error):
    """The exact value + error rounded to odd; the value is the nearest float64."""
    bits = as_integer(value)
    moved = np.int64(bits + 1) if (error > 0) == (value > 0) else np.int64(bits - 1)
    return as_float(moved if (error != 0.0 and np.int64(bits & 1) == 0) else np.int64(bits))


@inner
def odd_sum(x, y):
    """x + y rounded to odd."""
    total, error = two_sum(x, y)
    return _odd(total, error)


@inner
def odd_quotient(x, divisor):
    """x / divisor rounded to odd, for a positive divisor."""
    result, by = x / divisor, np.float64(divisor)
    return _odd(result, fma(-result, by, x))


@inner
def averaged(total, error, elements, rounding):
    """A sum that is given as a pair, over n, in the format."""
    if rounding.mode == NONE:
        return (total + error) / elements
    return rounded(odd_quotient(odd_sum(total, error), np.float64(elements)), rounding)


@inner
def scaled_difference(x, mean, factor):
    """(x - mean) factor, each rounded to odd."""
    difference = odd_sum(x, -mean)
    product = difference * factor
    return _odd(product, fma(difference, factor, -product))


@inner
def truncated(v, rounding):
    """v toward zero, flushed and saturated, float64."""
    bits = as_integer(v)
    size = np.int64(bits & np.int64(MAGNITUDE))
    cut = np.int64(0) if size < rounding.low else min(np.int64(size & rounding.mask), rounding.top)
    cut = size if size > np.int64(INFINITY) else cut
    return as_float(np.int64(cut | np.int64(bits & np.int64(SIGN))))


@inner
def generally(v, rounding):
    """v to nearest even or toward zero, with or without subnormals, float64.

    Adding and taking away the number whose ulp is the quantum rounds to nearest, ties to even; where that went up and
    the format truncates, a quantum is taken off again.
    """
    low, top = rounding.low, rounding.top
    bits = as_integer(v)
    sign, size = np.int64(bits & np.int64(SIGN)), np.int64(bits & np.int64(MAGNITUDE))
    normal = np.int64(max(size, low) & np.int64(EXPONENT))
    large = as_float(np.int64(min(normal, top) + rounding.spread))
    magnitude = as_float(size)
    held = min(magnitude, as_float(top) * 2.0)
    rounded = (held + large) - large
    quantum = as_float(np.int64(min(normal, top) - rounding.depth))
    if rounding.nearest == 0:
        rounded = rounded - (quantum if rounded > held else 0.0)
    rounded = 0.0 if (rounding.flush != 0 and size < low) else rounded
    rounded = min(rounded, as_float(top))
    rounded = magnitude if size > np.int64(INFINITY) else rounded
    return as_float(np.int64(as_integer(rounded) | sign))


@inner
def rounded(v, rounding):
    """v in the format, float64. Loops over elements ask for the mode outside, or they would not be vectors."""
    if rounding.mode == TRUNCATE:
        return truncated(v, rounding)
    return generally(v, rounding) if rounding.mode == GENERAL else v
