"""Two wide registers in gates, with one adder: they shift, divide, multiply, and add and subtract magnitudes.

Shifts go by `COARSE` places a cycle and then by one, so that a register of W bits is normalised in about W / 8 + 7
cycles and has two multiplexers a bit instead of log2 W.

A difference of magnitudes takes two cycles: the first tells which is larger; the second makes a - b, or b - a as
~(a + ~b), with the same adder.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from recoup.gates.arithmetic import Bits, any_of, named, width_of
from recoup.gates.module import amaranth

__all__ = ["COARSE", "Wide", "cycles"]

hdl = amaranth("hdl")

COARSE = 8
"""Places of a coarse shift."""


def cycles(most: int) -> tuple[int, int]:
    """How many coarse and fine cycles shifts by up to ``most`` places take."""
    return most // COARSE, min(most, COARSE - 1)


@dataclass(slots=True)
class Wide:
    """The registers, what is asked of them in which cycle, and the gates that do it.

    Each of a, b and the count has one multiplexer a kind of change, however many cycles ask for it: what is asked is
    gathered first, and `connect` makes the gates.

    Attributes:
        width: bits of a and b.
        digits: bits of a quotient.
        product: the most bits of a product.
        divisor: the most bits of a divisor; below its highest bits b is zero then.
        clear: how many of a's lowest bits are zero wherever it is added to or divided, so that no adder reads them.
        a, b: unsigned; a has a bit more, for a remainder that is doubled.
        quotient: as `divide` makes it.
        shifts: a count, which shifts of a and `place` lower and other shifts of b raise.
        less: whether a < b, as `added` told when it was asked.
        asked: conditions and values by register and kind.
    """

    width: int
    digits: int
    product: int
    divisor: int
    clear: int
    a: Any
    b: Any
    quotient: Any
    shifts: Any
    less: Any
    asked: dict[tuple[str, str], list[tuple[Any, Any]]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def made(cls, width: int, digits: int, product: int, divisor: int, clear: int, most: int) -> "Wide":
        """The registers, of a ``shifts`` up to ``most``."""
        return cls(
            width,
            digits,
            product,
            divisor,
            clear,
            hdl.Signal(width + 1, name="dividend", reset_less=True),
            hdl.Signal(width, name="divisor", reset_less=True),
            hdl.Signal(digits, name="quotient", reset_less=True),
            hdl.Signal(width_of(most), name="shifts", reset_less=True),
            hdl.Signal(name="less", reset_less=True),
        )

    def load(self, now: Bits, register: str, value: Bits, below: int | None = None) -> None:
        """Set a or b, with ``below`` zeros under the value; None: left-aligned."""
        below = self.width - len(value) if below is None else below
        self.asked[register, "load"].append((now, hdl.Cat(hdl.Const(0, below), value)))

    def count(self, now: Bits, value: Bits | int) -> None:
        """Set the count."""
        value = hdl.Cat(hdl.Value.cast(value), hdl.Const(0, len(self.shifts)))[: len(self.shifts)]
        self.asked["shifts", "load"].append((now, value))

    def normalise(self, now: Bits, register: str, coarse: bool) -> None:
        """a or b up, where its highest bits are zeros. A zero never ends."""
        places, bits = COARSE if coarse else 1, self.a if register == "a" else self.b
        moves = now & ~any_of(bits[self.width - places : self.width])
        self._up(moves, register, places, raised=register == "b")

    def place(self, now: Bits, register: str, coarse: bool) -> None:
        """a or b up, until ``shifts`` is counted down."""
        self._up(now & any_of(self.shifts[3:] if coarse else self.shifts), register, COARSE if coarse else 1, False)

    def _up(self, moves: Bits, register: str, places: int, raised: bool) -> None:
        self.asked[register, f"up {places}"].append((moves, None))
        self.asked["shifts", f"{'plus' if raised else 'minus'} {places}"].append((moves, None))

    def multiply(self, now: Bits, factor: Bits) -> None:
        """b <- 2 b + (top bit of a) factor: from b = 0 on, as many cycles as a has bits, which moves up."""
        add = factor & self.a[self.width - 1].replicate(len(factor))
        self.asked["b", "load"].append((now, ((self.b[: self.product] << 1) + add)[: self.product]))
        self.asked["a", "up 1"].append((now, None))

    def added(self, m: Any, subtract: Bits, turned: Bits) -> tuple[Bits, Bits]:
        """Whether a >= b, and a + b, a - b or, turned, b - a, in as many bits as a has."""
        W = self.width + 1
        other = hdl.Cat(self.b, hdl.Const(0, 1)) ^ subtract.replicate(W)
        one = hdl.Cat(hdl.Const(0, self.clear), self.a[self.clear :])
        total = named(m, "added", (one + other + (subtract & ~turned))[: W + 1])
        return total[W], named(m, "combined", total[:W] ^ turned.replicate(W))

    def divide(self, now: Bits, fits: Bits, difference: Bits) -> None:
        """A bit of the quotient of a / b, which `added` subtracts; a is doubled after it."""
        self.asked["a", "up 1"].append((now, None))
        self.asked["a", "less"].append((now & fits, difference))
        self.asked["quotient", "up"].append((now, fits))

    def connect(self, m: Any) -> None:
        """The gates of all that was asked."""
        W, low = self.width, self.width - self.divisor
        doubled = self.a[:W]
        for now, difference in self.asked["a", "less"]:
            doubled = hdl.Cat(self.a[:low], hdl.Mux(now, difference[low:W], self.a[low:W]))
        for name, register, kept in (("a", self.a, doubled), ("b", self.b, self.b)):
            with m.If(self._any(name, "up 1")):
                m.d.sync += register.eq(hdl.Cat(hdl.Const(0, 1), kept))
            with m.Elif(self._any(name, f"up {COARSE}")):
                m.d.sync += register.eq(register[:W] << COARSE)
            with m.Elif(self._any(name, "load")):
                m.d.sync += register.eq(self._value(name, W))
        for sign, name in ((1, "plus"), (-1, "minus")):
            for places in (1, COARSE):
                with m.If(self._any("shifts", f"{name} {places}")):
                    m.d.sync += self.shifts.eq(self.shifts + sign * places)
        with m.If(self._any("shifts", "load")):
            m.d.sync += self.shifts.eq(self._value("shifts", len(self.shifts)))
        for now, fits in self.asked["quotient", "up"]:
            with m.If(now):
                m.d.sync += self.quotient.eq(hdl.Cat(fits, self.quotient[:-1]))

    def _any(self, register: str, kind: str) -> Bits:
        return hdl.Cat(*(now for now, _ in self.asked[register, kind])).any()

    def _value(self, register: str, width: int) -> Bits:
        """What is loaded, each value masked by its cycle."""
        found: Bits = hdl.Const(0, width)
        for now, value in self.asked[register, "load"]:
            found = found | (value & now.replicate(len(value)))
        return found[:width]
