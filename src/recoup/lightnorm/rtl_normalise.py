"""A lane's normalization in gates, without registers: xhat = F((x - mu) r) and y = F(gamma xhat + beta).

Where x - mu is exact, xhat is F(x r - mu r): the same number, but mu r is the same for a whole channel, so that the
divider makes it once, and a lane multiplies r with the few bits of x alone. Where x - mu has a format of its own, the
lane is given mu.

It is a module of its own, so that it is mapped once however many lanes a unit has, and can be verified by itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from recoup.formats import ports, quantize
from recoup.gates import arithmetic
from recoup.gates.arithmetic import Number
from recoup.gates.module import Expected, Inputs, Module, Port, amaranth
from recoup.lightnorm import reference
from recoup.lightnorm.exact import multiplied_and_added
from recoup.lightnorm.rtl_meeting import meeting
from recoup.lightnorm.rtl_widths import Widths

__all__ = ["Normalise", "round_number"]


@dataclass(frozen=True)
class Normalise(Widths):
    """The lane: its ports, its gates, and what they compute."""

    @property
    def held(self) -> tuple[Port, ...]:
        """What a lane keeps of its channel: mu, or mu r, and r; without a mean r alone."""
        r = self.reciprocal("reciprocal", "in", "r = S(1/s)")
        if not self.centred:
            return (r,)
        if self.distributed:
            return Port("shift", "in", self.shift.bits, "mu r: significand, exponent, sign"), r
        return ports.port("mean", "in", self.wide, "mu"), r

    def module(self) -> Module:
        """Ports around the gates."""
        F = self.form
        pins = [ports.port("x", "in", F, "an element, as memory has it"), *self.held]
        pins += [ports.port(name, "in", F, f"F({name})") for name in self.parameters]
        pins += [ports.port("xhat", "out", F, "xhat"), ports.port("y", "out", F, "y, not yet in blocks")]
        return Module(
            name="lightnorm_normalise",
            title=f"normalization, {ports.told(F)}",
            ports=tuple(pins),
            elaborate=self.elaborate,
            expected=self.expected,
            clocked=False,
            aim=self.aim,
        )

    def elaborate(self, m: Any, port: Any) -> None:
        """Gates."""
        F = ports.layout(self.form)
        value, gamma, *beta = (
            arithmetic.unpack(m, getattr(port, name), F, f"{name}_value") for name in ("x", *self.parameters)
        )
        S, hdl = ports.layout(self.wide), amaranth("hdl")
        at = S.fraction + S.exponent
        code = hdl.Cat(port.reciprocal[:at], hdl.Const(0, 1), port.reciprocal[at:])
        reciprocal = arithmetic.unpack(m, code, S, "reciprocal_value")
        if self.centred:
            scaled = (self._distributed if self.distributed else self._scaled)(m, port, value, reciprocal)
        else:
            scaled = arithmetic.multiply(m, value, reciprocal, "scaled")
        xhat = arithmetic.quantise(m, scaled, F, "xhat_value")
        total = arithmetic.multiply(m, xhat, gamma, "product")
        if beta:
            total = self._affine(m, arithmetic.normalised(m, total, "product_top"), beta[0])
        m.d.comb += port.xhat.eq(arithmetic.pack(xhat, F))
        m.d.comb += port.y.eq(arithmetic.pack(arithmetic.quantise(m, total, F, "y_value"), F))

    def _affine(self, m: Any, product: Number, beta: Number) -> Number:
        """gamma xhat + beta.

        Toward zero no guard bit is needed. A product of two significands of f + 1 bits is (2^(f+1) - 1)^2 at the most,
        so where its top bit is set, a beta of the next power of two or more is larger by 2^(f+1) - 1 of the product's
        last bits at least: what is left has the f + 1 bits that are kept above them. Where it is not set, the product
        was normalised and its last bit is zero; with the same exponent the difference is exact.
        """
        F = ports.layout(self.form)
        flushed = None if F.subnormals else F.low
        guard = 0 if F.fraction and not (F.nearest or F.subnormals) else None
        return arithmetic.add(m, product, beta, F.fraction + 1, F.nearest, "affine", flushed=flushed, guard=guard)

    def _distributed(self, m: Any, port: Any, value: Number, reciprocal: Number) -> Number:
        """x r - mu r."""
        at, F = self.shift, ports.layout(self.form)
        code = port.shift
        field, sign = code[at.significand : at.sign], code[at.sign]
        shift = Number(~sign, field, code[: at.significand], at.low, at.most, clear=True)
        scaled = arithmetic.multiply(m, value, reciprocal, "scaled")
        # mu r and x r differ by a last bit of mu or x, times r, or not at all.
        f, s = F.fraction, self.wide.mantissa
        apart = max(0, 2 * s - max(f, s))
        lost = self._lost(code[-2], code[-1]) if at.uneven else None
        return arithmetic.add(m, shift, scaled, f + 1, F.nearest, "shifted", apart=apart, coarse=at.uneven, lost=lost)

    def _lost(self, uneven: Any, rest: Any) -> Any:
        """Whether the smaller of x r and mu r may be taken for more than it is, by less than a bit of what is added.

        It may wherever (x - mu) r is no step of F, and must wherever a bit of it that is not zero was left out. A step
        has f + 1 bits, so where r has more, ``uneven``, no multiple of it but zero is a step. Where it has not,
        (x - mu) r is a step only if x - mu has f + 1 bits too: with x the larger by f + 2 binades it has not, nor with
        mu the larger by s + 1. What is left out of mu r before it is shifted are its bits below the last of x r, those
        that ``rest`` tells of; there is no step between, because x r and all steps are multiples of that bit.
        """
        f, s = self.form.mantissa, self.wide.mantissa
        hdl, (near, far) = amaranth("hdl"), (round_number(f + 3, s - f + 2), round_number(s + 2, 2 * (s - f) + 2))

        def lost(smaller_mean: Any, distance: Any) -> Any:
            beyond = distance >= near
            return hdl.Mux(smaller_mean, rest | beyond, uneven & beyond | (distance >= far))

        return lost

    def _scaled(self, m: Any, port: Any, value: Number, reciprocal: Number) -> Number:
        """D(x - mu) r."""
        D = ports.layout(self.config.difference)  # type: ignore[arg-type]
        mean = arithmetic.unpack(m, port.mean, ports.layout(self.wide), "mean_value")
        mean = replace(mean, sign=~mean.sign)
        difference = arithmetic.add(m, mean, value, D.fraction + 1, D.nearest, "difference")
        difference = arithmetic.quantise(m, difference, D, "difference_rounded")
        return arithmetic.multiply(m, difference, reciprocal, "scaled")

    # What it computes ------------------------------------------------------------------------------------------------

    def expected(self, inputs: Inputs) -> Mapping[str, Expected]:
        """`reference.normalize` and `reference.affine`."""
        shape = inputs["x"].shape
        x, *affine = (ports.values(inputs[name], self.form).reshape(-1) for name in ("x", *self.parameters))
        held = [inputs[port.name].reshape(-1) for port in self.held]
        xhat, y = self.computed(x, held, affine)
        found = {"xhat": xhat, "y": y}
        return {n: Expected((0,), ports.codes(v.reshape(shape), self.form)) for n, v in found.items()}

    def computed(self, x: Any, held: Sequence[np.ndarray], affine: Sequence[Any]) -> Any:
        """xhat and y, not yet in blocks, of values, codes of what is held (mu or mu r, and r), and values of
        `parameters`."""
        reciprocal = ports.values(self.signed(held[-1]), self.wide)
        if self.centred and self.distributed:
            shift = torch.from_numpy(self.shift.values(held[0]))
            xhat = quantize(multiplied_and_added(reciprocal, x, -shift), self.form) + 0.0
        elif not self.centred:
            zero, exact = torch.zeros_like(reciprocal), self.config.replace(difference=None)
            xhat = reference.normalize(x[None, :, None], zero, reciprocal, exact, torch.float64).reshape(-1)
        else:
            mean = ports.values(held[0], self.wide)
            xhat = reference.normalize(x[None, :, None], mean, reciprocal, self.config, torch.float64).reshape(-1)
        gamma, beta = affine if self.centred else (affine[0], torch.zeros_like(affine[0]))
        y = reference.affine(xhat[None, :, None], gamma, beta, self.config.replace(block=None), torch.float64)
        return xhat, y.reshape(-1)

    def aim(self, inputs: dict[str, np.ndarray], generator: np.random.Generator) -> Inputs:
        """Most runs get operands of `aimed`; all get the mu r of some mu and their r."""
        shape, first = inputs["x"].shape, self.held[0].name
        x, mean, r = self.aimed(inputs["x"], generator)
        chosen = generator.random(shape) < 0.75
        r, x = np.where(chosen, r, inputs["reciprocal"]), np.where(chosen, x, inputs["x"])
        if not self.centred:
            return inputs | {"x": x, "reciprocal": r}
        if self.distributed:
            return inputs | {"x": x, "reciprocal": r, first: self.kept(mean, r)["held"]}
        return inputs | {"x": x, "reciprocal": r, first: np.where(chosen, mean, inputs[first])}

    def kept(self, mean: np.ndarray, r: np.ndarray) -> dict[str, np.ndarray]:
        """What a lane keeps of codes of mu and r, by the names of its registers."""
        if not self.centred:
            return {"inverse": r}
        if not self.distributed:
            return {"held": mean, "inverse": r}
        shift = self.shift.codes(*(ports.values(codes, self.wide).numpy() for codes in (mean, self.signed(r))))
        return {"held": shift, "inverse": r}

    def aimed(self, x: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes of x, mu and, without sign, r that structured vectors hardly ever bring together: a mu near x, so that
        what cancels shows the low bits; significands of few bits, whose products are steps of F; `meeting`."""
        S, r = ports.port("mean", "in", self.wide, ""), self.reciprocal("reciprocal", "in", "")
        assert S.legal is not None
        assert r.legal is not None
        drawn = generator.integers(0, 1 << S.width, (2, *x.shape), dtype=np.uint64)
        mean = np.where(generator.random(x.shape) < 0.5, self.near(x, generator), drawn[0])
        cut = generator.integers(0, self.wide.mantissa + 1, (2, *x.shape)) * (generator.random((2, *x.shape)) < 0.7)
        low = ((1 << cut) - 1).astype(np.uint64)
        few = np.uint64((1 << max(self.wide.mantissa - self.form.mantissa, 0)) - 1)
        low |= np.where(generator.random(x.shape) < 0.3, few, np.uint64(0))  # of both
        ones = (generator.random((2, *x.shape)) < 0.2) * low
        codes = np.stack([mean, drawn[1]]) & ~low | ones.astype(np.uint64)
        chosen = generator.random(x.shape) < 0.6
        found = zip(meeting(self.form, self.wide, x.shape, generator), (x, *codes), strict=True)
        x, mean, whole = (np.where(chosen, met, other) for met, other in found)
        return x, S.legal(mean), r.legal(self.unsigned(whole))

    def near(self, x: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Codes in S a few steps beside those of x in F."""
        F, S = ports.port("x", "in", self.form, ""), ports.port("mean", "in", self.wide, "")
        assert S.legal is not None
        value = quantize(ports.values(x, self.form), self.wide.replace(rounding="zero"))
        code = ports.codes(value, self.wide).astype(np.int64)
        step = (1 << generator.integers(0, max(S.width - F.width, 1) + 3, x.shape)) * generator.integers(-2, 3, x.shape)
        step += generator.integers(-2, 3, x.shape)
        return S.legal(np.maximum(code + step, 0).astype(np.uint64) & np.uint64((1 << S.width) - 1))


def round_number(least: int, most: int) -> int:
    """A power of two between the two where there is one: the cheapest to compare with; else the lesser."""
    power = 1 << max(most, 1).bit_length() - 1
    return power if power >= least else min(least, most)
