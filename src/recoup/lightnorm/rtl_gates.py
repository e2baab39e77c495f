"""LightNorm's forward unit in gates: a lane's statistics, the divider with its sequence, a lane's normalization."""

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from recoup.formats.ports import layout
from recoup.gates import arithmetic, fixed
from recoup.gates.arithmetic import Number, named, width_of
from recoup.gates.blocks import pack_block, rebased, unpack_block
from recoup.gates.division import Divider
from recoup.gates.module import amaranth
from recoup.lightnorm.rtl_widths import Widths

__all__ = ["Gates"]

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
        for name in ("collect", "first", "chunk", "fold", "low"):
            late[name] = hdl.Signal(name=f"{name}_late", reset_less=True)
            m.d.sync += late[name].eq(getattr(port, name))
        taken = self._taken(m, port, result)
        lanes = [self._statistics(m, port, late, value, i) for i, value in enumerate(taken)]
        means = self._settled(m, port, lanes)
        results = [
            self._normalised(m, port, taken[i], arithmetic.unpack(m, mean, layout(self.wide), f"mean_{i}"),
                             arithmetic.unpack(m, reciprocal, layout(self.wide), f"reciprocal_{i}"), i)
            for i, (mean, reciprocal) in enumerate(means)
        ]  # fmt: skip
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

    def _settled(self, m: Any, port: Any, lanes: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        """The divider with its sequence; the registers of mean and reciprocal of every lane."""
        S, W = layout(self.wide), self.width
        totals, ranges = (
            _chosen(m, port, [lane[i] for lane in lanes], name) for i, name in enumerate(("sum", "range"))
        )
        mean_start, inverse_start, low = self.starts
        most = max(mean_start + self.elements.bit_length() - 1, inverse_start + W - 1)
        divider = Divider.made(W, self.digits, most)
        count = hdl.Signal(width_of(self.settling), name="count", reset_less=True)
        with m.If(port.settle):
            m.d.sync += count.eq(0)
        with m.Elif(count != self.phases["end"][1]):
            m.d.sync += count.eq(count + 1)
        now = {
            name: named(m, f"phase_{name.replace(' ', '_')}", (count >= a) & (count < b))
            for name, (a, b) in self.phases.items()
        }
        sign = totals[-1]
        size = named(m, "sum_magnitude", ((totals ^ sign.replicate(len(totals))) + sign)[: self.sum_bits - 1])
        with m.If(now["load"]):
            divider.load(m, size, port.count, mean_start)
        with m.If(now["align"] | now["align s"]):
            divider.normalise(m)
        with m.If(now["mean"] | now["invert"]):
            divider.divide(m)
        with m.If(now["keep"]):
            divider.load(m, ranges, hdl.Const(0, 1), 0)
        pad = self.unit + self.constants[0] - self.s_unit
        with m.If(now["scale"]):
            divider.multiply(m, hdl.Cat(hdl.Const(0, pad), port.constant))
        with m.If(now["eps"]):
            eps = int(Fraction(self.eps) / Fraction(2) ** self.s_unit)
            divider.load(m, hdl.Const(1, 1), (divider.b + eps)[:W], inverse_start)
        sticky = arithmetic.any_of(divider.a) if S.nearest else None
        quotient = Number(sign & now["keep"], divider.shifts, divider.quotient, low, most, leading=1, sticky=sticky)
        code = named(m, "settled", arithmetic.pack(arithmetic.quantise(m, quotient, S, "quotient"), S))
        found = []
        for i in range(self.lanes):
            here = (port.lane == i) if self.lanes > 1 else hdl.Const(1, 1)
            mean, reciprocal = (
                hdl.Signal(S.bits, name=f"{name}_{i}", reset_less=True) for name in ("mean", "reciprocal")
            )
            with m.If(now["keep"] & here):
                m.d.sync += mean.eq(code)
            with m.If(now["end"] & here):
                m.d.sync += reciprocal.eq(code)
            found.append((mean, reciprocal))
        return found

    def _normalised(self, m: Any, port: Any, value: Number, mean: Number, reciprocal: Number, i: int) -> Number:
        """y of a lane; xhat goes to its port."""
        F, D = layout(self.form), self.config.difference
        negative = replace(mean, sign=~mean.sign)
        exact = (
            max(value.base + value.most, mean.base + mean.most)
            + 1
            - min(value.low + value.least, mean.low + mean.least)
        )
        precision, nearest = (exact, False) if D is None else (D.mantissa + 1, D.rounding == "nearest")
        difference = arithmetic.add(m, value, negative, precision, nearest, f"difference_{i}")
        if D is not None:
            difference = arithmetic.quantise(m, difference, layout(D), f"difference_{i}_rounded")
        scaled = arithmetic.multiply(m, difference, reciprocal, f"scaled_{i}")
        xhat = arithmetic.quantise(m, scaled, F, f"xhat_{i}")
        m.d.comb += port.xhat[i * F.bits : (i + 1) * F.bits].eq(arithmetic.pack(xhat, F))
        gamma, beta = (
            arithmetic.unpack(m, getattr(port, name)[i * F.bits : (i + 1) * F.bits], F, f"{name}_{i}")
            for name in ("gamma", "beta")
        )
        product = arithmetic.normalised(m, arithmetic.multiply(m, xhat, gamma, f"product_{i}"), f"product_{i}_top")
        total = arithmetic.add(m, product, beta, F.fraction + 1, F.nearest, f"affine_{i}")
        return arithmetic.quantise(m, total, F, f"y_{i}")


def _chosen(m: Any, port: Any, values: list[Any], name: str) -> Any:
    """The value of the lane that the divider works for."""
    if len(values) == 1:
        return values[0]
    found = values[0]
    for i, value in enumerate(values[1:], 1):
        found = hdl.Mux(port.lane == i, value, found)
    return named(m, f"chosen_{name}", found[: len(values[0])])
