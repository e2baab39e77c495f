"""Conventional batch normalization in gates, every operation rounded: what LightNorm's units are compared with.

A forward lane: sum and sum of squares in pass 1, ((x - mu) / sigma) gamma + beta in pass 2. A backward lane: sums of
dy and of dy xhat in pass 1, ((dy - mean dy) - xhat mean(dy xhat)) gamma / sigma in pass 2. What becomes of the sums, a
division and a root a channel, is not in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recoup.formats import Float, ports, quantize
from recoup.gates import arithmetic
from recoup.gates.arithmetic import Number
from recoup.gates.layout import Layout
from recoup.gates.module import Expected, Inputs, Module, Port, amaranth
from recoup.lightnorm.exact import multiplied_and_added

__all__ = ["FORMATS", "conventional", "conventional_backward", "conventional_rms"]

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


def conventional_rms(form: Float, title: str) -> Module:
    """The lane of an RMS norm: the sum of squares in pass 1, (x / root mean square) gamma in pass 2."""
    names = {"x": "an element, in both passes", "reciprocal": "1 / root mean square, pass 2", "gamma": "gamma, pass 2"}
    pins = [ports.port(name, "in", form, meaning) for name, meaning in names.items()]
    pins.append(Port("first", "in", 1, "the row's first element, pass 1"))
    outs = {"squares": "of x^2", "y": "of the element before"}
    pins += [ports.port(name, "out", form, meaning) for name, meaning in outs.items()]

    def elaborate(m: Any, port: Any) -> None:
        lane = _Gates(m, port, form)
        x, r, gamma = (lane.given(name) for name in names)
        lane.summed("squares", lane.multiplied(x, x, "square"))
        lane.shown("y", lane.multiplied(lane.multiplied(x, r, "normal"), gamma, "scaled"))

    def expected(inputs: Inputs) -> Mapping[str, Expected]:
        lane = _Values(form)
        x, r, gamma = (ports.values(inputs[name], form) for name in names)
        shown = {"squares": lane.sums(lane.multiplied(x, x)), "y": lane.multiplied(lane.multiplied(x, r), gamma)}
        return {name: Expected(range(1, len(x)), ports.codes(v[:-1], form)) for name, v in shown.items()}

    return Module(
        name=f"rmsnorm_{form.bits}",
        title=title,
        ports=tuple(pins),
        elaborate=elaborate,
        expected=expected,
        latency=1,
        steps=STEPS,
        control=lambda steps: {"first": (np.arange(steps) == 0).astype(np.uint64)},
        facts={"not in it": "division and root, once a row"},
    )


def _elaborate(m: Any, port: Any, form: Float) -> None:
    """Two adders and a squarer for the sums; two adders and two multipliers behind each other for y."""
    lane = _Gates(m, port, form)
    x, mean, r, gamma, beta = (lane.given(name) for name in ("x", "mean", "reciprocal", "gamma", "beta"))
    lane.summed("sum", x)
    lane.summed("squares", lane.multiplied(x, x, "square"))
    normal = lane.multiplied(lane.added(x, _opposite(mean), "difference"), r, "normal")
    lane.shown("y", lane.added(lane.multiplied(normal, gamma, "scaled"), beta, "y"))


@dataclass(frozen=True, slots=True)
class _Gates:
    """Operations of a lane, each rounded."""

    m: Any
    port: Any
    form: Float

    @property
    def layout(self) -> Layout:
        """The format as gates know it."""
        return ports.layout(self.form)

    def given(self, name: str) -> Number:
        """The value of a port."""
        return arithmetic.unpack(self.m, getattr(self.port, name), self.layout, f"{name}_value")

    def added(self, a: Number, b: Number, name: str) -> Number:
        """a + b."""
        F = self.layout
        total = arithmetic.add(self.m, a, b, F.fraction + 1, F.nearest, name)
        return arithmetic.quantise(self.m, total, F, f"{name}_rounded")

    def multiplied(self, a: Number, b: Number, name: str) -> Number:
        """a b."""
        return arithmetic.quantise(self.m, arithmetic.multiply(self.m, a, b, name), self.layout, f"{name}_rounded")

    def summed(self, name: str, term: Number) -> None:
        """A register that adds a term up, and its port."""
        F = self.layout
        held = amaranth("hdl").Signal(F.bits, name=f"{name}_held", reset_less=True)
        before = arithmetic.unpack(self.m, held & ~self.port.first.replicate(F.bits), F, f"{name}_before")
        self.m.d.sync += held.eq(arithmetic.pack(self.added(before, term, f"{name}_next"), F))
        self.m.d.comb += getattr(self.port, name).eq(held)

    def shown(self, name: str, value: Number) -> None:
        """A value's register, and its port."""
        result = amaranth("hdl").Signal(self.layout.bits, name="result", reset_less=True)
        self.m.d.sync += result.eq(arithmetic.pack(value, self.layout))
        self.m.d.comb += getattr(self.port, name).eq(result)


