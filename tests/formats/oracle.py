"""A second definition of the formats, shared with recoup's in nothing: exact fractions and lists of values."""

# ruff: noqa: A002 - format is the word of the contract and of the field

import math
from fractions import Fraction

from recoup.formats import BlockFloat, Float, Int


def two_to(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def float_values(format: Float) -> list[tuple[Fraction, bool]]:
    """Non-negative values in ascending order, each with whether its code is even; the last one is beyond the largest.

    That last one is where the next value would be, one ulp further on.
    """
    steps = 1 << format.mantissa
    values = [(Fraction(0), True)]
    if format.subnormals:
        values += [(two_to(format.min_exponent) * f / steps, f % 2 == 0) for f in range(1, steps)]
    for e in range(format.min_exponent, format.max_exponent + 2):
        values += [(two_to(e) * (1 + Fraction(f, steps)), f % 2 == 0) for f in range(steps)]
    top = Fraction(format.largest_value)
    end = next(i for i, (value, _) in enumerate(values) if value > top)
    return values[: end + 1]


def quantize_float(x: float, format: Float) -> float:
    """One number to nearest or toward zero."""
    if math.isnan(x):
        return x
    finite = float_values(format)
    top, beyond = finite[-2][0], finite[-1][0]
    if math.isinf(x):
        result = top if format.overflow == "saturate" else math.inf
    else:
        magnitude = abs(Fraction(x))
        result = _choose(magnitude, finite, format)
        if magnitude > top:
            up = format.rounding == "nearest" and magnitude >= (top + beyond) / 2
            result = math.inf if up and format.overflow == "inf" else top
    return math.copysign(float(result), x)


def _choose(magnitude: Fraction, values: list[tuple[Fraction, bool]], format: Float) -> Fraction:
    if not format.subnormals and magnitude < two_to(format.min_exponent):
        return Fraction(0)
    below, below_even = [value for value in values if value[0] <= magnitude][-1]
    if below == magnitude or format.rounding == "zero":
        return below
    above = next((value for value, _ in values if value > magnitude), below)
    if magnitude - below != above - magnitude:
        return below if magnitude - below < above - magnitude else above
    if format.mantissa == 0:
        return above if below else below
    return below if below_even else above


def quantize_int(x: float, format: Int) -> float:
    low = -(1 << (format.bits - 1)) if format.signed else 0
    high = low + (1 << format.bits) - 1
    if math.isnan(x) or (math.isinf(x) and format.overflow == "wrap"):
        return math.nan
    if math.isinf(x):
        return float(high if x > 0 else low)
    integer = round(Fraction(x))  # Python rounds ties to even
    if format.overflow == "saturate":
        return float(min(max(integer, low), high))
    return float((integer - low) % (1 << format.bits) + low)


def quantize_block(block: list[float], format: BlockFloat) -> list[float]:
    """One block, toward zero or to nearest."""

    def exponent(x: float) -> float:
        return math.inf if math.isinf(x) else math.frexp(x)[1] - 1

    low, high = 2 - 2 ** (format.exponent - 1), 2 ** (format.exponent - 1) - 1
    exponents = sorted((exponent(x) for x in block if x and not math.isnan(x)), reverse=True)
    alone = format.shared == "outlier" and exponents and exponents.count(exponents[0]) == 1
    kept = exponents[0] if alone else None
    shared = (exponents[1] if len(exponents) > 1 else low) if alone else (exponents[0] if exponents else low)
    quantum = two_to(int(min(max(shared, low), high)) - format.significand + 1)
    top = 2**format.significand - 1

    def element(x: float) -> float:
        if math.isnan(x) or not x or exponent(x) == kept:
            return x
        units = Fraction(top) if math.isinf(x) else abs(Fraction(x)) / quantum
        count = round(units) if format.rounding == "nearest" else math.floor(units)
        return math.copysign(float(min(count, top) * quantum), x)

    return [element(x) for x in block]
