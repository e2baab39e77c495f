"""Formats and widths of LightNorm's backward unit, and the cycles of what a channel takes once: what gates, schedule
and letter agree on.

Legend: g an element of dy in blocks, m the mean of g, S the sum of g xhat, sigma = gamma / s; f = C(m_k) / K.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recoup.formats import BlockFloat, Float, ports
from recoup.gates.layout import Layout
from recoup.gates.module import Port
from recoup.gates.wide import COARSE, cycles
from recoup.lightnorm import rtl_widths
from recoup.lightnorm.rtl_codes import Codes
from recoup.lightnorm.rtl_normalise import round_number

__all__ = ["Widths"]


@dataclass(frozen=True)
class Widths(Codes):
    """The widths of a unit, whose formats are the gradient's: ``form`` F', ``wide`` S', ``blocks`` B of F'."""

    @cached_property
    def activations(self) -> rtl_widths.Widths:
        """The forward unit's formats: F of xhat and gamma, S of r."""
        return rtl_widths.Widths(self.config, self.elements, self.eps)

    @cached_property
    def form(self) -> Float:
        """F'."""
        assert self.config.backward is not None
        return self.config.backward

    @cached_property
    def wide(self) -> Float:
        """S'."""
        assert self.config.gradient_statistics is not None
        return self.config.gradient_statistics

    @cached_property
    def blocks(self) -> BlockFloat | None:
        """B."""
        return self.config.backward_blocks

    # Sums ------------------------------------------------------------------------------------------------------------

    @property
    def cross_unit(self) -> int:
        """The exponent of the unit of S: a product of smallest steps."""
        return self.unit + self.activations.unit

    @property
    def cross_magnitude(self) -> int:
        """Bits of |g xhat| in its unit."""
        return self.magnitude + self.activations.magnitude

    @property
    def cross_bits(self) -> int:
        """Bits of S, its sign included."""
        return self.cross_magnitude + 1 + (self.elements - 1).bit_length()

    # sigma, and what is multiplied with it ---------------------------------------------------------------------------

    @cached_property
    def slope(self) -> tuple[int, int, int, int]:
        """Of sigma = gamma r: bits of its significand, how many leading zeros it may have, the exponent of its lowest
        bit where its exponent is 0, and the largest exponent."""
        F, S = ports.layout(self.activations.form), ports.layout(self.activations.wide)
        bits, leading, low, most = 0, 0, 0, 0
        for layout in (F, S):
            one = not layout.flag  # codes count binades from 1
            bits += layout.fraction + 1
            leading += layout.fraction * layout.subnormals
            low += layout.low - layout.fraction - one
            most += layout.high - layout.low + one
        plain = F.fraction == 0 or S.fraction == 0  # by a power of two nothing is carried
        return bits - plain, leading + (not plain), low, most

    @property
    def slope_bits(self) -> int:
        """Bits of sigma's significand."""
        return self.slope[0]

    @property
    def shift_bits(self) -> int:
        """Bits of the significand of m sigma."""
        return self.wide.mantissa + 1 + self.slope_bits

    @property
    def shift_leading(self) -> int:
        """How many leading zeros it may have."""
        return self.slope[1] + 1 + self.wide.mantissa * self.wide.subnormals

    @property
    def lifted(self) -> int:
        """What the exponent of m |sigma| counts more than that of m: its highest bit is brought on top."""
        return (1 << self.shift_leading.bit_length()) - 1

    @cached_property
    def constants(self) -> tuple[int, int]:
        """As the forward unit's, and low enough for m sigma, which is held by its highest bit."""
        low, high = super().constants
        return min(low, -self.lifted), high

    @property
    def span(self) -> int:
        """The largest exponent of g, m and S, counted from the smallest binade."""
        layout = self.layout
        return layout.high - layout.low

    @property
    def layout(self) -> Layout:
        """F' as gates know it."""
        return ports.layout(self.form)

    @property
    def spare(self) -> int:
        """Low bits of sigma that a step of F' has not, wherever sigma's highest bit is."""
        return self.slope_bits - self.slope[1] - (self.form.mantissa + 1)

    @property
    def fine(self) -> int:
        """Bits that m sigma has below the last of g sigma."""
        return self.wide.mantissa - self.form.mantissa

    @property
    def far(self) -> tuple[int, int]:
        """From how many binades on the smaller of m sigma and of g sigma is only more or less than nothing; see
        `recoup.lightnorm.backward_unit.lane.Lane`."""
        f, s = self.form.mantissa, self.wide.mantissa
        return round_number(f + 4, s - f + 1), round_number(s + 4, self.spare + s - f + 1)

    @property
    def flagged(self) -> bool:
        """Whether two flags stand for what is left out of m sigma and g sigma: above the sign of m |sigma| whether
        sigma has more bits than a step, and whether m sigma has bits below the last of g sigma."""
        f, s = self.form.mantissa, self.wide.mantissa
        simple = self.form.rounding == "zero" and not self.form.subnormals and self.slope[1] <= 1
        near, far = self.far
        return simple and f < s <= f + self.spare and near >= f + 4 and far >= s + 4

    @property
    def held(self) -> tuple[Port, Port]:
        """What a lane keeps of its channel: sigma, and |sigma| m. From bit 0 significand, exponent, sign, flags; the
        significand of m |sigma| has its highest bit on top."""
        bits, leading, _, most = self.slope
        return (
            _held("slope", bits, leading, most, "sigma = gamma r"),
            _held("shift", self.shift_bits, 0, self.span + self.lifted, "m |sigma|", 2 * self.flagged),
        )

    # What a channel takes once ---------------------------------------------------------------------------------------

    @property
    def places(self) -> tuple[int, int]:
        """In the registers of `recoup.gates.wide` at exponent 0: the lowest bit of m sigma, and of g sigma; that of
        f S sigma is 0."""
        assert self.constants[0] < 0
        return -self.constants[0], self.wide.mantissa - self.form.mantissa - self.constants[0]

    @property
    def width(self) -> int:
        """Bits of the registers: of |g sigma| + |m sigma| + |f S sigma| at their largest, or of a sum's magnitude."""
        shift, gradient = self.places
        sigma = (1 << self.slope_bits) - 1
        terms = (
            ((2 << self.form.mantissa) - 1) << gradient,
            ((2 << self.wide.mantissa) - 1) << shift,
            ((2 << self.wide.mantissa) - 1) * ((1 << self.constant_bits) - 1),
        )
        largest = sum(sigma * term << self.span for term in terms).bit_length()
        return max(largest, self.cross_bits - 1, self.sum_bits - 1)

    @property
    def clear(self) -> int:
        """How many of a's lowest bits are zero wherever it is added to, where it holds m sigma or g sigma, and where it
        is divided."""
        return min(self.places[0], self.width - max(self.sum_bits - 1, self.count_bits))

    @property
    def dx_digits(self) -> int:
        """Bits of what is rounded of an extremum's dx."""
        return self.form.mantissa + (2 if self.form.rounding == "nearest" else 1)

    @property
    def count_bits(self) -> int:
        """Bits of n."""
        return self.elements.bit_length()

    @cached_property
    def starts(self) -> tuple[int, int, int]:
        """The counts of shifts that S and the sum of g start from, and the exponent of the top bit at count 0."""
        cross = self.cross_unit + self.cross_bits - 2, _far(self.cross_bits - 1)
        total = self.unit + self.sum_bits - 2, _far(self.sum_bits - 1) + self.count_bits - 1
        least = min(top - far for top, far in (cross, total))
        return cross[0] - least, total[0] - least, least

    @property
    def start_of_dx(self) -> int:
        """The count of shifts that an extremum's dx starts from, less the exponent of sigma."""
        return _far(self.width)

    @property
    def lowest_of_dx(self) -> int:
        """The exponent of the top bit of an extremum's dx at count 0."""
        unit = self.form.min_exponent - self.wide.mantissa + self.constants[0] + self.slope[2]
        return unit + self.width - 1 - self.start_of_dx

    @property
    def most_shifts(self) -> int:
        """The largest count."""
        return max(
            self.starts[0],
            self.starts[1] + _far(self.count_bits),
            self.start_of_dx + self.slope[3],
            self.span + self.lifted,
        )

    @cached_property
    def sections(self) -> dict[str, dict[str, int]]:
        """What each of three control ports begins, and how many cycles every phase of it takes."""
        s = self.wide.mantissa + 1
        cross, total, count, dx = (
            cycles(bits - 1) for bits in (self.cross_bits - 1, self.sum_bits - 1, self.count_bits, self.width)
        )
        (coarse, fine), lifted = cycles(self.span), cycles(self.span + self.lifted)
        return {
            "settle": {
                "load cross": 1, "cross by eight": cross[0], "cross by one": cross[1], "keep cross": 1,
                "total by eight": total[0], "total by one": total[1], "keep total": 1,
                "count by eight": count[0], "count by one": count[1], "divide": self.digits, "keep mean": 1,
                "product": s, "store": 1,
            },
            "prepare": {
                "load factor": 1, "times slope": s, "load product": 1, "times constant": self.shift_bits,
                "load mean": 1,
                "cross up by eight": coarse, "cross up by one": fine, "load exponent": 1,
                "mean up by eight": lifted[0], "mean up by one": lifted[1],
                "compare prepared": 1, "combine prepared": 1,
            },
            "extremum": {
                "load gradient": 1, "gradient up by eight": coarse, "gradient up by one": fine,
                "compare": 1, "combine": 1, "dx by eight": dx[0], "dx by one": dx[1], "keep dx": 1,
            },
        }  # fmt: skip

    @cached_property
    def phases(self) -> dict[str, tuple[int, int]]:
        """From the count on, before the count; a section ends with a count of rest."""
        found, at = {}, 0
        for section in self.sections.values():
            for name, length in section.items():
                found[name] = (at, at + length)
                at += length
            at += 1
        return found

    @cached_property
    def ends(self) -> dict[str, tuple[int, int]]:
        """The count that a section begins at, and the one that it rests at."""
        found, at = {}, 0
        for name, section in self.sections.items():
            length = sum(section.values())
            found[name] = (at, at + length)
            at += length + 1
        return found

    def cycles_of(self, section: str) -> int:
        """Cycles from the one in which its control port is set to the one in which its result shows."""
        begin, end = self.ends[section]
        return end - begin + 1