def _opposite(n: Number) -> Number:
    """-n."""
    return replace(n, sign=~n.sign)


def conventional_backward(form: Float, title: str) -> Module:
    """The backward lane of a format, which rounds to nearest."""
    names = {
        "dy": "a gradient, in both passes",
        "xhat": "its xhat, in both passes",
        "mean": "mean of dy, pass 2",
        "slant": "mean of dy xhat, pass 2",
        "slope": "gamma / sigma, pass 2",
    }
    pins = [ports.port(name, "in", form, meaning) for name, meaning in names.items()]
    pins.append(Port("first", "in", 1, "the channel's first element, pass 1"))
    outs = {"sum": "of dy", "products": "of dy xhat", "dx": "of the element before"}
    pins += [ports.port(name, "out", form, meaning) for name, meaning in outs.items()]

    def elaborate(m: Any, port: Any) -> None:
        lane = _Gates(m, port, form)
        dy, xhat, mean, slant, slope = (lane.given(name) for name in names)
        lane.summed("sum", dy)
        lane.summed("products", lane.multiplied(dy, xhat, "product"))
        centred = lane.added(dy, _opposite(mean), "difference")
        rest = lane.added(centred, _opposite(lane.multiplied(xhat, slant, "slanted")), "rest")
        lane.shown("dx", lane.multiplied(rest, slope, "dx"))

    return Module(
        name=f"batchnorm_backward_{form.bits}",
        title=title,
        ports=tuple(pins),
        elaborate=elaborate,
        expected=lambda inputs: _expected_backward(inputs, form),
        latency=1,
        steps=STEPS,
        control=lambda steps: {"first": (np.arange(steps) == 0).astype(np.uint64)},
        facts={"not in it": "divisions, once a channel"},
    )


@dataclass(frozen=True, slots=True)
class _Values:
    """Operations on values, each exact, then the format."""

    form: Float

    def added(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b."""
        return quantize(multiplied_and_added(torch.ones((), dtype=torch.float64), a, b), self.form) + 0.0

    def multiplied(self, a: Tensor, b: Tensor) -> Tensor:
        """a b."""
        return quantize(a * b, self.form) + 0.0

    def sums(self, terms: Tensor) -> Tensor:
        """What a register that adds rows up has after each."""
        total, found = torch.zeros_like(terms[0]), []
        for row in terms:
            total = self.added(total, row)
            found.append(total)
        return torch.stack(found)


def _expected_backward(inputs: Inputs, form: Float) -> Mapping[str, Expected]:
    """Every operation exact, then the format."""
    lane = _Values(form)
    dy, xhat, mean, slant, slope = (ports.values(inputs[n], form) for n in ("dy", "xhat", "mean", "slant", "slope"))
    rest = lane.added(lane.added(dy, -mean), -lane.multiplied(xhat, slant))
    shown = {
        "sum": lane.sums(dy),
        "products": lane.sums(lane.multiplied(dy, xhat)),
        "dx": lane.multiplied(rest, slope),
    }
    return {name: Expected(range(1, len(dy)), ports.codes(v[:-1], form)) for name, v in shown.items()}


def _expected(inputs: Inputs, form: Float) -> Mapping[str, Expected]:
    """Every operation exact, then the format."""
    lane = _Values(form)
    x, mean, r, gamma, beta = (ports.values(inputs[n], form) for n in ("x", "mean", "reciprocal", "gamma", "beta"))
    normal = lane.multiplied(lane.added(x, -mean), r)
    shown = {
        "sum": lane.sums(x),
        "squares": lane.sums(lane.multiplied(x, x)),
        "y": lane.added(lane.multiplied(normal, gamma), beta),
    }
    return {name: Expected(range(1, len(x)), ports.codes(v[:-1], form)) for name, v in shown.items()}
