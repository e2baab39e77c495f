"""Sums of terms that have a flag for zero, and constant leading bits.

`recoup.gates.arithmetic` holds every bit of a zero at zero. Here a flag says that a term, such as a product, is zero;
its other bits then mean nothing, and its leading bit is constant. So is that of a sum where whatever cancels is flushed
by its exponent alone, as `flushes_nothing` says; elsewhere the sum's normalised leading bit tells whether it is zero.

Legend: a the term, a product; b the sum so far.
"""

from dataclasses import dataclass, replace
from typing import Any

from recoup.gates import arithmetic
from recoup.gates.arithmetic import Bits, Number, any_of, named, normalised, width_of
from recoup.gates.layout import Layout
from recoup.gates.module import amaranth

__all__ = ["Flagged", "add", "code", "either", "flagged", "flushes_nothing", "multiply", "quantise"]

hdl = amaranth("hdl")


@dataclass(frozen=True, slots=True)
class Flagged:
    """A number, and a flag that it is zero.

    Attributes:
        number: its leading bit is on top and constant; where it is zero its bits mean nothing.
        zero: one bit.
    """

    number: Number
    zero: Bits


def flushes_nothing(equal: int, width: int, nearest: bool, low: int, grain: int | None = None) -> bool:
    """Whether a + b = 0 is flushed although its leading bit is taken to be set.

    Operands that cancel have one binade, which is at most ``equal``, so that their sum of ``width`` + guard + 1 bits
    has a top bit of at most 2^(equal + 1). The normaliser counts its leading zeros by stages of 1, 2, 4 ... places: of
    a sum without any set bit it counts 2^stages - 1, and the exponent is read as at most

        equal + 1 - (2^stages - 1)

    which is flushed if it is below ``low``.

    Args:
        equal: the highest binade that a and b both may have.
        width: bits of the widest significand.
        nearest: whether sums are rounded to nearest, otherwise toward zero.
        low: the lowest binade of sums; without subnormals.
        grain: the exponent of a unit that sums are multiples of; from ``low`` on none is flushed.
    """
    if grain is not None and grain >= low:
        return False
    return equal + 1 - _counted(width + arithmetic.guard_bits(nearest)) < low


def _counted(leading: int) -> int:
    """The leading zeros that `recoup.gates.arithmetic.normalised` counts of zero."""
    return (1 << leading.bit_length()) - 1


def _topped(n: Number) -> Number:
    """A number that is not zero, with its leading bit on top: that bit is constant."""
    return replace(n, significand=hdl.Cat(n.significand[:-1], hdl.Const(1, 1)))


def flagged(n: Number, cleared: Bits = None) -> Flagged:
    """A number with its leading bit on top, whose own flag that bit is; zero where ``cleared``."""
    return Flagged(_topped(n), ~n.nonzero if cleared is None else ~n.nonzero | cleared)


def multiply(m: Any, a: Number, b: Number, name: str) -> Flagged:
    """The exact product of two numbers with their leading bits on top, which are constant in the multiplier."""
    zero = named(m, f"{name}_zero", ~(a.nonzero & b.nonzero))
    product = named(m, f"{name}_significand", _topped(a).significand * _topped(b).significand)
    most = a.most + b.most
    exponent = named(m, f"{name}_exponent", (a.exponent + b.exponent)[: width_of(most)])
    exact = Number(a.sign ^ b.sign, exponent, product, a.low + b.low, most, 1, a.least + b.least)
    return Flagged(_topped(normalised(m, exact, f"{name}_exact")), zero)


