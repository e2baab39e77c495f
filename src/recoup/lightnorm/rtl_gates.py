"""LightNorm's forward unit in gates: a lane's statistics, the divider with its sequence, normalization of lanes."""

from dataclasses import dataclass
from typing import Any

from recoup.formats.ports import layout
from recoup.gates import arithmetic, fixed
from recoup.gates.arithmetic import Number, named, width_of
from recoup.gates.blocks import pack_block, rebased, unpack_block
from recoup.gates.division import Divider
from recoup.gates.module import amaranth
from recoup.lightnorm.rtl_normalise import Normalise
from recoup.lightnorm.rtl_widths import Widths

__all__ = ["Gates", "of_lane"]

hdl = amaranth("hdl")


@dataclass(frozen=True)
class Gates(Widths):
    """The gates of a unit."""

    def elaborate(self, m: Any, port: Any) -> None:
        """Gates and registers."""
        F, G = layout(self.form), self.lanes
        bits = F.bits
        codes = [port.x[i * bits : (i + 1) * bits] for i in range(G)]
        given = [rebased(m, arithmetic.unpack(m, code, F, f"x_{i}"), F, f"x_{i}") for i, code in enumerate(codes)]
        result = hdl.Signal(len(port.y), name="result", reset_less=True)
        m.d.comb += port.y.eq(result)
        late = {}
        for name in self.flags:
            late[name] = hdl.Signal(name=f"{name}_late", reset_less=True)
            m.d.sync += late[name].eq(getattr(port, name))
        taken = self._taken(m, port, result)
        held = self._settled(m, port, self._gathered(m, port, late, taken))
        kept = held * (G // len(held))
        results = [self._normalised(m, port, value, kept[i], i) for i, value in enumerate(taken)]
        chosen = [
            arithmetic.either(m, port.normalise, y, x, f"out_{i}")
            for i, (x, y) in enumerate(zip(given, results, strict=True))
        ]
        if self.block is None:
            m.d.sync += result.eq(arithmetic.pack(chosen[0], F))
        else:
            m.d.sync += result.eq(pack_block(m, chosen, F, self.block, "pack"))

    def _taken(self, m: Any, port: Any, result: Any) -> list[Number]:
        """The values of a block: in pass 1 the one that was just packed, in pass 2 the one that is read."""
        F = layout(self.form)
        code = named(m, "stored", hdl.Mux(port.normalise, port.stored, result))
        if self.block is None:
            return [rebased(m, arithmetic.unpack(m, code, F, "read"), F, "value_0")]
        return [rebased(m, n, F, f"value_{i}") for i, n in enumerate(unpack_block(m, code, self.block, "unpack"))]

    def _gathered(self, m: Any, port: Any, late: Any, taken: list[Number]) -> list[tuple[Any, ...]]:
        """Every channel's sum and R."""
        return [self._statistics(m, port, late, value, i) for i, value in enumerate(taken)]

    def _statistics(self, m: Any, port: Any, late: Any, value: Number, i: int) -> tuple[Any, Any]:
        """A lane's sum and R."""
        rank = hdl.Cat(value.significand[:-1], value.exponent, value.significand[-1])
        key = named(m, f"key_{i}", hdl.Cat(rank ^ value.sign.replicate(len(rank)), ~value.sign))
        ends = {}
        for name in ("largest", "smallest"):
            held = hdl.Signal(len(key), name=f"{name}_{i}", reset_less=True)
            beyond = key > held if name == "largest" else key < held
            new = named(m, f"new_{name}_{i}", late["collect"] & (late["chunk"] | beyond))
            with m.If(new):
                m.d.sync += held.eq(key)
            m.d.comb += getattr(port, f"new_{name}")[i].eq(new)
            ends[name] = held
        # One shifter for all three: an element, a chunk's largest, its smallest, which is taken off.
        end = hdl.Mux(late["low"], ends["smallest"], ends["largest"])
        number = self._of_key(hdl.Mux(late["fold"], end, key), value)
        units = fixed.fixed_point(m, number, self.unit, self.magnitude, f"units_{i}")
        negative = named(m, f"negative_{i}", number.sign ^ (late["fold"] & late["low"]))
        total = hdl.Signal(self.sum_bits, name=f"sum_{i}", reset_less=True)
        ranges = hdl.Signal(self.range_bits, name=f"range_{i}", reset_less=True)
        with m.If(late["collect"] | late["fold"]):
            base = hdl.Mux(late["fold"], hdl.Cat(ranges, hdl.Const(0, self.sum_bits))[: self.sum_bits], total)
            base = hdl.Mux(late["first"], 0, base)[: self.sum_bits]
            term = hdl.Cat(units, hdl.Const(0, self.sum_bits))[: self.sum_bits] ^ negative.replicate(self.sum_bits)
            added = named(m, f"added_{i}", (base + term + negative)[: self.sum_bits])
            with m.If(late["fold"]):
                m.d.sync += ranges.eq(added)
            with m.Else():
                m.d.sync += total.eq(added)
        return total, ranges

    def _of_key(self, key: Any, like: Number) -> Number:
        """The number of an ordered key."""
        sign, rank = ~key[-1], key[:-1]
        rank = rank ^ sign.replicate(len(rank))
        M, E = self.form.mantissa, len(like.exponent)
        return Number(sign, rank[M : M + E], hdl.Cat(rank[:M], rank[-1]), like.low, like.most, clear=True)

    def _settled(self, m: Any, port: Any, lanes: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """The divider with its sequence; what every lane keeps of it: mu or mu r, and r."""
        S, W = layout(self.wide), self.width
        totals, ranges = (
            of_lane(m, port, [lane[i] for lane in lanes], f"chosen_{name}") for i, name in enumerate(("sum", "range"))
        )
        mean_start, inverse_start, low = self.starts
        # mu is no larger than F's largest value, and s no smaller than eps.
        highest = mean_start - self.sum_bits + 1 + self.elements.bit_length() + self.magnitude
        most = max(mean_start, highest, inverse_start + W - self.eps_units.bit_length())
        loaded = max(self.sum_bits - 1, self.range_bits, S.fraction + 1)
        divider, now = Divider.made(m, W, self.digits, most, loaded), self._sequence(m, port)
        sign = totals[-1]
        size = named(m, "sum_magnitude", ((totals ^ sign.replicate(len(totals))) + sign)[: self.sum_bits - 1])
        mean = hdl.Signal(S.bits, name="mean_code", reset_less=True)
        inverse = hdl.Signal(S.bits - 1, name="inverse_code", reset_less=True)  # which has no sign
        at = S.fraction + S.exponent
        whole = hdl.Cat(inverse[:at], hdl.Const(0, 1), inverse[at:])
        mu, r = (arithmetic.unpack(m, code, S, f"{name}_value") for name, code in (("mean", mean), ("inverse", whole)))
        with m.If(now["load"]):
            divider.load(m, size, port.count, mean_start)
        with m.If(now["align"] | now["align s"]):
            divider.normalise(m)
        with m.If(now["mean"] | now["invert"]):
            divider.divide(m)
        with m.If(now["keep"]):
            divider.load(m, ranges, hdl.Const(0, 1), 0)
        sticky = arithmetic.any_of(divider.a) if S.nearest else None
        quotient = Number(sign & now["keep"], divider.shifts, divider.quotient, low, most, leading=1, sticky=sticky)
        settled = arithmetic.quantise(m, quotient, S, "quotient")
        code = named(m, "settled", arithmetic.pack(settled, S))
        factor = hdl.Cat(hdl.Const(0, self.pad), port.constant)
        if self.distributed:
            factor = hdl.Mux(now["product"], mu.significand, factor)
        with m.If(now["scale"] | now["product"]):
            divider.multiply(m, factor)
        with m.If(now["eps"]):
            divider.load(m, hdl.Const(1, 1), self._with_eps(divider), inverse_start)
        with m.If(now["keep"]):
            m.d.sync += mean.eq(code)
        with m.If(now["end"]):
            m.d.sync += inverse.eq(hdl.Cat(code[:at], code[at + 1 :]))
            divider.load(m, settled.significand, hdl.Const(0, 1), 0)
        m.d.comb += [port.mean.eq(mean), port.reciprocal.eq(inverse)]
        return self._stored(
            m, port, now["store"], self._shift(m, divider, mu, r) if self.distributed else mean, inverse
        )

    def _with_eps(self, divider: Divider) -> Any:
        """s of R C, which has no bits below pad, where s has those of eps."""
        pad, eps = self.pad, self.eps_units
        s = hdl.Cat(hdl.Const(eps % (1 << pad), pad), divider.b[pad:] + (eps >> pad)) if pad else divider.b + eps
        return s[: self.width]

    def _sequence(self, m: Any, port: Any) -> dict[str, Any]:
        """The divider's phases, each a bit that tells whether it is now."""
        count = hdl.Signal(width_of(self.settling), name="phase", reset_less=True)
        with m.If(port.settle):
            m.d.sync += count.eq(0)
        with m.Elif(count != self.phases["store"][1]):
            m.d.sync += count.eq(count + 1)
        return {
            name: named(m, f"phase_{name.replace(' ', '_')}", (count >= a) & (count < b) if b - a > 1 else count == a)
            for name, (a, b) in self.phases.items()
        }

    def _shift(self, m: Any, divider: Divider, mean: Number, reciprocal: Number) -> Any:
        """The code of mu r, whose significands the divider has multiplied."""
        at = self.shift
        exponent, most = mean.exponent + reciprocal.exponent, mean.most + reciprocal.most
        product = Number(mean.sign, exponent[: width_of(most)], divider.b[: at.significand], mean.low + reciprocal.low,
                         most, mean.leading + reciprocal.leading + 1)  # fmt: skip
        top = arithmetic.normalised(m, product, "shift_top")
        nonzero = top.significand[-1]
        field = hdl.Cat(top.exponent, hdl.Const(0, at.exponent))[: at.exponent] & nonzero.replicate(at.exponent)
        uneven = [arithmetic.any_of(n.significand[: at.uneven]) for n in (reciprocal, top)] if at.uneven else []
        return named(m, "shift", hdl.Cat(top.significand, field, top.sign & nonzero, *uneven))

    def _stored(self, m: Any, port: Any, now: Any, first: Any, reciprocal: Any) -> list[tuple[Any, ...]]:
        """The channels' registers."""
        found = []
        for i in range(self.channels):
            here = (port.lane == i) if self.channels > 1 else hdl.Const(1, 1)
            held = hdl.Signal(len(first), name=f"held_{i}", reset_less=True)
            inverse = hdl.Signal(len(reciprocal), name=f"inverse_{i}", reset_less=True)
            with m.If(now & here):
                m.d.sync += [held.eq(first), inverse.eq(reciprocal)]
            found.append((held, inverse))
        return found

    def _normalised(self, m: Any, port: Any, value: Number, held: tuple[Any, ...], i: int) -> Number:
        """y of a lane; xhat goes to its port."""
        F, lane = layout(self.form), Normalise(self.config, self.elements, self.eps, self.centred)
        at = slice(i * F.bits, (i + 1) * F.bits)
        y = hdl.Signal(F.bits, name=f"y_{i}")
        given = {"x": arithmetic.pack(value, F)} | {port.name: code for port, code in zip(lane.held, held, strict=True)}
        given |= {name: getattr(port, name)[at] for name in self.parameters}
        wired = {f"i_{name}": value for name, value in given.items()}
        xhat = hdl.Signal(F.bits, name=f"xhat_{i}")
        setattr(m.submodules, f"lane_{i}", hdl.Instance("lightnorm_normalise", **wired, o_xhat=xhat, o_y=y))
        m.d.comb += port.xhat[at].eq(xhat)
        return rebased(m, arithmetic.unpack(m, y, F, f"y_{i}"), F, f"y_{i}")


def of_lane(m: Any, port: Any, values: list[Any], name: str) -> Any:
    """The value of the lane at the port ``lane``, whose channel is settled."""
    if len(values) == 1:
        return values[0]
    found = values[0]
    for i, value in enumerate(values[1:], 1):
        found = hdl.Mux(port.lane == i, value, found)
    return named(m, name, found[: len(values[0])])
