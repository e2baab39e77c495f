"""A lane's dx in gates, without registers: F'(g sigma - m sigma), of an element that is no extremum.

It is (g - m) gamma r, exact and then rounded: m sigma is the same for a whole channel and held, so that a lane
multiplies sigma with the few bits of g alone. A module of its own, so that it is mapped once however many lanes a unit
has, and can be verified by itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recoup.formats import ports, quantize
from recoup.gates import arithmetic
from recoup.gates.arithmetic import Number
from recoup.gates.blocks import rebased
from recoup.gates.module import Expected, Inputs, Module, amaranth
from recoup.lightnorm.backward_unit.operands import Operands
from recoup.lightnorm.exact import multiplied_and_added

__all__ = ["Lane"]


@dataclass(frozen=True)
class Lane(Operands):
    """The lane: its ports, its gates, and what they compute."""

    def module(self) -> Module:
        """Ports around the gates."""
        pins = [ports.port("gradient", "in", self.form, "g, an element as memory has it"), *self.held]
        pins.append(ports.port("dx", "out", self.form, "dx, not yet in blocks"))
        return Module(
            name="lightnorm_gradient",
            title=f"gradient, {ports.told(self.form)}",
            ports=tuple(pins),
            elaborate=self.elaborate,
            expected=self.expected,
            clocked=False,
            aim=self.aim,
        )

    def elaborate(self, m: Any, port: Any) -> None:
        """Gates."""
        F = self.layout
        g = rebased(m, arithmetic.unpack(m, port.gradient, F, "gradient_value"), F, "gradient")
        g = replace(g, leading=F.fraction if F.subnormals else 0)
        (bits, leading, low, most), W = self.slope, self.shift_bits
        hdl, sign = amaranth("hdl"), W + arithmetic.width_of(self.span + self.lifted)
        sigma = Number(hdl.Const(0, 1), hdl.Const(0, 1), port.slope[:bits], 0, 0, leading)
        scaled = arithmetic.multiply(m, g, sigma, "scaled")
        shift = Number(
            ~port.shift[sign],
            port.shift[W:sign],
            port.shift[:W],
            g.low - self.fine - self.lifted,
            self.span + self.lifted,
        )
        total = self._added(m, shift, scaled, port.shift[sign + 1 :])
        exponent = total.exponent + port.slope[bits:-1]
        total = replace(
            total,
            sign=total.sign ^ port.slope[-1],
            exponent=arithmetic.named(m, "scale", exponent[: arithmetic.width_of(total.most + most)]),
            low=total.low + low,
            most=total.most + most,
        )
        m.d.comb += port.dx.eq(arithmetic.pack(arithmetic.quantise(m, total, F, "dx_value"), F))

    def _added(self, m: Any, shift: Number, scaled: Number, flags: Any) -> Number:
        """|sigma| (g - m).

        The two differ by a last bit of g or m, times sigma, or not at all: by 2^(bits of sigma - 1) of the sum's bits
        or more. Cut toward zero, the smaller may be taken for more than it is, by less than a bit of what is added,
        wherever the result is neither 0 nor a step of F', and must wherever a bit of it that is not zero was left out.
        A step has f + 1 bits, so where sigma has more, ``uneven``, only 0 is a multiple of both. Where it has not,
        g - m must have as few bits: with m the smaller by f + 4 binades it has more, and with g the smaller by s + 4,
        for then the last bit is below the other's. Bits of m sigma below the last of g sigma are not added where it is
        the smaller: there is no step between, because g sigma and all steps are multiples of that bit; ``rest`` tells
        of them.
        """
        F, apart = self.layout, self.slope_bits - 1
        if not self.flagged:
            apart = apart if self.slope[1] == 1 else 0
            return arithmetic.add(m, shift, scaled, F.fraction + 1, F.nearest, "total", apart=apart)
        hdl, (near, far), (uneven, rest) = amaranth("hdl"), self.far, flags

        def lost(smaller_mean: Any, distance: Any) -> Any:
            beyond = distance >= near
            return hdl.Mux(smaller_mean, rest | beyond, uneven & beyond | (distance >= far))

        return arithmetic.add(
            m, shift, scaled, F.fraction + 1, False, "total", apart=apart, coarse=self.fine, lost=lost
        )

    # What it computes ------------------------------------------------------------------------------------------------

    def expected(self, inputs: Inputs) -> Mapping[str, Expected]:
        """F'(g sigma - m sigma), exact and then rounded."""
        g, slope, shift = (inputs[name].reshape(-1) for name in ("gradient", "slope", "shift"))
        dx = self.computed(ports.values(g, self.form), slope, shift)
        return {"dx": Expected((0,), ports.codes(dx, self.form).reshape(inputs["gradient"].shape))}

    def computed(self, g: Tensor, slope: np.ndarray, shift: np.ndarray) -> Tensor:
        """dx, not yet in blocks, of values and of codes of what a lane holds; all of one axis."""
        sigma, exponent = self.slope_parts(slope)
        held = np.copysign(1.0, sigma) * self.shift_parts(shift)
        exact = multiplied_and_added(torch.from_numpy(sigma), g, torch.from_numpy(-held)).numpy()
        return quantize(torch.from_numpy(np.ldexp(exact, exponent)), self.form) + 0.0

    def aim(self, inputs: dict[str, np.ndarray], generator: np.random.Generator) -> Inputs:
        """The sigma and m sigma of `Operands.aimed`."""
        slope, mean = self.aimed(inputs["gradient"], generator)
        return inputs | {"slope": slope, "shift": self.kept(slope, mean)}