def quantise(m: Any, n: Flagged, layout: Layout, name: str, grain: int | None = None) -> Flagged:
    """The number rounded, flushed and saturated, in a layout without subnormals.

    ``grain``: an exponent that the number has at least where it is not zero.
    """
    number, M = n.number, layout.fraction
    depth, span = layout.low - number.base, layout.high - layout.low
    if depth <= 0 <= depth + span < number.most and not layout.nearest and layout.top == (1 << M) - 1:
        return _saturated(m, n, layout, name)
    deep = depth > 0 and (grain is None or grain < layout.low)
    reach, E = max(number.most - depth, 0), width_of(span)
    # The exponent as a signed number of binades above the smallest.
    binade = named(m, f"{name}_binade", arithmetic.offset(number.exponent, number.most, -depth))
    zero = named(m, f"{name}_zero", n.zero | binade[-1]) if deep else n.zero
    binade = hdl.Cat(binade, hdl.Const(0, 1))[: width_of(reach)]
    significand = hdl.Cat(hdl.Const(0, max(M + 1 - number.width, 0)), number.significand)
    cut = len(significand) - (M + 1)
    fraction = significand[cut:-1]
    if layout.nearest and (cut or number.sticky is not None):  # through the fraction into the exponent
        rest = hdl.Cat(*([] if number.sticky is None else [number.sticky]), significand[: max(cut - 1, 0)])
        half = significand[cut - 1] if cut else hdl.Const(0, 1)
        up = named(m, f"{name}_up", arithmetic.rounds_up(half, any_of(rest), significand[cut]))
        reach += 1
        rank = named(m, f"{name}_rounded", hdl.Cat(fraction, binade[: width_of(reach)]) + up)
        fraction, binade = rank[:M], rank[M : M + width_of(reach)]
    field = hdl.Cat(binade, hdl.Const(0, E))[:E]
    if (reach + 1) << M > (span << M) + layout.top + 1:
        full = layout.top == (1 << M) - 1  # then the binade alone tells
        above = arithmetic.above(binade, span) if full else hdl.Cat(fraction, binade) > (span << M) + layout.top
        over = named(m, f"{name}_over", above)
        fraction = fraction | over.replicate(M) if full else hdl.Mux(over, layout.top, fraction)[:M]
        field = (field | over.replicate(E)) if span == (1 << E) - 1 else hdl.Mux(over, span, field)[:E]
    least, most = min(max(number.least - depth, 0), span), min(reach, span)
    kept = Number(number.sign, field, hdl.Cat(fraction, hdl.Const(1, 1)), layout.low - M, most, least=least)
    return Flagged(kept, zero)


def _saturated(m: Any, n: Flagged, layout: Layout, name: str) -> Flagged:
    """The number cut and saturated, where none is flushed and each bit of the largest fraction is set.

    The exponent is bounded before it is counted from the lowest binade: two gates fewer than afterwards.
    """
    number, M = n.number, layout.fraction
    above, span = number.base - layout.low, layout.high - layout.low
    limit = span - above
    over = named(m, f"{name}_over", number.exponent > limit)
    exponent = hdl.Cat(*(bit | over if limit >> i & 1 else bit & ~over for i, bit in enumerate(number.exponent)))
    exponent = named(m, f"{name}_clamped", exponent[: width_of(limit)])
    binade = named(m, f"{name}_binade", arithmetic.offset(exponent, limit, above))
    significand = hdl.Cat(hdl.Const(0, max(M + 1 - number.width, 0)), number.significand)
    fraction = significand[len(significand) - (M + 1) : -1] | over.replicate(M)
    least = min(number.least + above, span)
    kept = Number(number.sign, binade, hdl.Cat(fraction, hdl.Const(1, 1)), layout.low - M, span, least=least)
    return Flagged(kept, n.zero)


def code(n: Flagged, layout: Layout) -> Bits:
    """The code of a number that is quantised to the layout, or to one whose lowest binade is higher."""
    fraction, nonzero = n.number.significand[:-1], ~n.zero
    significand = hdl.Cat(fraction & nonzero.replicate(len(fraction)), nonzero)
    exponent = arithmetic.offset(n.number.exponent, n.number.most, n.number.base - layout.low)
    return arithmetic.pack(replace(n.number, exponent=exponent, significand=significand), layout)


