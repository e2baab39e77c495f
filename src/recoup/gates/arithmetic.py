"""Floating-point arithmetic in gates: unpack, multiply, align, add exactly, normalise, then quantise.

Everything a unit computes is exact until `quantise` rounds it once. A float on its way is a `Number`, whose ranges are
known when the gates are made: what cannot happen (underflow, saturation, a long shift) gets no gates.

An exact sum would be as wide as the formats' ranges. It need not be: the operand of smaller magnitude only matters down
to a guard bit below the widest significand (two to nearest), and below that only by whether anything is left, the
*sticky* bit. Truncation has it as the carry of the subtraction, L + ~S + not sticky; rounding to nearest keeps it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from recoup.gates.layout import Layout
from recoup.gates.module import amaranth

__all__ = [
    "Layout",
    "Number",
    "above",
    "add",
    "any_of",
    "by_part",
    "either",
    "guard_bits",
    "multiply",
    "named",
    "normalised",
    "offset",
    "order_keys",
    "pack",
    "quantise",
    "rounds_up",
    "shifted_right",
    "unpack",
    "width_of",
]

hdl = amaranth("hdl")
Bits = Any  # an Amaranth value


@dataclass(frozen=True, slots=True)
class Number:
    """A number on its way: (-1)^sign significand 2^(exponent + low), and perhaps a little more than that.

    Attributes:
        sign: one bit.
        exponent: unsigned.
        significand: unsigned; zero for zero.
        low: exponent of the significand's lowest bit where ``exponent`` is 0.
        most: the largest value that ``exponent`` takes.
        leading: how many leading zeros the significand of a number other than zero may have.
        least: the smallest value that it takes where the number is not zero.
        sticky: whether the magnitude is larger than written, by less than a unit of the significand; None: it is not.
        clear: whether a zero has exponent 0; otherwise any.
        subnormal: whether the significand has leading zeros at the smallest exponent only.
    """

    sign: Bits
    exponent: Bits
    significand: Bits
    low: int
    most: int
    leading: int = 0
    least: int = 0
    sticky: Bits = None
    clear: bool = False
    subnormal: bool = False

    @property
    def width(self) -> int:
        """Bits of the significand."""
        return len(self.significand)

    @property
    def base(self) -> int:
        """Exponent of the significand's highest bit where ``exponent`` is 0."""
        return self.low + self.width - 1

    @property
    def nonzero(self) -> Bits:
        """One bit."""
        return any_of(self.significand) if self.leading else self.significand[-1]


def named(m: Any, name: str, value: Bits) -> Bits:
    """A value as a signal of a name."""
    value = hdl.Value.cast(value)
    signal = hdl.Signal(value.shape(), name=name)
    m.d.comb += signal.eq(value)
    return signal


def any_of(value: Bits) -> Bits:
    """Whether a bit is set."""
    return value.any() if len(value) else hdl.Const(0, 1)


def width_of(most: int) -> int:
    """Bits of an unsigned number up to ``most``; at least one."""
    return max(most.bit_length(), 1)


def unpack(m: Any, code: Bits, layout: Layout, name: str) -> Number:
    """The number of a code that `recoup.formats.encode` gives: zero has fraction 0."""
    M, E = layout.fraction, layout.exponent
    fraction, field, sign = code[:M], code[M : M + E], code[M + E]
    if layout.flag:
        hidden, shift, most = code[-1], 0, layout.high - layout.low
    else:
        hidden, shift, most = any_of(field) if E else hdl.Const(1, 1), 1, layout.high - layout.low + 1
    low = layout.low - shift - M
    if layout.subnormals:
        # Field 0 has the exponent of field 1.
        field = hdl.Cat(field[0] | ~hidden, field[1:])
    significand = named(m, f"{name}_significand", hdl.Cat(fraction, hidden))
    return Number(
        sign,
        field,
        significand,
        low,
        most,
        M if layout.subnormals else 0,
        shift,
        clear=not layout.subnormals,
        subnormal=layout.subnormals,
    )


def multiply(m: Any, a: Number, b: Number, name: str) -> Number:
    """The exact product."""
    product = named(m, f"{name}_significand", a.significand * b.significand)
    exponent, most = a.exponent + b.exponent, a.most + b.most
    exponent = named(m, f"{name}_exponent", exponent[: width_of(most)])
    leading = min(a.leading + b.leading + 1, len(product) - 1)
    if a.width == 1 or b.width == 1:  # a power of two: nothing is carried, and the top bit is never set
        product, leading = product[:-1], min(a.leading + b.leading, len(product) - 2)
    return Number(a.sign ^ b.sign, exponent, product, a.low + b.low, most, leading, a.least + b.least)


