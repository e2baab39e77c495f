"""The gates of a unit for rows that differ from the forward unit's: one row's statistics from all lanes, and of an RMS
norm the divider's sequence without a mean.

Legend: G lanes, the features of a block; R the sum of the chunks' ranges, or of their largest magnitudes.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from recoup.formats.ports import layout
from recoup.gates import arithmetic, fixed
from recoup.gates.arithmetic import Number, named
from recoup.gates.division import Divider
from recoup.gates.module import amaranth
from recoup.lightnorm.rtl_gates import Gates
from recoup.lightnorm.scale import magnitude_constant

__all__ = ["RowGates"]

hdl = amaranth("hdl")


@dataclass(frozen=True)
class RowGates(Gates):
    """One channel, the row, whatever the number of lanes."""

    @property
    def channels(self) -> int:
        """One."""
        return 1

    @property
    def flags(self) -> tuple[str, ...]:
        """Of an RMS norm a chunk has no smallest."""
        return super().flags if self.centred else ("collect", "first", "chunk", "fold")

    def factor(self, samples: int) -> float:
        """C(m) of a layer norm, A(m) of an RMS norm."""
        return super().factor(samples) if self.centred else magnitude_constant(samples)

    @property
    def width(self) -> int:
        """Bits of s, and of the divider."""
        return super().width if self.centred else self.scale_bits

    @cached_property
    def phases(self) -> dict[str, tuple[int, int]]:
        """What the divider does, from the count on, before the count: without a mean it begins with R."""
        if self.centred:
            return super().phases
        lengths = {
            "keep": 1,
            "scale": self.range_bits,
            "eps": 1,
            "align s": self.width - self.eps_units.bit_length(),
            "one": 1,
            "invert": self.digits,
            "end": 1,
            "store": 1,
        }
        found, at = {}, 0
        for name, length in lengths.items():
            found[name] = (at, at + length)
            at += length
        return found

    @cached_property
    def starts(self) -> tuple[int, int, int]:
        """As of the forward unit; without a mean all are the reciprocal's."""
        if self.centred:
            return super().starts
        inverse = -(self.width - 1) - self.s_unit
        return 0, 0, inverse - (self.digits - 1)

    def _gathered(self, m: Any, port: Any, late: Any, taken: list[Number]) -> list[tuple[Any, ...]]:
        """The row's sum and R, or R alone."""
        if not self.centred:
            return [(self._magnitudes(m, port, late, taken),)]
        if self.lanes == 1:
            return super()._gathered(m, port, late, taken)
        keys = [self._key(m, value, i) for i, value in enumerate(taken)]
        ends = {name: self._extremum(m, port, late, keys, name) for name in ("largest", "smallest")}
        end = self._of_key(hdl.Mux(late["low"], ends["smallest"], ends["largest"]), taken[0])
        terms = self._units(m, late, taken, end)
        total = hdl.Signal(self.sum_bits, name="sum_0", reset_less=True)
        ranges = hdl.Signal(self.range_bits, name="range_0", reset_less=True)
        with m.If(late["collect"] | late["fold"]):
            base = hdl.Mux(late["fold"], hdl.Cat(ranges, hdl.Const(0, self.sum_bits))[: self.sum_bits], total)
            base = hdl.Mux(late["first"], 0, base)[: self.sum_bits]
            sign = terms[-1].replicate(self.sum_bits)
            added = named(m, "added", (base + hdl.Cat(terms, sign)[: self.sum_bits])[: self.sum_bits])
            with m.If(late["fold"]):
                m.d.sync += ranges.eq(added)
            with m.Else():
                m.d.sync += total.eq(added)
        return [(total, ranges)]

    def _units(self, m: Any, late: Any, taken: list[Number], end: Number) -> Any:
        """The sum of a block's elements in units of F's smallest step, in two's complement; in a fold cycle lane 0 has
        a chunk's largest, or its smallest to be taken off, and the others nothing."""
        bits, found = self.magnitude + 1 + (self.lanes - 1).bit_length(), None
        for i, element in enumerate(taken):
            value, sign = element, element.sign
            if i == 0:
                fold = [late["fold"].replicate(len(part)) for part in (end.exponent, end.significand)]
                value = Number(
                    hdl.Mux(late["fold"], end.sign, sign),
                    (end.exponent & fold[0]) | (element.exponent & ~fold[0]),
                    (end.significand & fold[1]) | (element.significand & ~fold[1]),
                    value.low, value.most, clear=True,
                )  # fmt: skip
                sign = value.sign ^ (late["fold"] & late["low"])
            units = fixed.fixed_point(m, value, self.unit, self.magnitude, f"units_{i}")
            if i:
                units, sign = units & ~late["fold"].replicate(self.magnitude), sign & ~late["fold"]
            negative = named(m, f"negative_{i}", sign)
            term = hdl.Cat(units, hdl.Const(0, bits))[:bits] ^ negative.replicate(bits)
            found = term + negative if found is None else found + term + negative
            found = named(m, f"units_to_{i}", found[:bits])
        return found

    def _key(self, m: Any, value: Number, i: int) -> Any:
        """A value as an integer of the same order; of an RMS norm its magnitude."""
        rank = hdl.Cat(value.significand[:-1], value.exponent, value.significand[-1])
        if not self.centred:
            return named(m, f"key_{i}", rank)
        return named(m, f"key_{i}", hdl.Cat(rank ^ value.sign.replicate(len(rank)), ~value.sign))

    def _extremum(self, m: Any, port: Any, late: Any, keys: list[Any], name: str) -> Any:
        """The register of a chunk's largest or smallest key so far; which elements are, in their order, goes out."""
        held = hdl.Signal(len(keys[0]), name=f"{name}_0", reset_less=True)
        best = held
        for i, key in enumerate(keys):
            new = key > best if name == "largest" else key < best
            new = named(m, f"beyond_{name}_{i}", new | late["chunk"] if i == 0 else new)
            m.d.comb += getattr(port, f"new_{name}")[i].eq(late["collect"] & new)
            best = named(m, f"{name}_to_{i}", hdl.Mux(new, key, best))
        with m.If(late["collect"]):
            m.d.sync += held.eq(best)
        return held

    def _magnitudes(self, m: Any, port: Any, late: Any, taken: list[Number]) -> Any:
        """R of an RMS norm."""
        largest = self._extremum(m, port, late, [self._key(m, v, i) for i, v in enumerate(taken)], "largest")
        M, E, like = self.form.mantissa, len(taken[0].exponent), taken[0]
        number = Number(
            hdl.Const(0, 1), largest[M : M + E], hdl.Cat(largest[:M], largest[-1]), like.low, like.most, clear=True
        )
        units = fixed.fixed_point(m, number, self.unit, self.magnitude, "units")
        ranges = hdl.Signal(self.range_bits, name="range_0", reset_less=True)
        with m.If(late["fold"]):
            base = hdl.Mux(late["first"], 0, ranges)[: self.range_bits]
            m.d.sync += ranges.eq((base + units)[: self.range_bits])
        return ranges

    def _settled(self, m: Any, port: Any, lanes: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """The divider with its sequence; what the lanes have of it."""
        if self.centred:
            return super()._settled(m, port, lanes)
        S, W, ((ranges,),) = layout(self.wide), self.width, lanes
        _, inverse_start, low = self.starts
        most = inverse_start + W - self.eps_units.bit_length()
        divider, now = Divider.made(m, W, self.digits, most, self.range_bits), self._sequence(m, port)
        with m.If(now["keep"]):
            divider.load(m, ranges, hdl.Const(0, 1), 0)
        with m.If(now["scale"]):
            divider.multiply(m, hdl.Cat(hdl.Const(0, self.pad), port.constant))
        with m.If(now["eps"]):
            divider.load_divisor(m, self._with_eps(divider), inverse_start)
        with m.If(now["align s"]):
            divider.align_divisor(m)
        with m.If(now["one"]):
            divider.load_one(m)
        with m.If(now["invert"]):
            divider.divide(m)
        sticky = arithmetic.any_of(divider.a) if S.nearest else None
        quotient = Number(
            hdl.Const(0, 1), divider.shifts, divider.quotient, low, most, leading=1, sticky=sticky
        )  # fmt: skip
        code = named(m, "settled", arithmetic.pack(arithmetic.quantise(m, quotient, S, "quotient"), S))
        at = S.fraction + S.exponent
        inverse = hdl.Signal(S.bits - 1, name="inverse_code", reset_less=True)  # which has no sign
        with m.If(now["end"]):
            m.d.sync += inverse.eq(hdl.Cat(code[:at], code[at + 1 :]))
        m.d.comb += port.reciprocal.eq(inverse)
        kept = hdl.Signal(len(inverse), name="inverse_0", reset_less=True)
        with m.If(now["store"]):
            m.d.sync += kept.eq(inverse)
        return [(kept,)]