def either(m: Any, chosen: Bits, one: Flagged, other: Flagged, name: str) -> Flagged:
    """``one`` where chosen, else ``other``; neither has a sticky bit."""
    zero = named(m, f"{name}_zero", hdl.Mux(chosen, one.zero, other.zero))
    return Flagged(_topped(arithmetic.either(m, chosen, one.number, other.number, name)), zero)


def add(m: Any, a: Flagged, b: Number | Flagged, layout: Layout, name: str, grain: int | None = None) -> Flagged:
    """Q(a + b), in a layout without subnormals; ``grain`` as in `quantise`.

    A term that is zero is the smaller, shifts out whole and is not subtracted.
    """
    b = b if isinstance(b, Flagged) else flagged(b)
    one, other, nearest = a.number, b.number, layout.nearest
    width = max(one.width, other.width, layout.fraction + 1)
    base, guard = min(one.base, other.base), arithmetic.guard_bits(nearest)
    most = max(n.most + n.base for n in (one, other)) - base
    keys, parts = arithmetic.order_keys(one, other, base, most, width)
    of_a, of_b = (hdl.Cat(*key[:2]) for key in keys)  # not the leading bits, which are constant
    missing = named(m, f"{name}_nothing", b.zero)
    none, both = named(m, f"{name}_none", a.zero | missing), a.zero & missing
    swap = named(m, f"{name}_swap", ~missing & (a.zero | ~(of_b < of_a)))
    sign, exponent, large = (
        named(m, f"{name}_large_{i}", hdl.Mux(swap, y, x)) for i, (x, y) in arithmetic.by_part(parts)
    )
    _, lower, small = (named(m, f"{name}_small_{i}", hdl.Mux(swap, x, y)) for i, (x, y) in arithmetic.by_part(parts))
    reach = max(x.most + x.base - y.least - y.base for x, y in ((one, other), (other, one)))
    distance = named(m, f"{name}_distance", (exponent - lower)[: width_of(max(reach, 0))])
    aligned, sticky = _shifted_out(m, hdl.Cat(hdl.Const(0, guard), small), distance, none, f"{name}_aligned")
    sticky = named(m, f"{name}_sticky", sticky & ~none) if nearest else sticky
    subtract = named(m, f"{name}_subtract", (one.sign ^ other.sign) & ~none)
    total = hdl.Cat(hdl.Const(0, guard), large) + (aligned ^ subtract.replicate(width + guard)) + (subtract & ~sticky)
    total = named(m, f"{name}_total", total[: width + guard + 1])
    significand = hdl.Cat(total[:-1], total[-1] & ~subtract)
    kept = sticky if nearest else None
    exact = Number(sign, exponent, significand, base + 1 - width - guard, most, width + guard, sticky=kept)
    found = normalised(m, exact, f"{name}_total")
    equal = min(n.most + n.base for n in (one, other))
    nothing = both if flushes_nothing(equal, width, nearest, layout.low, grain) else both | ~found.nonzero
    return quantise(m, Flagged(_topped(found), nothing), layout, f"{name}_rounded", grain)


def _shifted_out(m: Any, value: Bits, distance: Bits, gone: Bits, name: str) -> tuple[Bits, Bits]:
    """A value shifted right, and out of its bits where it is ``gone``; `arithmetic.shifted_right`.

    Few bits of the distance, set, shift it out; where the distance has no such value, its bits are cleared.
    """
    far = min(range(len(value), 1 << len(distance)), key=lambda k: (k.bit_count(), k), default=0)
    if far:
        distance = named(m, f"{name}_far", distance | hdl.Mux(gone, far, 0))
    aligned, sticky = arithmetic.shifted_right(m, value, distance, name)
    return (aligned if far else named(m, f"{name}_kept", aligned & ~gone.replicate(len(value)))), sticky
