"""Gates of the multiply-add unit: its product, and the code of a sum."""

from dataclasses import replace
from math import log2
from typing import Any

from recoup.formats import Float, Int, ports
from recoup.gates import arithmetic, fixed, flagged
from recoup.lba.config import LBA

__all__ = ["Operand", "either", "flags_zero", "of_integer", "product", "sum_code", "unpacked"]

Operand = Float | Int


def _operand(m: Any, code: Any, form: Operand, name: str) -> arithmetic.Number:
    if isinstance(form, Int):
        return fixed.unpack_integer(m, code, form.signed, name)
    return arithmetic.unpack(m, code, ports.layout(form), name)


def flags_zero(x: Operand, w: Operand, config: LBA) -> bool:
    """Whether products have a flag of zero (`recoup.gates.flagged`): floats without subnormals and with a fraction."""
    if any(isinstance(form, Int) or form.subnormals for form in (x, w, config.product or x, config.accumulator)):
        return False
    return isinstance(x, Float) and isinstance(w, Float) and min(x.mantissa, w.mantissa) > 0


def either(m: Any, outer: Any, chunk: arithmetic.Number, p: Any, name: str) -> Any:
    """A chunk's sum in an outer cycle, else the product, which may have a flag of zero."""
    if isinstance(p, flagged.Flagged):
        return flagged.either(m, outer, flagged.flagged(chunk), p, name)
    return arithmetic.either(m, outer, chunk, p, name)


def product(
    m: Any, x: Any, w: Any, x_form: Operand, w_form: Operand, config: LBA
) -> arithmetic.Number | flagged.Flagged:
    """Q_prod(x w), or the exact product, with its leading bit on top where a float adder takes it.

    The binades of a product with a flag count from the sums' lowest one where no product is flushed there, so that the
    adder need not add a constant to compare them.
    """
    a, b = _operand(m, x, x_form, "x"), _operand(m, w, w_form, "w")
    if flags_zero(x_form, w_form, config):
        p = flagged.multiply(m, a, b, "product")
        if config.product is None:
            return p
        assert isinstance(config.accumulator, Float)
        layout, least = ports.layout(config.product), p.number.base + p.number.least
        low = max(layout.low, min(least, ports.layout(config.accumulator).low, layout.high))
        return flagged.quantise(m, p, replace(layout, low=low), "rounded", least)
    p = arithmetic.multiply(m, a, b, "product")
    if config.product is not None:
        return arithmetic.quantise(m, p, ports.layout(config.product), "rounded")
    return p if isinstance(config.accumulator, Int) else arithmetic.normalised(m, p, "exact")


def unpacked(m: Any, code: Any, form: Float | Int, name: str) -> Any:
    """A register's content: a number, or of an `Int` its code."""
    return code if isinstance(form, Int) else arithmetic.unpack(m, code, ports.layout(form), name)


def sum_code(
    m: Any, term: Any, before: Any, form: Float | Int, config: LBA, name: str, grain: int | None = None
) -> Any:
    """The code of Q(term + before). ``grain``: the exponent of a unit that all sums are multiples of."""
    if isinstance(form, Int):
        unit = round(log2(config.scale))
        if not isinstance(term, arithmetic.Number):  # a chunk's sum
            term = of_integer(m, term, unit, name)
        return fixed.add_integer(m, term, before, unit, form.overflow == "wrap", name)
    layout = ports.layout(form)
    if isinstance(term, flagged.Flagged):
        return flagged.code(flagged.add(m, term, before, layout, name, grain), layout)
    if not isinstance(term, arithmetic.Number):
        term = of_integer(m, term, round(log2(config.scale)), name)
    total = arithmetic.add(m, term, before, layout.fraction + 1, layout.nearest, name)
    return arithmetic.pack(arithmetic.quantise(m, total, layout, f"{name}_total", grain), layout)


def of_integer(m: Any, code: Any, unit: int, name: str) -> arithmetic.Number:
    """A fixed-point sum as a number."""
    n = fixed.unpack_integer(m, code, True, f"{name}_chunk")
    return arithmetic.Number(n.sign, n.exponent, n.significand, unit, 0, n.leading)
