"""Single operations of the multiply-add unit, without registers: small ones can be tried with every pair of values."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recoup.formats import Float, ports
from recoup.gates import arithmetic, flagged
from recoup.gates.module import Expected, Inputs, Module
from recoup.lba import rtl_gates
from recoup.lba.config import LBA
from recoup.lba.reference import exact_sum, quantize

__all__ = ["adder", "multiplier"]

Operand = rtl_gates.Operand


def multiplier(x: Operand, w: Operand, product: Float, total: Float | None = None) -> Module:
    """Q_prod(x w) alone, without registers: what one product is of a unit whose sums have the format ``total``, by
    default the product's."""
    unit = LBA(product=product, accumulator=total or product, chunk=None)

    def elaborate(m: Any, port: Any) -> None:
        found, layout = rtl_gates.product(m, port.x, port.w, x, w, unit), ports.layout(product)
        packed = flagged.code(found, layout) if isinstance(found, flagged.Flagged) else arithmetic.pack(found, layout)
        m.d.comb += port.p.eq(packed)

    def expected(inputs: Inputs) -> Mapping[str, Expected]:
        exact = ports.values(inputs["x"], x) * ports.values(inputs["w"], w)
        return _combinational("p", quantize(exact, product, unit, torch.zeros_like(exact)), product, unit)

    pins = (
        ports.port("x", "in", x, ports.told(x)),
        ports.port("w", "in", w, ports.told(w)),
        ports.port("p", "out", product, ports.told(product)),
    )
    return Module(
        name="product", title=f"product, {ports.told(product)}", ports=pins, elaborate=elaborate, expected=expected,
        clocked=False,
    )  # fmt: skip


def adder(a: Float, b: Float, total: Float) -> Module:
    """Q(a + b) alone, without registers: what one addition of the unit is."""
    unit = LBA(product=a, accumulator=total, chunk=None)
    flag = not any(form.subnormals for form in (a, b, total))

    def elaborate(m: Any, port: Any) -> None:
        one, other = (
            rtl_gates.unpacked(m, code, form, name) for code, form, name in ((port.a, a, "a"), (port.b, b, "b"))
        )
        one = flagged.flagged(one) if flag else one
        m.d.comb += port.s.eq(rtl_gates.sum_code(m, one, other, total, unit, "add"))

    def expected(inputs: Inputs) -> Mapping[str, Expected]:
        exact = exact_sum(ports.values(inputs["a"], a), ports.values(inputs["b"], b))
        return _combinational("s", quantize(exact, total, unit, torch.zeros_like(exact)), total, unit)

    pins = (
        ports.port("a", "in", a, ports.told(a)),
        ports.port("b", "in", b, ports.told(b)),
        ports.port("s", "out", total, ports.told(total)),
    )
    return Module(
        name="adder",
        title=f"adder, {ports.told(total)}",
        ports=pins,
        elaborate=elaborate,
        expected=expected,
        clocked=False,
    )


def _combinational(name: str, values: Tensor, form: Float, config: LBA) -> Mapping[str, Expected]:
    codes = ports.codes(values.flatten(), form, config.scale).reshape(values.shape)
    return {name: Expected(range(len(codes)), codes)}
