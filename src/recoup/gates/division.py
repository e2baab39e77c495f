"""A sequential divider in gates: two registers, a bit a cycle; it multiplies and normalises as well."""

from dataclasses import dataclass
from typing import Any

from recoup.gates.arithmetic import Bits, named, width_of
from recoup.gates.module import amaranth

__all__ = ["Divider"]

hdl = amaranth("hdl")


@dataclass(frozen=True, slots=True)
class Divider:
    """The registers a and b of ``width`` bits, a quotient of ``digits`` bits, and the count of shifts.

    With both operands normalised (top bits 1) the quotient a / b lies between 1/2 and 2: ``digits`` restoring steps
    give its bits from that of weight 1 down, and a then holds what is left, doubled.

    Attributes:
        width: bits of a and b.
        digits: bits of the quotient.
        most: the largest value of ``shifts``: those that b took, less those of a, above a start value.
        loaded: the most bits that a is loaded with; below these it is zero until it is divided, and need not be held.
    """

    width: int
    digits: int
    most: int
    loaded: int
    a: Any
    b: Any
    quotient: Any
    shifts: Any

    @classmethod
    def made(cls, m: Any, width: int, digits: int, most: int, loaded: int) -> "Divider":
        """The registers; what a may be loaded with moves up by a place wherever nothing else is asked of it."""
        a = hdl.Signal(width + 1, name="dividend", reset_less=True)
        b = hdl.Signal(width, name="divisor", reset_less=True)
        quotient = hdl.Signal(digits, name="quotient", reset_less=True)
        shifts = hdl.Signal(width_of(most), name="shifts", reset_less=True)
        m.d.sync += a.eq(hdl.Cat(hdl.Const(0, width - loaded + 1), a[width - loaded : -1]))
        return cls(width, digits, most, loaded, a, b, quotient, shifts)

    def load(self, m: Any, a: Bits, b: Bits, shifts: int | Bits) -> None:
        """Set both, left-aligned, and the count."""
        m.d.sync += self.a.eq(hdl.Cat(hdl.Const(0, self.width - len(a)), a))
        m.d.sync += self.b.eq(hdl.Cat(hdl.Const(0, self.width - len(b)), b))
        m.d.sync += self.shifts.eq(shifts)

    def normalise(self, m: Any) -> None:
        """One cycle: a and b each by a place, where the top bit is 0. A zero never ends."""
        up, down = ~self.b[self.width - 1], ~self.a[self.width - 1]
        with m.If(~down):
            m.d.sync += self.a[self.width - self.loaded :].eq(self.a[self.width - self.loaded :])
        with m.If(up):
            m.d.sync += self.b.eq(self.b << 1)
        with m.If(up & ~down):
            m.d.sync += self.shifts.eq(self.shifts + 1)
        with m.Elif(down & ~up):
            m.d.sync += self.shifts.eq(self.shifts - 1)

    def load_divisor(self, m: Any, b: Bits, shifts: int) -> None:
        """Set b, left-aligned, and the count; a goes on."""
        m.d.sync += self.b.eq(hdl.Cat(hdl.Const(0, self.width - len(b)), b))
        m.d.sync += self.shifts.eq(shifts)

    def align_divisor(self, m: Any) -> None:
        """One cycle: b by a place, where its top bit is 0; a goes on. A zero never ends."""
        with m.If(~self.b[self.width - 1]):
            m.d.sync += [self.b.eq(self.b << 1), self.shifts.eq(self.shifts + 1)]

    def load_one(self, m: Any) -> None:
        """Set a to 1, normalised."""
        m.d.sync += self.a.eq(1 << self.width - 1)

    def divide(self, m: Any) -> None:
        """One cycle: a bit of the quotient."""
        difference = named(m, "difference", (self.a - self.b)[: self.width + 2])
        fits = ~difference[-1]
        rest = hdl.Mux(fits, difference[: self.width], self.a[: self.width])
        m.d.sync += self.a.eq(hdl.Cat(hdl.Const(0, 1), rest))
        m.d.sync += self.quotient.eq(hdl.Cat(fits, self.quotient[:-1]))

    def multiply(self, m: Any, constant: Bits) -> None:
        """One cycle of b <- 2 b + (top bit of a) constant: from b = 0 on, as many as a has bits, which moves up."""
        add = constant & self.a[self.width - 1].replicate(len(constant))
        m.d.sync += self.b.eq(((self.b << 1) + add)[: self.width])
