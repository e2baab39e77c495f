"""The tensor core's adder in gates: a group of products and the accumulator, aligned, cut, added at once, normalised.

Exponents are counted from a base that lies below all that occur, so that 0 is a zero's and the largest of a group is
found by comparing; a product of significands is not normalised. Legend: G products a step; n bits kept below the
largest exponent; M fraction bits of an operand; f of the accumulator.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch

from recoup.errors import RecoupError
from recoup.formats import Float, FloatFields, ports, quantize
from recoup.gates import arithmetic
from recoup.gates import typical as draw
from recoup.gates.arithmetic import Bits, Number, any_of, named, width_of
from recoup.gates.module import Expected, Inputs, Module, Port, amaranth
from recoup.tensorcore.config import TensorCore
from recoup.tensorcore.profiling import advanced
from recoup.tensorcore.reference import ACCUMULATORS

__all__ = ["build"]

hdl = amaranth("hdl")

BUILT = ("e4m3fn", "e5m2", "e2m1fn", "float16")
"""Operands whose sums are never subnormal and never infinite, so that the accumulator needs neither."""
RUN = (1, 0, 0, 1, 0)
"""``first`` of a run for verification."""


def build(config: TensorCore) -> Module:
    """A step a clock cycle that equals `recoup.tensorcore.matmul`, group by group:

        y <= output(trunc(c / q) + sum_i trunc(x_i w_i / q)),   c = 0 if first else y

    Operands are codes as `recoup.formats.encode` gives them, without NaN and infinities; scales are not built in. The
    accumulator holds the unit's values, with as few exponent bits as those that can occur need: ``facts`` say how y is
    read.

    Raises:
        RecoupError: operands of which sums may overflow or become subnormal (bfloat16, tf32), or ``output="float16"``,
            whose infinities are not built; ``promotion``, a float32 adder beside the unit that works every
            ``promotion / group`` steps; ``nonfinite="propagate"``; block scales.
    """
    if config.block is not None:
        _refuse_blocks(config)
    for name in config.pair:
        if name not in BUILT:
            raise RecoupError(
                f"silicon: {config!r}: sums of {name} may be subnormal or infinite, which the adder does not build; "
                f"operands may be {', '.join(BUILT)}"
            )
    if config.output == "float16":
        raise RecoupError(
            f"silicon: {config!r}: output='float16' overflows to infinity, which the adder does not build"
        )
    if config.promotion is not None or config.nonfinite != "error":
        raise RecoupError(
            f"silicon: {config!r}: the adder is built without promotion, a float32 adder beside it, and without NaN "
            "and infinities; use promotion=None and nonfinite='error'"
        )
    return Adder(config).module()


def _refuse_blocks(config: TensorCore) -> NoReturn:
    """Say why there is no adder with block scales, and which there is for as many products."""
    if config.sums_sixteen:
        why = "sums of sixteen products are scaled before they are aligned, which the adder does not do"
    else:
        why = "the scales' exponents make sums subnormal and infinite, which the adder does not build"
    raise RecoupError(
        f"silicon: {config!r}: block scales are not built into the adder: {why}; without them it is "
        f"{config.replace(block=None, scale_format=None, fraction=min(config.fraction, 25))!r}"
    )


def typical(config: TensorCore, lanes: int, steps: int, generator: np.random.Generator) -> Inputs:
    """Inputs of the adder for one sum of ``steps`` groups: `recoup.gates.typical`, rounded to the operands' formats."""
    found = {}
    for name, form, kind in zip("xw", config.formats, (draw.activations, draw.weights), strict=True):
        values = kind((steps, lanes, config.group), form.largest_value, generator)
        codes = ports.codes(quantize(torch.from_numpy(values), form), form)
        found[name] = codes if config.group > 1 else codes[..., 0]
    first = np.repeat((np.arange(steps) == 0)[:, None], lanes, 1)
    return found | {"first": first.astype(np.uint64)}