def normalised(m: Any, n: Number, name: str) -> Number:
    """The same number with its leading bit on top, shifted by powers of two from the largest; zero stays zero."""
    if n.leading == 0:
        return n
    significand, count = n.significand, []
    for stage in reversed(range(n.leading.bit_length())):
        size = 1 << stage
        empty = named(m, f"{name}_empty_{size}", ~any_of(significand[-size:]))
        moved = hdl.Cat(hdl.Const(0, size), significand[:-size])
        significand = named(m, f"{name}_shifted_{size}", hdl.Mux(empty, moved, significand))
        count.insert(0, empty)
    # Zero counts as many leading zeros as the stages have; its exponent means nothing, but must not wrap.
    leading = (1 << len(count)) - 1
    exponent = named(m, f"{name}_exponent", (n.exponent + ~hdl.Cat(*count))[: width_of(n.most + leading)])
    low, most, least = n.low - leading, n.most + leading, max(n.least + leading - n.leading, 0)
    return replace(
        n, exponent=exponent, significand=significand, low=low, most=most, leading=0, least=least, clear=False
    )


def shifted_right(m: Any, value: Bits, amount: Bits, name: str, keep: bool = True) -> tuple[Bits, Bits]:
    """A value shifted right by any amount, and whether a set bit left it (``keep``; else 0)."""
    width, lost = len(value), []
    for stage in range(len(amount)):
        size = 1 << stage
        if size >= width:
            far = any_of(amount[stage:])
            lost.append(far & any_of(value))
            value = hdl.Mux(far, 0, value)[:width]
            break
        lost.append(amount[stage] & any_of(value[:size]))
        value = named(m, f"{name}_{size}", hdl.Mux(amount[stage], value >> size, value)[:width])
    return value, (named(m, f"{name}_sticky", any_of(hdl.Cat(*lost))) if keep else hdl.Const(0, 1))


def guard_bits(nearest: bool) -> int:
    """How many bits below the widest significand a sum is made with: what a cancelled leading bit brings up, and to
    nearest half of a last bit beside it."""
    return 2 if nearest else 1


def rounds_up(half: Bits, rest: Bits, last: Bits) -> Bits:
    """Whether what is cut off, its highest bit and whether anything is below that, rounds up: to nearest even."""
    return half & (rest | last)


def add(
    m: Any,
    a: Number,
    b: Number,
    precision: int,
    nearest: bool,
    name: str,
    *,
    apart: int = 0,
    coarse: int = 0,
    lost: Callable[[Bits, Bits], Bits] | None = None,
    flushed: int | None = None,
    guard: int | None = None,
) -> Number:
    """a + b, exact as far as a rounding to ``precision`` bits and fewer can see.

    ``apart``: operands that differ do so by 2^apart last bits of the wider one or more, so that lower bits need not be
    compared, and not everything cancels; ``coarse``: nor are these lowest bits of the smaller operand added.
    ``lost(swap, distance)``: what may stand for the sticky bit of a smaller operand that is not zero, by whether that
    is a, and how far it was shifted. ``flushed``: sums below 2^flushed become zero, so that a zero may be taken for the
    larger of the two where the other is so small. ``guard``: fewer bits below the widest significand than `guard_bits`,
    where sums that cancel so far do not occur.

    Which is larger is read from the exponents first. Leading zeros must therefore be those of the subnormals of one
    format, at the lowest exponent of both operands; others are shifted out before.
    """
    gradual = all(n.subnormal or not n.leading for n in (a, b)) and a.base + a.least == b.base + b.least
    if (a.leading or b.leading) and not gradual:
        a, b = normalised(m, a, f"{name}_a"), normalised(m, b, f"{name}_b")
    guard = guard_bits(nearest) if guard is None else guard
    width = max(a.width, b.width, precision)
    base = min(a.base, b.base)
    most = max(n.most + n.base - base for n in (a, b))
    keys, parts = order_keys(a, b, base, most, width, apart, flushed)
    one, other = (hdl.Cat(*key) for key in keys)
    swap = named(m, f"{name}_swap", one < other)
    sign, exponent, large = (named(m, f"{name}_large_{i}", hdl.Mux(swap, y, x)) for i, (x, y) in by_part(parts))
    _, lower, small = (named(m, f"{name}_small_{i}", hdl.Mux(swap, x, y)) for i, (x, y) in by_part(parts))
    small = hdl.Cat(hdl.Const(0, coarse), small[coarse:])
    # Of a zero it means nothing, and shifts nothing.
    reach = max(x.most + x.base - y.least - y.base for x, y in ((a, b), (b, a)))
    distance = named(m, f"{name}_distance", (exponent - lower)[: width_of(max(reach, 0))])
    aligned, sticky = shifted_right(m, hdl.Cat(hdl.Const(0, guard), small), distance, f"{name}_aligned", lost is None)
    if lost is not None:
        sticky = named(
            m, f"{name}_lost", lost(swap, distance) & (any_of(small) if a.leading or b.leading else small[-1])
        )
    subtract = named(m, f"{name}_subtract", a.sign ^ b.sign)
    wide = width + guard
    total = hdl.Cat(hdl.Const(0, guard), large) + (aligned ^ subtract.replicate(wide)) + (subtract & ~sticky)
    total = named(m, f"{name}_total", total[: wide + 1])
    significand = hdl.Cat(total[:wide], total[wide] & ~subtract)
    low = base + 1 - wide
    leading = wide - apart - guard if apart else wide
    return Number(sign, exponent, significand, low, most, leading, sticky=sticky if nearest else None)


