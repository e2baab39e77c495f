"""Formats and widths of LightNorm's forward unit, and the cycles of its divider: what gates and schedule agree on."""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Self

from recoup.errors import RecoupError
from recoup.fields import integer
from recoup.formats import BlockFloat, Float
from recoup.gates.blocks import Block
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.scale import constant

__all__ = ["Widths"]

SIGNIFICAND = 52  # stored bits of the float64 constants


@dataclass(frozen=True)
class Widths:
    """The widths of a unit.

    Attributes:
        config, elements, eps: as in `recoup.lightnorm.rtl.build`.
    """

    config: LightNorm
    elements: int
    eps: float

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

    @property
    def lanes(self) -> int:
        """G."""
        return self.config.block or 1

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
    def range_bits(self) -> int:
        """Bits of R."""
        return self.magnitude + 1 + (self.config.chunks - 1).bit_length()

    @cached_property
    def constants(self) -> tuple[int, int]:
        """The exponents of the lowest and the highest bit of C(m)/K, for all m that may occur."""
        ends = [
            constant(m, self.config.scale) / self.config.chunks for m in (2, -(-self.elements // self.config.chunks))
        ]
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
    def width(self) -> int:
        """Bits of s, and of the divider."""
        product = self.range_bits + self.constant_bits + self.unit + self.constants[0] - self.s_unit
        return max(product, self.sum_bits - 1, self.elements.bit_length())

    @property
    def digits(self) -> int:
        """Bits of a quotient: those of S, one more for its place, and to nearest another."""
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
            "align s": self.width - 1,
            "invert": self.digits,
            "end": 1,
        }
        found, at = {}, 0
        for name, length in lengths.items():
            found[name] = (at, at + length)
            at += length
        return found

    @property
    def settling(self) -> int:
        """Cycles that a channel's mean and reciprocal take."""
        return self.phases["end"][1] + 1

    @cached_property
    def starts(self) -> tuple[int, int, int]:
        """The counts of shifts that mean and reciprocal start from, and the exponent of both quotients' unit."""
        W = self.width
        mean = (self.unit - (W - self.sum_bits + 1)) + (W - self.elements.bit_length())
        inverse = -(W - 1) - self.s_unit
        least = min(mean - (self.sum_bits - 2), inverse)
        return mean - least, inverse - least, least - (self.digits - 1)
