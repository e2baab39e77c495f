"""LightNorm's backward unit in gates: a lane's exact sums, the sequence that settles a channel, dx of lanes."""

from dataclasses import dataclass, replace
from typing import Any

from recoup.formats.ports import layout
from recoup.gates import arithmetic, fixed
from recoup.gates.arithmetic import Number, named, width_of
from recoup.gates.blocks import pack_block, rebased, unpack_block
from recoup.gates.module import amaranth
from recoup.gates.wide import Wide
from recoup.lightnorm.backward_unit.widths import Widths
from recoup.lightnorm.rtl_gates import of_lane

__all__ = ["Gates"]

hdl = amaranth("hdl")
Now = dict[str, Any]
"""Phases, each a bit that tells whether it is now."""


@dataclass(frozen=True)
class Gates(Widths):
    """The gates of a unit."""

    def elaborate(self, m: Any, port: Any) -> None:
        """Gates and registers."""
        F = self.layout
        result = hdl.Signal(len(port.dx), name="result", reset_less=True)
        m.d.comb += port.dx.eq(result)
        late = {}
        for name in ("collect", "first"):
            late[name] = hdl.Signal(name=f"{name}_late", reset_less=True)
            m.d.sync += late[name].eq(getattr(port, name))
        taken = self._taken(m, port, result, late["collect"])
        sums = [self._sums(m, port, late, value, i) for i, value in enumerate(taken)]
        held = self._settled(m, port, sums, taken)
        chosen = []
        for i, value in enumerate(taken):
            code = hdl.Mux(port.extreme[i], port.kept[self.part(i)], self._dx(m, value, *held[i], i))
            code = named(m, f"out_code_{i}", hdl.Mux(port.apply, code, port.dy[self.part(i)]))
            chosen.append(rebased(m, arithmetic.unpack(m, code, F, f"out_{i}"), F, f"out_{i}"))
        packed = arithmetic.pack(chosen[0], F) if self.block is None else pack_block(m, chosen, F, self.block, "pack")
        m.d.sync += result.eq(packed)

    def part(self, i: int) -> slice:
        """Where a lane's code of F' lies in a port."""
        return slice(i * self.layout.bits, (i + 1) * self.layout.bits)

    def _taken(self, m: Any, port: Any, result: Any, packed: Any) -> list[Number]:
        """g of every lane: in pass 1 of the block that was just packed, later of the one that is read."""
        F = self.layout
        code = named(m, "stored_code", hdl.Mux(packed, result, port.stored))
        if self.block is None:
            given = [arithmetic.unpack(m, code, F, "read")]
        else:
            given = unpack_block(m, code, self.block, "unpack")
        return [rebased(m, n, F, f"value_{i}") for i, n in enumerate(given)]

    def _sums(self, m: Any, port: Any, late: Now, g: Number, i: int) -> tuple[Any, Any]:
        """A lane's sums of g and of g xhat."""
        X = layout(self.activations.form)
        code = port.xhat[i * X.bits : (i + 1) * X.bits]
        xhat = rebased(m, arithmetic.unpack(m, code, X, f"xhat_value_{i}"), X, f"xhat_{i}")
        found = []
        for name, term, unit, magnitude, bits in (
            ("sum", g, self.unit, self.magnitude, self.sum_bits),
            ("cross", arithmetic.multiply(m, g, xhat, f"term_{i}"), self.cross_unit, self.cross_magnitude,
             self.cross_bits),
        ):  # fmt: skip
            units = fixed.fixed_point(m, term, unit, magnitude, f"{name}_units_{i}")
            total = hdl.Signal(bits, name=f"{name}_{i}", reset_less=True)
            with m.If(late["collect"]):
                base = total & ~late["first"].replicate(bits)
                wide = hdl.Cat(units, hdl.Const(0, bits))[:bits] ^ term.sign.replicate(bits)
                m.d.sync += total.eq((base + wide + term.sign)[:bits])
            found.append(total)
        return found[0], found[1]

    def _dx(self, m: Any, g: Number, slope: Any, shift: Any, i: int) -> Any:
        """The code of dx of a lane's element where that is no extremum."""
        dx = hdl.Signal(self.layout.bits, name=f"dx_{i}")
        wired = {"i_gradient": arithmetic.pack(g, self.layout), "i_slope": slope, "i_shift": shift}
        setattr(m.submodules, f"lane_{i}", hdl.Instance("lightnorm_gradient", **wired, o_dx=dx))
        return dx

    # What a channel takes once ---------------------------------------------------------------------------------------

    def _settled(self, m: Any, port: Any, sums: list[Any], taken: list[Number]) -> list[tuple[Any, Any]]:
        """The registers of `recoup.gates.wide` with their sequence, which settles a channel; what every lane keeps."""
        now = self._sequence(m, port)
        wide = Wide.made(
            self.width, self.digits, self.shift_bits + self.constant_bits, self.count_bits, self.clear, self.most_shifts
        )
        lanes: list[tuple[Any, Any]] = []
        for i in range(self.lanes):
            slope, shift = (hdl.Signal(p.width, name=f"held_{p.name}_{i}", reset_less=True) for p in self.held)
            lanes.append((slope, shift))
        sigma = self._sigma(m, port)
        codes = self._channel(m, port, wide, now, sums, sigma)
        minus, sign = self._signs(m, port, now, wide, codes, self._of_lane(m, port, [n.sign for n in taken], "sign"))
        turned = named(m, "turned", (now["combine"] | now["combine prepared"]) & minus & wide.less)
        divides = now["divide"] | now["compare"] | now["compare prepared"]
        fits, combined = wide.added(m, named(m, "subtract", divides | minus), turned)
        wide.divide(now["divide"], fits, combined)
        with m.If(now["compare"] | now["compare prepared"]):
            m.d.sync += wide.less.eq(~fits)
        self._prepared(m, port, wide, now, codes, lanes, combined)
        self._extremum(m, port, wide, now, sigma, taken, combined, sign)
        wide.connect(m)
        here = [(port.lane == i) if self.lanes > 1 else hdl.Const(1, 1) for i in range(self.lanes)]
        mean = codes["mean"]
        product = Number(mean.sign, mean.exponent, wide.b[: self.shift_bits], 0, self.span, leading=self.shift_leading)
        lifted = arithmetic.normalised(m, product, "lifted")
        flags = [v.any() for v in (sigma.significand[: self.spare], lifted.significand[: self.fine])]
        code = hdl.Cat(lifted.significand, lifted.exponent, lifted.sign, *(flags if self.flagged else ()))
        for (slope, shift), chosen in zip(lanes, here, strict=True):
            with m.If(now["store"] & chosen):
                m.d.sync += slope.eq(hdl.Cat(sigma.significand, sigma.exponent, sigma.sign))
                m.d.sync += shift.eq(code)
        return lanes

    def _sequence(self, m: Any, port: Any) -> Now:
        """Three sections, each begun by its port."""
        ends = self.ends
        last = max(end for _, end in ends.values())
        count = hdl.Signal(width_of(last), name="phase", reset_less=True)
        rests = named(m, "rests", hdl.Cat(*(count == end for _, end in ends.values())).any())
        with m.If(~rests):
            m.d.sync += count.eq(count + 1)
        for name, (begin, _) in ends.items():
            with m.If(getattr(port, name)):
                m.d.sync += count.eq(begin)
        found = {}
        for name, (a, b) in self.phases.items():
            now = hdl.Const(0, 1) if a == b else (count >= a) & (count < b) if b - a > 1 else count == a
            found[name] = named(m, f"phase_{name.replace(' ', '_')}", now)
        return found

    def _sigma(self, m: Any, port: Any) -> Number:
        """gamma r."""
        F, S = layout(self.activations.form), layout(self.activations.wide)
        at = S.fraction + S.exponent
        code = hdl.Cat(port.reciprocal[:at], hdl.Const(0, 1), port.reciprocal[at:])
        gamma = arithmetic.unpack(m, port.gamma, F, "gamma_value")
        sigma = arithmetic.multiply(m, gamma, arithmetic.unpack(m, code, S, "reciprocal_value"), "sigma")
        exponent = hdl.Cat(sigma.exponent, hdl.Const(0, 64))[: width_of(self.slope[3])]
        return replace(sigma, exponent=exponent, significand=sigma.significand[: self.slope_bits], sign=gamma.sign)

    def _channel(self, m: Any, port: Any, wide: Wide, now: Now, sums: list[Any], sigma: Number) -> dict[str, Number]:
        """S, the sum of g and their mean rounded, by the ports that show them, and m |sigma| in b."""
        S = layout(self.wide)
        total, cross = (self._magnitude(m, port, [lane[i] for lane in sums], n) for i, n in enumerate(("sum", "cross")))
        cross_start, total_start, least = self.starts
        for size, start, phase in ((cross[0], cross_start, "load cross"), (total[0], total_start, "keep cross")):
            wide.load(now[phase], "a", size)
            wide.count(now[phase], start)
        for name, coarse in (("eight", True), ("one", False)):
            wide.normalise(now[f"cross by {name}"] | now[f"total by {name}"], "a", coarse)
            wide.normalise(now[f"count by {name}"], "b", coarse)
        wide.load(now["keep total"], "b", port.count)
        wide.count(now["keep total"], wide.shifts - (self.count_bits - 1))
        top, divided = wide.a[: self.width][self.width - self.digits :], now["keep mean"]
        rest = named(m, "rest", hdl.Mux(divided, wide.a.any(), wide.a[: self.width - self.digits].any()))
        significand = named(m, "top", hdl.Mux(divided, wide.quotient, top))
        sign = hdl.Mux(now["keep cross"], cross[1], total[1])
        low = least - (self.digits - 1)
        number = Number(sign, wide.shifts, significand, low, max(self.starts[:2]) + self.count_bits, 1,
                        sticky=rest if S.nearest else None)  # fmt: skip
        settled = arithmetic.quantise(m, number, S, "settled")
        code, found = named(m, "settled_code", arithmetic.pack(settled, S)), {}
        for name, phase in (("dgamma", "keep cross"), ("dbeta", "keep total"), ("mean", "keep mean")):
            register = hdl.Signal(S.bits, name=f"{name}_code", reset_less=True)
            with m.If(now[phase]):
                m.d.sync += register.eq(code)
            m.d.comb += getattr(port, name).eq(register)
            found[name] = rebased(m, arithmetic.unpack(m, register, S, f"{name}_value"), S, name)
        wide.load(now["keep mean"], "a", rebased(m, settled, S, "mean_now").significand)
        wide.load(now["keep mean"], "b", hdl.Const(0, 1), 0)
        factor = hdl.Mux(now["times constant"], port.constant, sigma.significand)
        wide.multiply(now["product"] | now["times slope"] | now["times constant"], factor)
        return found

    def _signs(self, m: Any, port: Any, now: Now, wide: Wide, codes: dict[str, Number], g: Any) -> tuple[Any, Any]:
        """Whether magnitudes are subtracted, and the sign of dx at an extremum, that of sigma left out.

        b holds the magnitude of t = m + f S, or at a minimum m - f S; dx is (g - t) sigma.
        """
        term = codes["dgamma"].sign ^ port.low
        apart = named(m, "apart", codes["mean"].sign ^ term)
        shift = hdl.Signal(name="shift_sign", reset_less=True)
        with m.If(now["combine prepared"]):
            m.d.sync += shift.eq(hdl.Mux(apart & wide.less, term, codes["mean"].sign))
        against = ~(g ^ shift)
        minus = named(m, "minus", hdl.Mux(now["combine prepared"], apart, now["combine"] & against))
        return minus, named(m, "dx_sign", g ^ (against & wide.less))

    def _prepared(
        self, m: Any, port: Any, wide: Wide, now: Now, codes: dict[str, Number], lanes: list[Any], combined: Any
    ) -> None:
        """b = |m sigma +- f S sigma|."""
        cross, W = codes["dgamma"], self.shift_bits
        wide.load(now["load factor"], "a", cross.significand)
        wide.load(now["load product"], "a", wide.b[:W])
        wide.load(now["load factor"] | now["load product"], "b", hdl.Const(0, 1), 0)
        wide.load(
            now["load mean"],
            "a",
            self._of_lane(m, port, [lane[1][:W] for lane in lanes], "shift"),
            self.places[0] - self.lifted,
        )
        wide.count(now["load mean"], cross.exponent)
        top = W + width_of(self.span + self.lifted)
        wide.count(now["load exponent"], self._of_lane(m, port, [lane[1][W:top] for lane in lanes], "shift_exponent"))
        for name, coarse in (("eight", True), ("one", False)):
            wide.place(now[f"cross up by {name}"], "b", coarse)
            wide.place(now[f"mean up by {name}"], "a", coarse)
        wide.load(now["combine prepared"], "b", combined[: self.width], 0)

    def _extremum(
        self, m: Any, port: Any, wide: Wide, now: Now, sigma: Number, taken: list[Number], combined: Any, sign: Any
    ) -> None:
        """dx at an extremum: |g sigma - t sigma|, normalised and rounded."""
        F = self.layout
        g = self._of_lane(m, port, [n.significand for n in taken], "gradient")
        exponent = self._of_lane(m, port, [n.exponent for n in taken], "exponent")
        wide.load(now["load gradient"], "a", named(m, "gradient_product", g * sigma.significand), self.places[1])
        wide.count(now["load gradient"], exponent)
        for name, coarse in (("eight", True), ("one", False)):
            wide.place(now[f"gradient up by {name}"], "a", coarse)
            wide.normalise(now[f"dx by {name}"], "a", coarse)
        dx_sign = hdl.Signal(name="extremum_sign", reset_less=True)
        wide.load(now["combine"], "a", combined[: self.width], 0)
        wide.count(now["combine"], sigma.exponent + self.start_of_dx)
        with m.If(now["combine"]):
            m.d.sync += dx_sign.eq(sign ^ sigma.sign)
        digits, W = self.dx_digits, self.width
        rest = named(m, "dx_rest", wide.a[: W - digits].any()) if F.nearest else None
        number = Number(dx_sign, wide.shifts, wide.a[W - digits : W], self.lowest_of_dx - (digits - 1),
                        self.start_of_dx + self.slope[3], sticky=rest)  # fmt: skip
        code = arithmetic.pack(arithmetic.quantise(m, number, F, "extremum_value"), F)
        result = hdl.Signal(F.bits, name="extremum_code", reset_less=True)
        with m.If(now["keep dx"]):
            m.d.sync += result.eq(code)
        m.d.comb += port.extremum_dx.eq(result)

    def _magnitude(self, m: Any, port: Any, values: list[Any], name: str) -> tuple[Any, Any]:
        """Magnitude and sign of the lane's sum."""
        total = self._of_lane(m, port, values, name)
        sign = total[-1]
        size = ((total ^ sign.replicate(len(total))) + sign)[: len(total) - 1]
        return named(m, f"{name}_magnitude", size), sign

    def _of_lane(self, m: Any, port: Any, values: list[Any], name: str) -> Any:
        """The value of the lane that a channel is settled for."""
        return of_lane(m, port, values, f"of_lane_{name}")
