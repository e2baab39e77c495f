"""What a number is: the three families of formats that recoup's hardware computes in.

A format is a small frozen value: it validates itself, hashes, compares, and its repr can be pasted back. Every value
of every legal format is a float64, so the numbers named here are exact.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

from recoup.errors import RecoupError
from recoup.fields import Value, boolean, choice, integer, is_number

__all__ = ["BlockFloat", "Float", "Int"]

Rounding = Literal["nearest", "zero", "stochastic"]
FloatOverflow = Literal["saturate", "inf"]
IntOverflow = Literal["saturate", "wrap"]
Shared = Literal["outlier", "max"]

# Exponents and mantissa of float64's normal numbers, so that no format is finer or wider than the arithmetic below it.
MIN_EXPONENT, MAX_EXPONENT, MAX_MANTISSA = -1022, 1023, 52
MAX_LISTED = 1 << 16


@dataclass(frozen=True, slots=True)
class Float(Value):
    """Floating point with one sign bit, ``mantissa`` stored fraction bits and a range of binades.

    The values are zero of either sign and

        +-2^e (1 + f / 2^mantissa),   0 <= f < 2^mantissa,   min_exponent <= e <= max_exponent

    up to ``largest``; with ``subnormals`` also the multiples of ``2^(min_exponent - mantissa)`` below
    ``2^min_exponent``.

    Rounding acts on ``|x| / quantum`` with ``quantum = 2^(max(floor(log2|x|), min_exponent) - mantissa)``:
    ``nearest`` takes the nearest integer, ties to the even one (with mantissa 0 that is the larger magnitude between
    two normals, and zero between zero and ``2^min_exponent``); ``zero`` the integer part; ``stochastic`` goes up with a
    probability equal to the fraction. Without ``subnormals`` an *unrounded* ``|x| < 2^min_exponent`` gives zero with
    x's sign, whatever the rounding. A zero result always has x's sign; NaN propagates.

    Attributes:
        mantissa: stored fraction bits, 0 to 52 (the hidden bit is not counted).
        min_exponent: exponent of the smallest normal, -1022 to 1023.
        max_exponent: exponent of the top binade, min_exponent to 1023.
        subnormals: gradual underflow; otherwise flush to zero.
        rounding: ``nearest``, ``zero`` (truncation of the magnitude) or ``stochastic``.
        overflow: what a result above the largest value becomes. ``saturate``: the largest value, from infinities too.
            ``inf``: infinity; ``nearest`` overflows from the largest value plus half an ulp on (that tie included,
            also where the top binade is incomplete), ``stochastic`` with the probability of rounding up, and ``zero``
            keeps every finite x finite.
        largest: the top value where the top binade is incomplete (e4m3fn: 448). None, and what a complete binade's top
            is turned into, means ``2^max_exponent (2 - 2^-mantissa)``; see `largest_value`.

    Raises:
        RecoupError: a field outside these values; the message names the field and what is legal.

    Source: IEEE 754-2019 section 3.3; Blumenfeld et al., ICLR 2024, section 2 (`Float.lba`). That stochastic rounding
    may overflow to infinity and that ``nearest`` overflows at its tie are our definitions.

    >>> Float.parse("e4m3fn")
    Float(mantissa=3, min_exponent=-6, max_exponent=8, subnormals=True, rounding='nearest', overflow='saturate', \
largest=448.0)
    """

    mantissa: int
    min_exponent: int
    max_exponent: int
    subnormals: bool = True
    rounding: Rounding = "nearest"
    overflow: FloatOverflow = "saturate"
    largest: float | None = None

    def __post_init__(self) -> None:
        self._set("mantissa", integer("Float", "mantissa", self.mantissa, (0, MAX_MANTISSA)))
        low = integer("Float", "min_exponent", self.min_exponent, (MIN_EXPONENT, MAX_EXPONENT))
        self._set("min_exponent", low)
        note = f" (min_exponent is {low})"
        self._set("max_exponent", integer("Float", "max_exponent", self.max_exponent, (low, MAX_EXPONENT), note))
        boolean("Float", "subnormals", self.subnormals)
        choice("Float", "rounding", self.rounding, get_args(Rounding))
        choice("Float", "overflow", self.overflow, get_args(FloatOverflow))
        if self.largest is not None:
            self._set("largest", self._checked_largest(self.largest))

    def _checked_largest(self, largest: Any) -> float | None:
        bottom, step = math.ldexp(1.0, self.max_exponent), math.ldexp(1.0, self.max_exponent - self.mantissa)
        top = self._complete_top
        if not is_number(largest) or not bottom <= largest <= top or (largest - bottom) % step:
            raise RecoupError(
                f"Float(largest={largest!r}): largest must be a value of the top binade, "
                f"from {bottom!r} to {top!r} in steps of {step!r}"
            )
        return None if largest == top else float(largest)

    @property
    def _complete_top(self) -> float:
        return math.ldexp(2.0 - math.ldexp(1.0, -self.mantissa), self.max_exponent)

    @property
    def largest_value(self) -> float:
        """The largest finite value."""
        return self._complete_top if self.largest is None else self.largest

    @property
    def smallest_normal(self) -> float:
        """``2^min_exponent``."""
        return math.ldexp(1.0, self.min_exponent)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest value above zero: ``2^(min_exponent - mantissa)``, or the smallest normal without subnormals."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa * self.subnormals)

    @property
    def bits(self) -> int:
        """Bits of storage: a sign, the exponent field and the mantissa.

        The exponent field counts the binades and one code for the subnormals. Without subnormals zero is not counted as
        a code of its own, as the LBA paper counts (4 exponent bits, 7 of mantissa: 12 bits).
        """
        codes = self.max_exponent - self.min_exponent + 1 + self.subnormals
        return 1 + (codes - 1).bit_length() + self.mantissa

    def values(self) -> list[float]:
        """Every non-negative finite value in ascending order, for formats with at most 2^16 of them.

        >>> Float.parse("e2m1fn").values()
        [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        """
        steps = 1 << self.mantissa
        count = (self.max_exponent - self.min_exponent + 1 + self.subnormals) * steps
        if count > MAX_LISTED:
            raise RecoupError(f"{self!r}.values(): {count} values; at most {MAX_LISTED} are listed")
        tiny = math.ldexp(1.0, self.min_exponent - self.mantissa)
        low = [i * tiny for i in range(1, steps)] if self.subnormals else []
        binades = range(self.min_exponent, self.max_exponent + 1)
        normal = [math.ldexp(1 + f / steps, e) for e in binades for f in range(steps)]
        return [0.0, *low, *(value for value in normal if value <= self.largest_value)]

    @classmethod
    def ieee(cls, exponent: int, mantissa: int, bias: int | None = None, **options: Any) -> "Float":
        """The IEEE 754 layout: exponent codes 0 and ``2^exponent - 1`` are reserved.

        ``min_exponent = 1 - bias`` and ``max_exponent = 2^exponent - 2 - bias``; bias None is ``2^(exponent-1) - 1``.
        ``options`` are `Float`'s further fields.

        Raises:
            RecoupError: exponent not 2 to 11, or a bias that leaves float64's range of exponents.

        >>> Float.ieee(5, 10).largest_value  # float16
        65504.0
        """
        exponent = integer("Float.ieee", "exponent", exponent, (2, 11))
        if bias is None:
            bias = (1 << (exponent - 1)) - 1
        bias = integer("Float.ieee", "bias", bias, ((1 << exponent) - 2 - MAX_EXPONENT, 1 - MIN_EXPONENT))
        return cls(mantissa, 1 - bias, (1 << exponent) - 2 - bias, **options)

    @classmethod
    def lba(
        cls,
        exponent: int,
        mantissa: int,
        bias: int,
        *,
        rounding: Rounding = "zero",
        overflow: FloatOverflow = "saturate",
    ) -> "Float":
        """The low bit-width accumulator's layout: every exponent code is a binade, no subnormals, no infinity.

        ``min_exponent = -bias`` and ``max_exponent = 2^exponent - 1 - bias``; truncation and saturation by default.

        Raises:
            RecoupError: exponent not 1 to 11, or a bias that leaves float64's range of exponents.

        Source: Blumenfeld, Hubara and Soudry, "Towards Cheaper Inference in Deep Networks with Lower Bit-Width
        Accumulators", ICLR 2024.

        >>> Float.lba(4, 7, bias=10).largest_value  # the paper's 12-bit accumulator, M7E4
        63.75
        """
        exponent = integer("Float.lba", "exponent", exponent, (1, 11))
        bias = integer("Float.lba", "bias", bias, ((1 << exponent) - 1 - MAX_EXPONENT, -MIN_EXPONENT))
        return cls(mantissa, -bias, (1 << exponent) - 1 - bias, False, rounding, overflow)

    @classmethod
    def parse(cls, name: str) -> "Float":
        """A format by its name in ml_dtypes, with or without its ``float8_`` prefix; or LightNorm's, ``fp10_*``.
        ``e2m1`` is ``e2m1fn``.

        All saturate; ml_dtypes' names round to nearest. Formats without a negative zero (``*fnuz``) are given by
        their values: a zero result keeps x's sign.

        Raises:
            RecoupError: an unknown name; the message lists the known ones.

        >>> Float.parse("float8_e5m2") == Float.ieee(5, 2)
        True
        """
        named = _named_floats()
        short = str(name).removeprefix("float8_").removeprefix("float6_").removeprefix("float4_")
        short = ALIASES.get(short, short)
        if short not in named:
            raise RecoupError(f"Float.parse({name!r}): unknown format; the names are {', '.join(named)}")
        return named[short]


ALIASES = {"e2m1": "e2m1fn"}
"""Names that the units' makers use for a format of ml_dtypes."""


@cache
def _named_floats() -> dict[str, Float]:
    return {
        "float64": Float.ieee(11, 52),
        "float32": Float.ieee(8, 23),
        "tf32": Float.ieee(8, 10),
        "bfloat16": Float.ieee(8, 7),
        "float16": Float.ieee(5, 10),
        "e5m2": Float.ieee(5, 2),
        "e4m3": Float.ieee(4, 3),
        "e3m4": Float.ieee(3, 4),
        "e4m3fn": Float(3, -6, 8, largest=448.0),
        "e5m2fnuz": Float(2, -15, 15),
        "e4m3fnuz": Float(3, -7, 7),
        "e4m3b11fnuz": Float(3, -10, 4),
        "e3m2fn": Float(2, -2, 4),
        "e2m3fn": Float(3, 0, 2),
        "e2m1fn": Float(1, 0, 2),
        "fp10_154": Float.ieee(5, 4, subnormals=False, rounding="zero"),
        "fp10_163": Float.ieee(6, 3, subnormals=False, rounding="zero"),
    }


@dataclass(frozen=True, slots=True)
class Int(Value):
    """Integers of ``bits`` bits: two's complement, or unsigned.

        y = the integer nearest to x, ties to even; then the overflow policy

    A zero result is +0, since integers have no negative zero. NaN propagates.

    Attributes:
        bits: width, 1 to 53 (so that every value is a float64), the sign bit included. A float32 tensor takes at most
            24 bits; `quantize` refuses more.
        signed: ``-2^(bits-1) .. 2^(bits-1) - 1``, otherwise ``0 .. 2^bits - 1``.
        overflow: ``saturate`` to the ends of that range, infinities too, or ``wrap`` modulo ``2^bits`` as two's
            complement does. An infinity has no residue: wrapping it gives NaN.

    Raises:
        RecoupError: a field outside these values; the message names the field and what is legal.

    Source: two's complement arithmetic; the NaN of a wrapped infinity is our definition.

    >>> Int(bits=4).smallest_value, Int(bits=4).largest_value
    (-8.0, 7.0)
    """

    bits: int = 8
    signed: bool = True
    overflow: IntOverflow = "saturate"

    def __post_init__(self) -> None:
        self._set("bits", integer("Int", "bits", self.bits, (1, MAX_MANTISSA + 1)))
        boolean("Int", "signed", self.signed)
        choice("Int", "overflow", self.overflow, get_args(IntOverflow))

    @property
    def smallest_value(self) -> float:
        """The lower end of the range."""
        return -math.ldexp(1.0, self.bits - 1) if self.signed else 0.0

    @property
    def largest_value(self) -> float:
        """The upper end of the range."""
        return math.ldexp(1.0, self.bits - self.signed) - 1.0


@dataclass(frozen=True, slots=True)
class BlockFloat(Value):
    """Block floating point: neighbours along one dimension share an exponent.

    With ``e_i = floor(log2|x_i|)`` (zeros and NaN ignored; an infinity counts as above every finite exponent), E the
    largest and E2 the second largest ``e_i`` of the block,

        y_i = +-min(round(|x_i| / quantum), 2^significand - 1) quantum,   quantum = 2^(shared - significand + 1)

    where ``shared`` is E; with ``shared="outlier"``, when exactly one element sits at E, that element is kept as it is
    and ``shared`` is E2 for the others. The shared exponent is clamped to the range of ``Float.ieee(exponent, ...)``,
    so that what exceeds the top, a carry out of the significand included, saturates to the largest multiple, and what
    lies below the bottom is rounded to the smallest quantum. A zero result has x's sign; NaN propagates for its own
    element.

    Attributes:
        exponent: bits of the shared exponent, 2 to 11.
        significand: bits of an element's magnitude, the hidden bit counted, 1 to 53.
        block: elements per block; the last block along the dimension may be shorter.
        dim: the dimension along which blocks lie; negative counts from the end.
        shared: ``outlier`` or ``max``.
        rounding: ``zero`` (truncation of the magnitude), ``nearest`` (ties to even) or ``stochastic``.

    Raises:
        RecoupError: a field outside these values; the message names the field and what is legal.

    Source: Noh et al., "LightNorm", ICCD 2022, and its authors' code (the outlier rule). Clamping, saturation and what
    NaN and infinities do are our definitions. So is that an outlier is kept as it is whatever its value: its own
    precision and range are a `Float`'s business, which LightNorm applies first.

    >>> BlockFloat(block=8).replace(shared="max").bits
    6.625
    """

    exponent: int = 5
    significand: int = 5
    block: int = 4
    dim: int = 1
    shared: Shared = "outlier"
    rounding: Rounding = "zero"

    def __post_init__(self) -> None:
        self._set("exponent", integer("BlockFloat", "exponent", self.exponent, (2, 11)))
        self._set("significand", integer("BlockFloat", "significand", self.significand, (1, MAX_MANTISSA + 1)))
        self._set("block", integer("BlockFloat", "block", self.block, (1, 1 << 31)))
        self._set("dim", integer("BlockFloat", "dim", self.dim, (-64, 63)))
        choice("BlockFloat", "shared", self.shared, get_args(Shared))
        choice("BlockFloat", "rounding", self.rounding, get_args(Rounding))

    @property
    def min_exponent(self) -> int:
        """The smallest shared exponent, ``2 - 2^(exponent-1)``."""
        return 2 - (1 << (self.exponent - 1))

    @property
    def max_exponent(self) -> int:
        """The largest shared exponent, ``2^(exponent-1) - 1``."""
        return (1 << (self.exponent - 1)) - 1

    @property
    def bits(self) -> float:
        """Bits of storage per element of a full block.

        A sign, the significand and a share of the exponent; ``outlier`` adds a second exponent and the outlier's index.
        """
        shared = self.exponent
        if self.shared == "outlier":
            shared += self.exponent + (self.block - 1).bit_length()
        return 1 + self.significand + shared / self.block