def order_keys(
    a: Number, b: Number, base: int, most: int, width: int, apart: int = 0, flushed: int | None = None
) -> tuple[list[tuple[Bits, ...]], list[tuple[Bits, ...]]]:
    """Of both operands what tells which is larger, from the least weight on; sign, exponent and significand."""
    keys: list[tuple[Bits, ...]] = []
    parts: list[tuple[Bits, ...]] = []
    for n, other in ((a, b), (b, a)):
        exponent = (n.exponent + (n.base - base))[: width_of(most)] if n.base > base else n.exponent
        significand = hdl.Cat(hdl.Const(0, width - n.width), n.significand)
        whole = hdl.Cat(exponent, hdl.Const(0, max(width_of(most) - len(exponent), 0)))[: width_of(most)]
        rest = significand[apart:] if a.leading or b.leading else significand[apart:-1]
        # Then its exponent tells that a zero is smaller, or the sum is flushed.
        below = n.clear and (n.base < other.base + other.least or (flushed is not None and n.base < flushed))
        keys.append((rest, whole, hdl.Const(1, 1) if below else n.nonzero))
        parts.append((n.sign, whole, significand))
    return keys, parts


def by_part(parts: list[tuple[Bits, ...]]) -> Any:
    return zip(("sign", "exponent", "significand"), zip(*parts, strict=True), strict=True)


def either(m: Any, chosen: Bits, one: Number, other: Number, name: str) -> Number:
    """``one`` where chosen, else ``other``; neither has a sticky bit."""
    width = max(one.width, other.width)
    base, most, parts = min(one.base, other.base), max(n.most + n.base for n in (one, other)), []
    for n in (one, other):
        exponent = offset(n.exponent, n.most, n.base - base)
        significand = hdl.Cat(hdl.Const(0, width - n.width), n.significand)
        parts.append((n.sign, exponent, significand))
    sign, exponent, significand = (
        named(m, f"{name}_{i}", hdl.Mux(chosen, x, y))
        for i, x, y in zip(("sign", "exponent", "significand"), *parts, strict=True)
    )
    leading = max(one.leading, other.leading)
    least = min(n.least + n.base for n in (one, other)) - base
    gradual = all(n.subnormal or not n.leading for n in (one, other)) and one.base == other.base
    low = base + 1 - width
    return Number(sign, exponent, significand, low, most - base, leading, least, subnormal=gradual and leading > 0)


def quantise(m: Any, n: Number, layout: Layout, name: str, grain: int | None = None) -> Number:
    """The number rounded, flushed and saturated; a zero's exponent means nothing without subnormals.

    ``grain``: the exponent of a unit that the number is a multiple of, so that it cannot be smaller but for zero.
    """
    n = normalised(m, n, name)
    M = layout.fraction
    significand, sticky = n.significand, n.sticky
    if n.width < M + 1:
        significand = hdl.Cat(hdl.Const(0, M + 1 - n.width), significand)
    # The exponent as a signed number of binades above the smallest.
    depth = layout.low - n.base
    binade = named(m, f"{name}_binade", offset(n.exponent, n.most, -depth))
    deep = depth > 0 and (grain is None or grain < layout.low)
    under = binade[-1] if deep else hdl.Const(0, 1)
    binade = binade[:-1] if depth > 0 and not deep else binade
    if layout.subnormals and deep:
        amount = named(m, f"{name}_below", hdl.Mux(under, -binade, 0)[: width_of(depth)])
        significand, lost = shifted_right(m, significand, amount, f"{name}_denormal", layout.nearest)
        sticky = lost if sticky is None else sticky | lost
    cut = len(significand) - (M + 1)
    kept = significand[cut:]
    kept, carried = significand[cut:], None
    if layout.nearest and (cut or sticky is not None):
        rest = hdl.Cat(*([sticky] if sticky is not None else []), significand[: max(cut - 1, 0)])
        half = significand[cut - 1] if cut else hdl.Const(0, 1)
        up = named(m, f"{name}_up", rounds_up(half, any_of(rest), kept[0]))
        if layout.subnormals:
            rounded = named(m, f"{name}_rounded", (kept + up)[: M + 2])
            kept, carried = rounded[: M + 1], rounded[M + 1]
        else:  # through the fraction into the exponent
            reach = max(n.most - depth, 0) + 1
            rank = named(m, f"{name}_rounded", hdl.Cat(kept[:M], binade[: width_of(reach)]) + up)
            kept, binade = hdl.Cat(rank[:M], kept[-1]), rank[M : M + width_of(reach)]
            found = _Rounded(kept, None, binade, under, reach)
            return _saturated(m, n.sign, layout, name, found, max(n.least - depth, 0))
    found = _Rounded(kept, carried, binade, under, max(n.most - depth, 0))
    return _saturated(m, n.sign, layout, name, found, max(n.least - depth, 0))


