"""A second definition of the codes, shared with recoup's in nothing: exact fractions and strings of bits."""

# ruff: noqa: A002 - format is the word of the contract and of the field

import math
from fractions import Fraction

from recoup.formats import BlockFloat, Float, Int
from tests.formats.oracle import two_to


def digits(value: int, width: int) -> str:
    assert 0 <= value < 1 << width
    return format(value, "b").zfill(width) if width else ""


def floor_log2(x: Fraction) -> int:
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if two_to(e) <= x else e - 1


def exponent_width(format: Float) -> int:
    """The fewest bits that tell the binades, and the subnormals, apart."""
    kinds = format.max_exponent - format.min_exponent + 1 + format.subnormals
    return next(width for width in range(12) if 2**width >= kinds)


def has_flag(format: Float) -> bool:
    """Zero has no code when there are no subnormals and the binades use up the exponent field."""
    return not format.subnormals and 2 ** exponent_width(format) == format.max_exponent - format.min_exponent + 1


def float_code(x: float, format: Float) -> int:
    """The code of a value of the format."""
    width, flag = exponent_width(format), has_flag(format)
    sign = "1" if math.copysign(1, x) < 0 else "0"
    magnitude = abs(Fraction(x))
    if magnitude >= two_to(format.min_exponent):
        e = floor_log2(magnitude)
        field = e - format.min_exponent + (0 if flag else 1)
        fraction = (magnitude / two_to(e) - 1) * 2**format.mantissa
    else:
        assert format.subnormals or magnitude == 0
        field, fraction = 0, magnitude / two_to(format.min_exponent - format.mantissa)
    assert fraction.denominator == 1, "not a value of the format"
    nonzero = ("1" if magnitude else "0") if flag else ""
    return int(nonzero + sign + digits(field, width) + digits(fraction.numerator, format.mantissa), 2)


def special_codes(format: Float) -> dict[int, float]:
    """Every code of infinity and NaN."""
    width, flag = exponent_width(format), has_flag(format)
    binades = format.max_exponent - format.min_exponent + 1
    ones = digits(2**width - 1, width)
    found = {}
    for sign in "01":
        if not flag and 1 + binades < 2**width:
            for fraction in range(2**format.mantissa):
                value = math.nan if fraction else (-math.inf if sign == "1" else math.inf)
                found[int(sign + ones + digits(fraction, format.mantissa), 2)] = value
        elif format.largest is not None:
            found[int(("1" if flag else "") + sign + ones + "1" * format.mantissa, 2)] = math.nan
    return found


def int_code(x: float, format: Int) -> int:
    return int(x) if x >= 0 else int(x) + 2**format.bits


def block_code(block: list[float], format: BlockFloat) -> str:
    """One block as a string: its exponents and index, then sign and significand of each element."""
    low, high = 2 - 2 ** (format.exponent - 1), 2 ** (format.exponent - 1) - 1

    def code(e: int) -> str:
        return digits(min(max(e, low), high) + 2 ** (format.exponent - 1) - 1, format.exponent)

    exponents = [floor_log2(abs(Fraction(x))) if x else -9999 for x in block]
    first, *others = sorted(exponents, reverse=True)
    second = others[0] if others else -9999
    index = exponents.index(first) if first > second and format.shared == "outlier" and first > low else None
    shared = second if index is not None else first
    head = code(shared)
    if format.shared == "outlier":
        own = index is not None and code(first) != code(second)
        head += (code(first) if own else head) + digits(index if own else 0, (format.block - 1).bit_length())
    body = ""
    for i, x in enumerate(block):
        e = min(max(first if i == index else shared, low), high)
        significand = abs(Fraction(x)) / two_to(e - format.significand + 1)
        assert significand.denominator == 1, "not a value of the format"
        body += ("1" if math.copysign(1, x) < 0 else "0") + digits(significand.numerator, format.significand)
    return head + body