def _far(bits: int) -> int:
    """By how much a value of so many bits, which may be zero, is shifted at most."""
    coarse, fine = cycles(bits - 1)
    return COARSE * coarse + fine


def _held(name: str, bits: int, leading: int, most: int, meaning: str, flags: int = 0) -> Port:
    """A lane's register: patterns that occur have no more leading zeros than they may, and no larger exponent.

    Flags are zero: which they are depends on sigma too, so the vectors set them, in
    `recoup.lightnorm.backward_unit.operands.Operands.kept`.
    """
    exponent = max(most.bit_length(), 1)

    def legal(patterns: np.ndarray) -> np.ndarray:
        patterns = np.asarray(patterns, np.uint64)
        significand = patterns & np.uint64((1 << bits) - 1)
        least = np.uint64(1 << max(bits - 1 - leading, 0))
        significand = np.where((significand > 0) & (significand < least), significand | least, significand)
        field = np.minimum(patterns >> np.uint64(bits) & np.uint64((1 << exponent) - 1), np.uint64(most))
        sign = patterns >> np.uint64(bits + exponent) & np.uint64(1)
        return significand | field << np.uint64(bits) | sign << np.uint64(bits + exponent)

    top = (1 << bits) - 1
    edges = (1 << bits - 1, top, top | most << bits, 1 << bits + exponent)
    return Port(name, "in", bits + exponent + 1 + flags, meaning, edges=edges, legal=legal)
