"""Conventional batch normalization in gates, every operation rounded: what LightNorm's forward unit is compared with.

A lane: sum and sum of squares in pass 1, ((x - mu) / sigma) gamma + beta in pass 2. What becomes of the sums, a
division and a root a channel, is not in it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recoup.formats import Float, ports, quantize
from recoup.gates import arithmetic
from recoup.gates.arithmetic import Number
from recoup.gates.module import Expected, Inputs, Module, Port, amaranth
from recoup.lightnorm.exact import multiplied_and_added

__all__ = ["FORMATS", "conventional"]

FORMATS = {
    "conventional, FP16": Float.ieee(5, 10, subnormals=False),
    "conventional, FP32": Float.ieee(8, 23, subnormals=False),
}
"""By title; subnormals are flushed, which makes them smaller."""
STEPS = 6


def conventional(form: Float, title: str) -> Module:
    """The lane of a format, which rounds to nearest."""
    names = {
        "x": "an element, in both passes",
        "mean": "mu, pass 2",
        "reciprocal": "1/sigma, pass 2",
        "gamma": "gamma, pass 2",
        "beta": "beta, pass 2",
    }
    pins = [ports.port(name, "in", form, meaning) for name, meaning in names.items()]
    pins.append(Port("first", "in", 1, "the channel's first element, pass 1"))
    outs = {"sum": "of x", "squares": "of x^2", "y": "of the element before"}
    pins += [ports.port(name, "out", form, meaning) for name, meaning in outs.items()]
    return Module(
        name=f"batchnorm_{form.bits}",
        title=title,
        ports=tuple(pins),
        elaborate=lambda m, port: _elaborate(m, port, form),
        expected=lambda inputs: _expected(inputs, form),
        latency=1,
        steps=STEPS,
        control=lambda steps: {"first": (np.arange(steps) == 0).astype(np.uint64)},
        facts={"not in it": "division and root, once a channel"},
    )


def _elaborate(m: Any, port: Any, form: Float) -> None:
    """Two adders and a squarer for the sums; two adders and two multipliers behind each other for y."""
    hdl, F = amaranth("hdl"), ports.layout(form)
    given = {name: arithmetic.unpack(m, getattr(port, name), F, f"{name}_value")
             for name in ("x", "mean", "reciprocal", "gamma", "beta")}  # fmt: skip

    def added(a: Number, b: Number, name: str) -> Number:
        return arithmetic.quantise(m, arithmetic.add(m, a, b, F.fraction + 1, F.nearest, name), F, f"{name}_rounded")

    def multiplied(a: Number, b: Number, name: str) -> Number:
        return arithmetic.quantise(m, arithmetic.multiply(m, a, b, name), F, f"{name}_rounded")

    x, mean = given["x"], given["mean"]
    squared = multiplied(x, x, "square")
    for name, term in (("sum", x), ("squares", squared)):
        held = hdl.Signal(F.bits, name=f"{name}_held", reset_less=True)
        before = arithmetic.unpack(m, held & ~port.first.replicate(F.bits), F, f"{name}_before")
        m.d.sync += held.eq(arithmetic.pack(added(before, term, f"{name}_next"), F))
        m.d.comb += getattr(port, name).eq(held)
    opposite = Number(**{f: getattr(mean, f) for f in Number.__slots__} | {"sign": ~mean.sign})
    normal = multiplied(added(x, opposite, "difference"), given["reciprocal"], "normal")
    result = hdl.Signal(F.bits, name="result", reset_less=True)
    m.d.sync += result.eq(arithmetic.pack(added(multiplied(normal, given["gamma"], "scaled"), given["beta"], "y"), F))
    m.d.comb += port.y.eq(result)


def _expected(inputs: Inputs, form: Float) -> Mapping[str, Expected]:
    """Every operation exact, then the format."""
    values = {name: ports.values(inputs[name], form) for name in ("x", "mean", "reciprocal", "gamma", "beta")}
    one = torch.ones(())

    def added(a: Tensor, b: Tensor) -> Tensor:
        return quantize(multiplied_and_added(one.double(), a, b), form) + 0.0

    def multiplied(a: Tensor, b: Tensor) -> Tensor:
        return quantize(a * b, form) + 0.0

    x = values["x"]
    sums, totals = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    found: dict[str, list[Tensor]] = {"sum": [], "squares": []}
    for row in x:
        sums, totals = added(sums, row), added(totals, multiplied(row, row))
        found["sum"].append(sums)
        found["squares"].append(totals)
    normal = multiplied(added(x, -values["mean"]), values["reciprocal"])
    y = added(multiplied(normal, values["gamma"]), values["beta"])
    late = range(1, len(x))
    shown = {name: torch.stack(rows) for name, rows in found.items()} | {"y": y}
    return {name: Expected(late, ports.codes(v[:-1], form)) for name, v in shown.items()}
