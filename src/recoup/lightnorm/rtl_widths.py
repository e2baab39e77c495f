"""Formats and widths of LightNorm's forward unit, and the cycles of its divider: what gates and schedule agree on."""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, Self

import numpy as np

from recoup.errors import RecoupError
from recoup.fields import integer
from recoup.formats import BlockFloat, Float, FloatFields, ports
from recoup.gates.blocks import Block
from recoup.gates.module import Port
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.scale import constant

__all__ = ["Shift", "Widths"]

SIGNIFICAND = 52  # stored bits of the float64 constants


@dataclass(frozen=True, slots=True)
class Shift:
    """mu r, exact and with its highest bit on top, as a code: from bit 0 its significand, exponent and sign, and
    where it is asked, whether r has more bits than a step of F, and whether mu r has bits below the last of x r.

    Attributes:
        significand, exponent: bits.
        uneven: how many of r's lowest bits a step of F has not, and so many of mu r's x r has not; 0: it is not asked.
        low: the exponent of the significand's lowest bit where the exponent is 0.
        most: the largest exponent.
    """

    significand: int
    exponent: int
    low: int
    most: int
    uneven: int

    @property
    def sign(self) -> int:
        """Position of the sign bit."""
        return self.significand + self.exponent

    @property
    def bits(self) -> int:
        """Bits of the code."""
        return self.sign + 1 + 2 * (self.uneven > 0)

    def codes(self, mean: np.ndarray, reciprocal: np.ndarray) -> np.ndarray:
        """Of products of float64 values, which float64 holds, uint64."""
        product = mean * reciprocal
        fraction, exponent = np.frexp(np.abs(product))
        units = np.ldexp(fraction, self.significand).astype(np.uint64)
        field = np.where(units > 0, exponent - self.significand - self.low, 0).astype(np.uint64)
        sign = ((product < 0) | (product == 0) & np.signbit(product)).astype(np.uint64)
        found = units | field << np.uint64(self.significand) | (sign & (units > 0)) << np.uint64(self.sign)
        if not self.uneven:
            return found
        whole = np.ldexp(np.frexp(reciprocal)[0], self.significand // 2).astype(np.uint64)
        for at, value in enumerate((whole, units), 1):
            found = found | (value % np.uint64(1 << self.uneven) > 0).astype(np.uint64) << np.uint64(self.sign + at)
        return found

    def values(self, codes: np.ndarray) -> np.ndarray:
        """float64."""
        units = (codes & np.uint64((1 << self.significand) - 1)).astype(float)
        field = (codes >> np.uint64(self.significand) & np.uint64((1 << self.exponent) - 1)).astype(np.int64)
        return np.where(codes >> np.uint64(self.sign) & np.uint64(1), -1, 1) * np.ldexp(units, field + self.low)


@dataclass(frozen=True)
class Widths:
    """The widths of a unit.

    Attributes:
        config, elements, eps: as in `recoup.lightnorm.rtl.build`.
        centred: whether there is a mean: an RMS norm has none.
    """

    config: LightNorm
    elements: int
    eps: float
    centred: bool = True

    @classmethod
    def of(cls, config: LightNorm, elements: int, eps: float) -> Self:
        """The unit; errors as in `recoup.lightnorm.rtl.build`."""
        for name in ("forward", "backward", "statistics"):
            if getattr(config, name) is None:
                raise RecoupError(f"silicon: {config!r}: {name} is None: floats of the network's own are no hardware")
        if config.blocks_of_places:
            raise RecoupError(
                f"silicon: {config!r}: axis='place': the unit takes one element of each channel of a block a cycle; "
                "use axis='channel'"
            )
        elements = integer("silicon", "elements", elements, (2 * config.chunks, 1 << 30))
        if not (isinstance(eps, float) and 0 < eps < 1):
            raise RecoupError(f"silicon: eps={eps!r}: eps must be a float above 0 and below 1: 1/s needs it")
        return cls(config, elements, eps)

    @cached_property
    def form(self) -> Float:
        """F."""
        assert self.config.forward is not None
        return self.config.forward

    @cached_property
    def wide(self) -> Float:
        """S."""
        assert self.config.statistics is not None
        return self.config.statistics

    @cached_property
    def blocks(self) -> BlockFloat | None:
        """B."""
        return self.config.forward_blocks

    @cached_property
    def block(self) -> Block | None:
        """B as gates know it."""
        form = self.blocks
        if form is None:
            return None
        return Block(form.block, form.significand, form.exponent, form.min_exponent, form.shared == "outlier")

    def reciprocal(self, name: str, direction: Any, meaning: str) -> Port:
        """A port of 1/s in S, without its sign."""
        port = ports.port(name, direction, self.wide, meaning)
        legal = port.legal
        assert legal is not None
        edges = np.unique(self.unsigned(np.array(port.edges, np.uint64)))
        return replace(
            port,
            width=port.width - 1,
            edges=tuple(int(edge) for edge in edges),
            legal=lambda patterns: self.unsigned(legal(self.signed(patterns))),
        )

    def signed(self, codes: np.ndarray) -> np.ndarray:
        """Codes of S of those that have no sign."""
        at = np.uint64(FloatFields(self.wide).sign)
        low = (np.uint64(1) << at) - np.uint64(1)
        return codes & low | (codes & ~low) << np.uint64(1)

    def unsigned(self, codes: np.ndarray) -> np.ndarray:
        """Codes of S without their sign."""
        at = np.uint64(FloatFields(self.wide).sign)
        low = (np.uint64(1) << at) - np.uint64(1)
        return codes & low | codes >> np.uint64(1) & ~low

    @property
    def distributed(self) -> bool:
        """Whether the lanes compute x r - mu r, with mu r of the divider, instead of (x - mu) r: the same where x - mu
        is exact, and r is multiplied with x alone."""
        return self.config.difference is None

    @cached_property
    def shift(self) -> Shift:
        """How mu r lies in its register."""
        S = ports.layout(self.wide)
        lowest = S.low - S.fraction - (not S.flag)
        room = (1 << (2 * S.fraction * S.subnormals + 1).bit_length()) - 1
        most = 2 * (S.high - S.low + (not S.flag)) + room
        simple = not (self.form.rounding == "nearest" or self.form.subnormals or S.subnormals)
        uneven = S.fraction - self.form.mantissa if simple and S.fraction > 2 * self.form.mantissa else 0
        return Shift(2 * (S.fraction + 1), most.bit_length(), 2 * lowest - room, most, uneven)

    @property
    def lanes(self) -> int:
        """G."""
        return self.config.block or 1

    @property
    def flags(self) -> tuple[str, ...]:
        """The inputs that say what an element of pass 1 is, which are late by the cycle in which it is packed."""
        return ("collect", "first", "chunk", "fold", "low")

    @property
    def parameters(self) -> tuple[str, ...]:
        """What the affine step has; an RMS norm has no beta."""
        return ("gamma", "beta") if self.centred else ("gamma",)

    @property
    def channels(self) -> int:
        """How many channels have their statistics in the unit at a time: one a lane."""
        return self.lanes

    @property
    def unit(self) -> int:
        """The exponent of F's smallest step."""
        return self.form.min_exponent - self.form.mantissa

    @property
    def magnitude(self) -> int:
        """Bits of a magnitude in units of the smallest step."""
        return self.form.max_exponent + 1 - self.unit

    @property
    def sum_bits(self) -> int:
        """Bits of an exact sum, its sign included."""
        return self.magnitude + 1 + (self.elements - 1).bit_length()

    @property
    def span(self) -> int:
        """The most that a chunk adds to R, in largest values: a range is two, a magnitude one."""
        return 1 + self.centred

    @property
    def range_bits(self) -> int:
        """Bits of R."""
        return self.magnitude + self.span - 1 + (self.config.chunks - 1).bit_length()

    def factor(self, samples: int) -> float:
        """C(m), by which s is estimated from R."""
        return constant(samples, self.config.scale)

    @cached_property
    def constants(self) -> tuple[int, int]:
        """The exponents of the lowest and the highest bit of C(m)/K, for all m that may occur."""
        ends = [self.factor(m) / self.config.chunks for m in (2, -(-self.elements // self.config.chunks))]
        low, high = (math.frexp(end)[1] - 1 for end in (min(ends), max(ends)))
        return low - SIGNIFICAND, high

    @property
    def constant_bits(self) -> int:
        """Width of the port of C(m)/K."""
        low, high = self.constants
        return high - low + 1

    @property
    def s_unit(self) -> int:
        """The exponent of the unit of s."""
        bits = Fraction(self.eps).denominator.bit_length() - 1
        return min(self.unit + self.constants[0], -bits)

    @property
    def pad(self) -> int:
        """How many bits lower the unit of s is than that of R C."""
        return self.unit + self.constants[0] - self.s_unit

    @property
    def eps_units(self) -> int:
        """eps in units of s: s is never less."""
        return int(Fraction(self.eps) / Fraction(2) ** self.s_unit)

    @property
    def width(self) -> int:
        """Bits of s, and of the divider."""
        return max(self.scale_bits, self.sum_bits - 1, self.elements.bit_length())

    @property
    def scale_bits(self) -> int:
        """Bits of s: those of R C/K, which comes no nearer to all ones than an eighth, unless eps is as large."""
        product, eps = self.range_bits + self.constant_bits + self.pad, self.eps_units.bit_length()
        return max(product, eps) + 1 if eps > product - 4 else product

    @property
    def digits(self) -> int:
        """Bits of a quotient, or of a rounded sum: those of S, one more for its place, and to nearest another."""
        return self.wide.mantissa + (3 if self.wide.rounding == "nearest" else 2)

    @cached_property
    def phases(self) -> dict[str, tuple[int, int]]:
        """What the divider does, from the count on, before the count."""
        lengths = {
            "load": 1,
            "align": max(self.sum_bits - 1, self.elements.bit_length()) - 1,
            "mean": self.digits,
            "keep": 1,
            "scale": self.range_bits,
            "eps": 1,
            "align s": self.width - self.eps_units.bit_length(),
            "invert": self.digits,
            "end": 1,
            "product": self.wide.mantissa + 1 if self.distributed else 0,
            "store": 1,
        }
        found, at = {}, 0
        for name, length in lengths.items():
            found[name] = (at, at + length)
            at += length
        return found

    @property
    def settling(self) -> int:
        """Cycles that a channel's mean and reciprocal take."""
        return self.phases["store"][1] + 1

    @cached_property
    def starts(self) -> tuple[int, int, int]:
        """The counts of shifts that mean and reciprocal start from, and the exponent of both quotients' unit."""
        W = self.width
        mean = (self.unit - (W - self.sum_bits + 1)) + (W - self.elements.bit_length())
        inverse = -(W - 1) - self.s_unit
        least = min(mean - (self.sum_bits - 2), inverse)
        return mean - least, inverse - least, least - (self.digits - 1)