@dataclass(frozen=True)
class Adder:
    """The unit of a config."""

    config: TensorCore

    @property
    def pair(self) -> tuple[Float, Float]:
        """The operands' formats."""
        return self.config.formats

    @cached_property
    def base(self) -> int:
        """The exponent that is counted as 0."""
        return sum(form.min_exponent for form in self.pair) - self.config.fraction - 1

    @cached_property
    def sum(self) -> Float:
        """The accumulator's values. None is larger: from where products are below what is kept of it on, it stays."""
        products = sum(form.max_exponent for form in self.pair) + 2
        growth = max(self.config.fraction, (self.config.group - 1).bit_length()) + 1
        fraction = min(ACCUMULATORS[self.config.output][0], self.width - 2)  # no sum has more bits
        return Float(fraction, self.base + 1, products + growth, False, "zero")

    def module(self) -> Module:
        """Ports and schedule around the gates."""
        G, config = self.config.group, self.config
        pins = []
        for name, what, form in zip("xw", ("activations", "weights"), self.pair, strict=True):
            one = ports.port(name, "in", form, f"{G} {what}, {ports.told(form)}")
            values = {field.name: getattr(one, field.name) for field in fields(one)}
            pins.append(Port(**{**values, "width": one.width * G, "parts": G}))
        pins.append(Port("first", "in", 1, "the sum starts from zero with this group"))
        result = ports.port("y", "out", self.sum, f"the sum, {ports.told(self.sum)}")
        return Module(
            name="tensorcore_adder",
            title=f"{' x '.join(dict.fromkeys(config.pair))}, {G} at once in {config.fraction} bits",
            ports=(*pins, result),
            elaborate=self.elaborate,
            expected=self.expected,
            latency=1,
            steps=len(RUN) + 1,
            control=self.control,
            presets=(result,),
            held=(result,),
            aim=self.aim,
            protocol={
                "order": f"{G} terms a cycle, in increasing k; a shorter last group is filled with zeros",
                "first": "1 with the first group of a sum",
                "result": "y shows the sum one clock edge after its last group",
            },
            work=float(G),
            facts={
                "products a cycle": G,
                "bits of the aligned sum": self.width,
                "accumulator": ports.told(self.sum),
                "y": f"(-1)^sign 1.fraction 2^(field - {FloatFields(self.sum).bias}), from the top sign, field, "
                "fraction; field 0 is zero",
            },
        )

    @cached_property
    def width(self) -> int:
        """Bits of a group's sum, its sign included: a product has two bits above the largest exponent's last."""
        return self.config.fraction + 2 + self.config.group.bit_length() + 1

    # Gates -----------------------------------------------------------------------------------------------------------

    def elaborate(self, m: Any, port: Any) -> None:
        """Gates and registers."""
        layout = ports.layout(self.sum)
        y = hdl.Signal(layout.bits, name="accumulator", reset_less=True)
        m.d.comb += port.y.eq(y)
        terms = [self._product(m, port, i) for i in range(self.config.group)]
        code = y & ~port.first.replicate(layout.bits)
        held = arithmetic.unpack(m, code, layout, "sum")
        above = held.low + layout.fraction - self.base  # 0 where a code's field 0 is zero's
        exponent = (held.exponent + above)[: width_of(held.most + above)]
        terms.append((held.sign, exponent & held.nonzero.replicate(len(exponent)), held.significand))
        points = [*[sum(form.mantissa for form in self.pair)] * self.config.group, layout.fraction]
        top = self._largest(m, [exponent for _, exponent, _ in terms])
        aligned = [
            self._aligned(m, term, top, point, i) for i, (term, point) in enumerate(zip(terms, points, strict=True))
        ]
        total = self._added(m, aligned)
        sign = total[-1]
        magnitude = named(m, "magnitude", ((total ^ sign.replicate(len(total))) + sign)[: self.width - 1])
        m.d.sync += y.eq(self._output(m, sign, top, magnitude))

    def _product(self, m: Any, port: Any, i: int) -> tuple[Bits, Bits, Bits]:
        """Sign, exponent from the base on, 0 where the product is, and significand."""
        found = []
        for name, form in zip("xw", self.pair, strict=True):
            layout = ports.layout(form)
            code = getattr(port, name)[i * layout.bits : (i + 1) * layout.bits]
            found.append((arithmetic.unpack(m, code, layout, f"{name}_{i}"), layout))
        (a, first), (b, second) = found
        nonzero = any_of(a.significand) & any_of(b.significand)
        above = a.low + first.fraction + b.low + second.fraction - self.base
        bits = width_of(a.most + b.most + above)
        exponent = (a.exponent + b.exponent + above)[:bits] & nonzero.replicate(bits)
        return (
            a.sign ^ b.sign,
            named(m, f"exponent_{i}", exponent),
            named(m, f"product_{i}", a.significand * b.significand),
        )

    def _largest(self, m: Any, exponents: list[Bits]) -> Bits:
        """The largest, by a tree."""
        rank = 0
        while len(exponents) > 1:
            pairs = zip(exponents[::2], exponents[1::2], strict=False)
            found = [named(m, f"top_{rank}_{i}", hdl.Mux(a > b, a, b)) for i, (a, b) in enumerate(pairs)]
            exponents = found + exponents[len(exponents) - len(exponents) % 2 :]
            rank += 1
        return exponents[0]

    def _aligned(self, m: Any, term: tuple[Bits, Bits, Bits], top: Bits, point: int, i: int) -> tuple[Bits, Bits]:
        """Sign and trunc(term / q): ``point`` bits of the significand lie below its exponent, n of the result."""
        sign, exponent, significand = term
        n = self.config.fraction
        value = hdl.Cat(hdl.Const(0, n - point), significand) if n >= point else significand[point - n :]
        distance = named(m, f"distance_{i}", (top - exponent)[: len(top)])
        moved, _ = arithmetic.shifted_right(m, value, distance, f"aligned_{i}", keep=False)
        return sign, moved

    def _added(self, m: Any, terms: list[tuple[Bits, Bits]]) -> Bits:
        """The sum in two's complement, by a tree; the signs are carried in beside it."""
        W = self.width
        signs = named(m, "negatives", sum((sign for sign, _ in terms[1:]), start=terms[0][0] + hdl.Const(0, 1)))
        parts: list[Bits] = [hdl.Cat(v, hdl.Const(0, W))[:W] ^ sign.replicate(W) for sign, v in terms]
        parts.append(hdl.Cat(signs, hdl.Const(0, W))[:W])
        rank = 0
        while len(parts) > 1:
            pairs = zip(parts[::2], parts[1::2], strict=False)
            found = [named(m, f"added_{rank}_{i}", (a + b)[:W]) for i, (a, b) in enumerate(pairs)]
            parts = found + parts[len(parts) - len(parts) % 2 :]
            rank += 1
        return parts[0]

    def _output(self, m: Any, sign: Bits, top: Bits, magnitude: Bits) -> Bits:
        """The accumulator's code, toward zero. Nothing is below its smallest binade, nothing above its largest."""
        layout, n = ports.layout(self.sum), self.config.fraction
        most = (1 << len(top)) - 1
        number = Number(sign, top, magnitude, self.base - n, most, leading=len(magnitude) - 1)
        number = arithmetic.normalised(m, number, "normalised")
        bits = layout.exponent + 1
        binade = (number.exponent + hdl.Const((number.base - layout.low) % (1 << bits), bits))[:bits]
        keep = layout.fraction + 1
        significand = hdl.Cat(hdl.Const(0, max(keep - number.width, 0)), number.significand)[-keep:]
        return arithmetic.pack(Number(sign, binade[: layout.exponent], significand, 0, 0), layout)

    # What it computes, and what it is given --------------------------------------------------------------------------

    def expected(self, inputs: Inputs) -> Mapping[str, Expected]:
        """The unit's steps in float64, which holds every sum, for every lane."""
        x, w = (ports.values(inputs[n], form).numpy() for n, form in zip("xw", self.pair, strict=True))
        x, w = (v.reshape(*v.shape[:2], self.config.group) for v in (x, w))
        steps, lanes = x.shape[:2]
        first = np.broadcast_to(np.asarray(inputs["first"]).reshape(steps, -1) != 0, (steps, lanes))
        y = ports.values(inputs["y"][0], self.sum).numpy() if "y" in inputs else np.full(lanes, np.nan)
        at, rows = [], []
        for step in range(steps):
            if not np.isnan(y).any():
                at.append(step)
                rows.append(ports.codes(torch.from_numpy(y), self.sum))
            y, _, _ = advanced(np.where(first[step], 0.0, y), x[step], w[step], self.config)
        return {"y": Expected(at, np.stack(rows) if rows else np.empty((0, lanes), np.uint64))}

    def control(self, steps: int) -> Inputs:
        """Sums from zero on, and sums that go on with what stands in the register."""
        found = [(list(run) + [0] * steps)[:steps] for run in (RUN, (0, *RUN[1:]))]
        return {"first": np.array(found, np.uint64).T}

    def aim(self, inputs: dict[str, np.ndarray], generator: np.random.Generator) -> Inputs:
        """Groups whose products cancel but for a few, so that leading zeros of every number occur; groups of few terms,
        whose low bits nothing covers; sums of the products' own size."""
        G = self.config.group
        x, w = (inputs[name].reshape(*inputs[name].shape[:2], G).copy() for name in "xw")
        steps, lanes = x.shape[:2]
        half, sign = G // 2, np.uint64(1 << FloatFields(self.pair[0]).sign)
        if half:
            again = generator.random((steps, lanes, 1)) < 0.4
            kept = generator.random((steps, lanes, half)) < 0.9
            opposite = np.where(x[..., :half] == 0, x[..., :half], x[..., :half] ^ sign)
            x[..., half : 2 * half] = np.where(again & kept, opposite, x[..., half : 2 * half])
            w[..., half : 2 * half] = np.where(again & kept, w[..., :half], w[..., half : 2 * half])
        few = generator.random((steps, lanes, 1)) < 0.3
        x = np.where(few & (generator.random((steps, lanes, G)) < 1 - 1.5 / G), np.uint64(0), x)
        found = {"x": x.reshape(inputs["x"].shape), "w": w.reshape(inputs["w"].shape)}
        if "y" in inputs:
            a, b = (ports.values(v[0, :, 0], form).numpy() for v, form in zip((x, w), self.pair, strict=True))
            near = -a * b * np.exp2(generator.integers(-2, self.config.fraction + 2, lanes))
            code = ports.codes(quantize(torch.from_numpy(near), self.sum), self.sum)
            found["y"] = np.where(generator.random(lanes) < 0.4, code, inputs["y"][0])[None]
        return inputs | found