@dataclass(frozen=True, slots=True)
class _Rounded:
    """A significand of M + 1 bits, what it carried, its binade above the smallest, whether that is negative, and the
    largest binade it may have."""

    significand: Bits
    carried: Bits
    binade: Bits
    under: Bits
    reach: int


def offset(exponent: Bits, most: int, constant: int) -> Bits:
    """exponent + constant, signed where it may be negative."""
    if constant >= 0:
        return (exponent + constant)[: width_of(most + constant)] if constant else exponent
    bits = max(width_of(max(most + constant, 0)), width_of(-constant)) + 1
    return (exponent + hdl.Const(constant % (1 << bits), bits))[:bits]


def _saturated(m: Any, sign: Bits, layout: Layout, name: str, found: _Rounded, least: int) -> Number:
    """Flush and saturation."""
    M, span = layout.fraction, layout.high - layout.low
    E = width_of(span)
    binade, reach = found.binade, found.reach
    hidden: Bits = found.significand[-1]
    if layout.subnormals:
        binade = binade & ~found.under.replicate(len(binade))
    if found.carried is not None:
        binade = named(m, f"{name}_carried", binade[: width_of(reach)] + found.carried)
        hidden = hidden | found.carried
        reach += 1
    normal = named(m, f"{name}_normal", hidden & ~found.under)
    fraction: Bits = found.significand[:M]
    field: Bits = hdl.Cat(binade, hdl.Const(0, E))[:E]
    limit, most = (span << M) + layout.top, ((reach + 1) << M) - 1
    if most > limit:
        over = above(hdl.Cat(fraction, binade)[: width_of(most)], limit)
        # What cancelled is zero, whatever its exponent says; without subnormals its fraction is cleared below.
        over = named(m, f"{name}_over", over & hidden if layout.subnormals else over)
        fraction = (fraction | over.replicate(M)) if layout.top == (1 << M) - 1 else hdl.Mux(over, layout.top, fraction)
        field = (field | over.replicate(E)) if span == (1 << E) - 1 else hdl.Mux(over, span, field)
    if not layout.subnormals:
        fraction = fraction[:M] & normal.replicate(M)
    significand = named(m, f"{name}_significand", hdl.Cat(fraction[:M], hidden if layout.subnormals else normal))
    field = field[:E] & hidden.replicate(E) if layout.subnormals else field[:E]
    least = min(least, span)
    most = min(reach, span)
    if layout.subnormals:
        return Number(sign, field, significand, layout.low - M, most, M, subnormal=True)
    return Number(sign, field, significand, layout.low - M, most, least=least)


def above(value: Bits, limit: int) -> Bits:
    """value > limit."""
    if limit & (limit + 1) == 0:
        return any_of(value[limit.bit_length() :])
    return value > limit


def pack(n: Number, layout: Layout) -> Bits:
    """The code of a quantised number; zero has sign 0."""
    hidden, fraction = n.significand[-1], n.significand[:-1]
    field = hdl.Cat(n.exponent, hdl.Const(0, layout.exponent))[: layout.exponent]
    if layout.flag:
        return hdl.Cat(fraction, field & hidden.replicate(layout.exponent), n.sign & hidden, hidden)
    # Field 0 is zero's and the subnormals': a binade's field is one more.
    field = (field + hidden)[: layout.exponent]
    nonzero = any_of(n.significand) if layout.subnormals else hidden
    field = field if layout.subnormals else field & hidden.replicate(layout.exponent)
    return hdl.Cat(fraction, field, n.sign & nonzero)
