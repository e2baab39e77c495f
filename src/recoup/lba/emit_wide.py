"""Steps in float64 lanes, for every format there is: nearest, stochastic, subnormals, fixed point, promotion.

A product of float32 operands is exact. A sum is truncated by the processor where every format truncates, and rounded
to odd elsewhere (see `reference.exact_sum`). Where sums are rounded to nearest, the processor's own rounding is enough
if the addends are quantised, have no more bits than the sum's format, and the finest bit of a term is at least
2^(min_exponent - 52) of that format (or nothing underflows):

- Both addends have at most 24 bits, so their float64 sum is inexact only if the smaller is less than 2^-28 of the
  larger one's leading bit. A sum below 2^(min_exponent + 1) is exact, its bits being multiples of the finest: so what
  is flushed, or rounded to subnormals, is not rounded before.
- An inexact sum is thus of normal magnitude, and so is the larger addend; having no more bits than the format, it is a
  value of the format (or beyond its largest, which saturates either way). The next tie is at least 2^-25 of its
  leading bit away, further than the sum and its float64 rounding, so both round to that value.

A term of more bits may itself be a tie, and a smaller addend that float64 loses would have broken it.

An integer sum that wraps takes products of any size. Those that may be ``FAR`` are reduced first, exactly: p has 48
bits, so p - R round(p / R), with R the power of two of the range, is a multiple of p's last bit that is no larger than
p; and from 2^48 R on p is a multiple of R.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from recoup.kernels.rounding import EXCEPTIONS_MASKED, TOWARD_ZERO
from recoup.lba.emit_code import OUTER, PRODUCT, SUM, Code, Step

Kind = Literal["mask", "zero", "nearest", "stochastic", "saturate", "wrap"]
SLOT = 8  # places for constants of each of the three quantisers, of which seven floats are used
LOW, TOP, SCALE, INVERSE, BOTTOM, RANGE, INVERSE_RANGE = range(7)  # floats
# Integers: a significand's kept bits; from a binade's exponent field up to that of the number whose last bit weighs a
# quantum; and down to that of the quantum.
MASK, SPREAD, DEPTH = range(3)
EXPONENT, SIGN = 0x7FF << 52, -(1 << 63)
INTEGER = 1.5 * 2.0**52  # adding and subtracting it rounds to an integer; 1.5, so that negative sums stay in its binade
RANDOM_BITS = 24
FAR = 2.0**49  # units, half of those that sums of are exact to half a unit and a bit: a product may round up
MULTIPLES = 2.0**48  # ranges


@dataclass(frozen=True, slots=True)
class Quantiser:
    """How one of the three quantisers rounds: ``mask`` is truncation without subnormals, the others take more steps.

    ``flush``: zero below the smallest normal; ``saturate`` and ``wrap``: integers in units of their scale.
    """

    kind: Kind
    flush: bool = False

    @property
    def integer(self) -> bool:
        """Fixed point."""
        return self.kind in ("saturate", "wrap")


@dataclass(frozen=True, slots=True)
class Wide:
    """The quantisers of product (None: fused), sum and outer sum, and how sums are rounded before them.

    ``far``: products may be so many units that a sum which wraps must not take them as they are.
    """

    product: Quantiser | None
    sum: Quantiser
    outer: Quantiser
    rounding: Literal["zero", "nearest", "odd"]
    far: bool = False

    wide = True

    @property
    def control(self) -> int:
        """Toward zero where every quantiser truncates."""
        return EXCEPTIONS_MASKED | (TOWARD_ZERO if self.rounding == "zero" else 0)

    @property
    def random(self) -> bool:
        """Whether any quantiser rounds stochastically."""
        return any(q is not None and q.kind == "stochastic" for q in (self.product, self.sum, self.outer))

    def term(self, code: Code, x: Any, w: Any, s: Any, draw: Any) -> Step:
        """s = Q_acc(Q_prod(x w) + s); fixed point sums are in units of the scale."""
        exact = p = code.b.fmul(x, w)
        if self.product is not None:
            p = quantise(code, p, self.product, PRODUCT, draw and _bound(draw, 0))
        if self.sum.integer:
            p = code.b.fmul(p, code.float_constants[SUM * SLOT + INVERSE])
        total = self._total(code, p, s)
        product = exact if self.product is not None else None
        near = self._total(code, _reduced(code, p, SUM * SLOT), s) if self.far else total
        return Step(quantise(code, near, self.sum, SUM, draw and _bound(draw, 1)), product, total)

    def add(self, code: Code, s: Any, y: Any, draw: Any) -> Step:
        """y = Q_acc(s + y), in units only if both are."""
        if self.sum.integer and not self.outer.integer:
            s = code.b.fmul(s, code.float_constants[SUM * SLOT + SCALE])
        total = self._total(code, s, y)
        return Step(quantise(code, total, self.outer, OUTER, draw and _bound(draw, 0)), None, total)

    def inside(self, code: Code, value: Any, place: int) -> Any:
        """|value| < the largest value; of an integer: rounded, it is within the ends."""
        b, at = code.b, place * SLOT
        quantiser = (self.product, self.sum, self.outer)[place]
        assert quantiser is not None
        if not quantiser.integer:
            return b.fcmp_ordered("<", code.floats(code.magnitude(value)), code.float_constants[at + TOP])
        units = _whole(code, value)
        below = b.fcmp_ordered("<=", units, code.float_constants[at + TOP])
        return b.and_(below, b.fcmp_ordered(">=", units, code.float_constants[at + BOTTOM]))

    def _total(self, code: Code, x: Any, y: Any) -> Any:
        return odd_sum(code, x, y) if self.rounding == "odd" else code.b.fadd(x, y)


def _bound(draw: Callable[[int], Any], offset: int) -> Callable[[], Any]:
    return lambda: draw(offset)


def quantise(code: Code, x: Any, quantiser: Quantiser, slot: int, draw: Callable[[], Any] | None) -> Any:
    """Q of an exact (or odd) number."""
    b, at = code.b, slot * SLOT
    if quantiser.integer:
        return _fixed(code, x, quantiser, at)
    low, top = code.float_constants[at + LOW], code.float_constants[at + TOP]
    if quantiser.kind == "mask":
        cut = code.masked(x, code.integer_constants[at + MASK])
        if quantiser.flush:
            # Chosen between the masked number and zero, not masked after a choice: AVX-512 does both in one operation.
            cut = b.select(b.fcmp_ordered(">=", code.floats(code.magnitude(x)), low), cut, code.zero)
        return code.limit(cut, top)
    size = code.floats(code.magnitude(x))
    rounded = _rounded(code, size, quantiser, at, draw)
    if quantiser.flush:
        # By the number as it was: what rounds up to the smallest normal is below it and still becomes zero.
        rounded = b.select(b.fcmp_ordered(">=", size, low), rounded, code.zero)
    rounded = code.smaller(rounded, top)
    return code.floats(b.or_(code.bits(rounded), b.and_(code.bits(x), code.constant(SIGN, code.integers))))


def _rounded(code: Code, size: Any, quantiser: Quantiser, at: int, draw: Callable[[], Any] | None) -> Any:
    """A magnitude as a multiple of its binade's quantum; below the smallest normal, of that one's.

    The processor rounds to nearest here, and adding a number whose last bit weighs a quantum makes it round there. The
    other modes take one quantum off where that went up, and stochastic rounding may then add one.
    """
    b, integers = code.b, code.integer_constants
    at_least = code.larger(size, code.float_constants[at + LOW])
    binade = b.and_(code.bits(at_least), code.constant(EXPONENT, code.integers))  # the exponent alone: a power of two
    large = code.floats(b.add(binade, integers[at + SPREAD]))
    rounded = b.fsub(b.fadd(size, large), large)
    if quantiser.kind == "nearest":
        return rounded
    quantum = code.floats(b.sub(binade, integers[at + DEPTH]))
    above = b.fcmp_ordered(">", rounded, size)
    rounded = b.fsub(rounded, b.select(above, quantum, code.zero))
    if quantiser.kind == "stochastic":
        assert draw is not None
        # Up where the fraction is at least 1 - u / 2^24: multiplied through by the quantum, all of it is exact.
        rest = b.fsub(code.constant(2.0**RANDOM_BITS), b.uitofp(draw(), code.vector))
        needed = b.fmul(b.fmul(rest, code.constant(2.0**-RANDOM_BITS)), quantum)
        up = b.fcmp_ordered(">=", b.fsub(size, rounded), needed)
        rounded = b.fadd(rounded, b.select(up, quantum, code.zero))
    return rounded


def _fixed(code: Code, x: Any, quantiser: Quantiser, at: int) -> Any:
    """An integer number of units, within the ends or wrapped to them by as many whole ranges as it is away."""
    b, floats = code.b, code.float_constants
    units = _whole(code, x)
    if quantiser.kind == "saturate":
        return code.larger(code.smaller(units, floats[at + TOP]), floats[at + BOTTOM])
    turns = b.fmul(b.fsub(units, floats[at + BOTTOM]), floats[at + INVERSE_RANGE])
    whole = _whole(code, turns)
    whole = b.fsub(whole, b.select(b.fcmp_ordered(">", whole, turns), code.constant(1.0), code.zero))
    return b.fsub(units, b.fmul(whole, floats[at + RANGE]))


def _reduced(code: Code, p: Any, at: int) -> Any:
    """A product without whole ranges."""
    b, floats = code.b, code.float_constants
    turns = b.fmul(p, floats[at + INVERSE_RANGE])
    rest = b.fsub(p, b.fmul(_whole(code, turns), floats[at + RANGE]))
    near = b.fcmp_ordered("<", code.floats(code.magnitude(turns)), code.constant(MULTIPLES))
    return b.select(near, rest, code.zero)


def _whole(code: Code, x: Any) -> Any:
    """The nearest integer, ties to even, below 2^51."""
    large = code.constant(INTEGER)
    return code.b.fsub(code.b.fadd(x, large), large)


def odd_sum(code: Code, x: Any, y: Any) -> Any:
    """`reference.exact_sum`."""
    b = code.b
    total, error = code.two_sum(x, y)
    bits, one = code.bits(total), code.constant(1, code.integers)
    outward = b.icmp_signed("==", b.fcmp_ordered(">", error, code.zero), b.fcmp_ordered(">", total, code.zero))
    moved = b.add(bits, b.select(outward, one, code.constant(-1, code.integers)))
    even = b.icmp_signed("==", b.and_(bits, one), code.constant(0, code.integers))
    inexact = b.and_(b.fcmp_ordered("!=", error, code.zero), even)
    return code.floats(b.select(inexact, moved, bits))
