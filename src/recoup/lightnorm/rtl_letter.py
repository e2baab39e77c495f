"""What LightNorm's forward unit computes, and the run that shows it: integers and the reference, not the gates' steps.

A run for verification begins in the middle of a channel: sums and ranges of what came before, mu and r of the lanes are
registers' first states. It takes two chunks more, settles one lane while the others normalize with what they have, and
normalizes with what was settled. Sums are wider than any output shows, so the registers are told as well.

Legend: G lanes; T steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recoup.formats import BlockCodes, FloatFields, decode, encode, ports, quantize
from recoup.gates.module import Expected, Inputs, Port
from recoup.lightnorm.exact import odd
from recoup.lightnorm.rtl_gates import Gates
from recoup.lightnorm.rtl_normalise import Normalise

__all__ = ["Letter"]

AFTER = 8
"""Steps that normalize with what was settled."""


@dataclass(frozen=True)
class Letter(Gates):
    """What the unit's ports and registers show."""

    @cached_property
    def lane(self) -> Normalise:
        """What a lane's normalization computes."""
        return Normalise(self.config, self.elements, self.eps)

    @cached_property
    def chunks(self) -> tuple[int, int]:
        """How many chunks a run takes, and elements of each."""
        count = min(self.config.chunks, 2)
        return count, min(3, self.elements // count)

    @cached_property
    def schedule(self) -> dict[str, list[int]]:
        """A run: what all have in common."""
        (count, m), rows = self.chunks, []
        for _ in range(count):
            rows += [{"collect": 1, "chunk": int(i == 0)} for i in range(m)] + [{"fold": 1}, {"fold": 1, "low": 1}]
        rows.append({})  # the pass is a cycle late
        rows.append({"settle": 1, "normalise": 1})
        rows += [{"normalise": int(i % 4 != 3)} for i in range(self.settling)] + [{"normalise": 1}] * AFTER
        names = ("collect", "chunk", "fold", "low", "settle", "normalise")
        return {name: [row.get(name, 0) for row in rows] for name in names}

    @property
    def starts_at(self) -> int:
        """The step with settle = 1."""
        return self.schedule["settle"].index(1)

    def phase(self, name: str) -> int:
        """The step in which a phase of the divider begins."""
        return self.starts_at + 1 + self.phases[name][0]

    def control(self, steps: int) -> Inputs:
        """Schedules for every lane that the divider may work for, of a channel's begin and of what comes later."""
        G = self.lanes
        found = {name: np.array((v + [0] * steps)[:steps], np.uint64) for name, v in self.schedule.items()}
        first = np.zeros((steps, 2 * G), np.uint64)
        first[[0, self.chunks[1]], :G] = 1
        found["first"] = first
        if G > 1:
            found["lane"] = np.broadcast_to(np.arange(2 * G, dtype=np.uint64) % G, (steps, 2 * G))
        return found

    @property
    def registers(self) -> dict[str, tuple[Port, ...]]:
        """By use: those that begin with a state, and those that are told."""
        held, r = self.lane.held
        sums = [
            Port(f"{name}_{i}", "out", bits, "")
            for name, bits in (("sum", self.sum_bits), ("range", self.range_bits))
            for i in range(self.lanes)
        ]
        kept = [
            Port(f"{name}_{i}", "out", port.width, "", legal=port.legal)
            for name, port in (("held", held), ("inverse", r))
            for i in range(self.lanes)
        ]
        divider = [Port("dividend", "out", self.width + 1, ""), Port("divisor", "out", self.width, "")]
        phase = Port("phase", "out", self.settling.bit_length(), "")
        return {"presets": (*sums, *kept, phase), "probes": (*sums, *kept, *divider)}

    # What it shows ---------------------------------------------------------------------------------------------------

    def expected(self, inputs: Inputs) -> Mapping[str, Expected]:
        """Pass 1 of exact integers, mu and r of exact quotients, pass 2 of `Normalise.computed`, for every run."""
        T, G = len(inputs["x"]), self.lanes
        collect, normalise = (np.array((self.schedule[name] + [0] * T)[:T], bool) for name in ("collect", "normalise"))
        given = self._blocked(self._values(inputs["x"]))  # [T, runs, G]
        sums, ranges = self._collected(inputs, given[collect])
        settled = self._settled_values(inputs, sums, ranges)
        taken = self._unpacked(inputs["stored"][normalise])
        xhat, y = self._second(inputs, taken, normalise, settled)
        shown = given.clone()
        shown[normalise] = y
        parts = (lambda v: v) if G > 1 else (lambda v: v[..., 0])
        late = range(1, T)
        found = {
            "y": Expected(late, self._packed(shown[:-1])),
            "xhat": Expected(np.flatnonzero(normalise).tolist(), parts(ports.codes(xhat, self.form))),
        }
        for name, sign in (("new_largest", 1), ("new_smallest", -1)):
            flags = np.zeros((T, *given.shape[1:]), np.uint64)
            flags[collect] = self._new(given[collect], sign).numpy()
            found[name] = Expected(late, parts(flags[:-1]))
        for i in range(G):
            for name, values, bits in (("sum", sums, self.sum_bits), ("range", ranges, self.range_bits)):
                found[f"{name}_{i}"] = Expected((self.starts_at,), _patterns(values[None, :, i], bits))
        return found | self._divider(inputs, settled, T)

    def _collected(self, inputs: Inputs, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Sums and summed ranges, in units of F's smallest step, object [runs, G]."""
        G, (count, m) = self.lanes, self.chunks
        units = _integers(x, self.unit)
        chunks = units.reshape(count, m, *units.shape[1:])
        begin = inputs["first"][0].astype(bool)
        found = []
        for name, bits, terms in (
            ("sum", self.sum_bits, units.sum(0)),
            ("range", self.range_bits + 1, (chunks.max(1) - chunks.min(1)).sum(0)),
        ):
            before = np.stack([_integer(inputs[f"{name}_{i}"][0], bits) for i in range(G)], -1)
            found.append(np.where(begin[:, None], 0, before) + terms)
        return found[0], found[1]

    def _settled_values(self, inputs: Inputs, sums: np.ndarray, ranges: np.ndarray) -> "Settled":
        """mu and r of the lane of every run."""
        runs = len(sums)
        lane = inputs["lane"][self.starts_at].astype(int) if self.lanes > 1 else np.zeros(runs, int)
        total, spread = (v[np.arange(runs), lane] for v in (sums, ranges))
        count, constant = (np.array([int(v) for v in inputs[n][self.starts_at]], object) for n in ("count", "constant"))
        pad = self.unit + self.constants[0] - self.s_unit
        scale = spread * constant * (1 << pad) + self.eps_units
        unit, scale_unit = Fraction(2) ** self.unit, Fraction(2) ** self.s_unit
        mean, r = (
            quantize(torch.tensor([odd(v) for v in values], dtype=torch.float64), self.wide) + 0.0
            for values in (
                [Fraction(t, n) * unit for t, n in zip(total, count, strict=True)],
                [1 / (s * scale_unit) for s in scale],
            )
        )
        return Settled(lane, total, count, scale, mean, r)

    def _second(self, inputs: Inputs, x: Tensor, normalise: np.ndarray, settled: "Settled") -> tuple[Tensor, Tensor]:
        """xhat and y, [steps, runs, G]."""
        steps, G = np.flatnonzero(normalise), self.lanes
        new = steps[:, None] > self.phase("store")
        held = []
        mean, r = ports.codes(settled.mean, self.wide), self.unsigned(ports.codes(settled.reciprocal, self.wide))
        for name, code in (("held", self.lane.kept(mean, r)), ("inverse", r)):
            found = [np.where(new & (settled.lane == i), code, inputs[f"{name}_{i}"]) for i in range(G)]
            held.append(np.stack(found, -1).reshape(-1))
        gamma, beta = (self._values(inputs[name][normalise]).reshape(-1) for name in ("gamma", "beta"))
        xhat, y = self.lane.computed(x.reshape(-1), held[0], held[1], gamma, beta)
        return xhat.reshape(x.shape), self._blocked(y.reshape(x.shape))

    def _divider(self, inputs: Inputs, settled: "Settled", steps: int) -> dict[str, Expected]:
        """The ports of mu and r, what is left of both divisions, s, and the product of the significands."""
        W, digits = self.width, self.digits
        rests = []
        for above, below in ((np.abs(settled.total), settled.count), (settled.scale * 0 + 1, settled.scale)):
            pairs = zip(above.tolist(), below.tolist(), strict=True)
            rests.append([2 * ((_top(a, W) << digits - 1) % _top(b, W)) for a, b in pairs])
        found = {
            "dividend": Expected((self.phase("keep"), self.phase("end")), _patterns(rests, W + 1)),
            "divisor": Expected((self.phase("align s"),), _patterns([settled.scale], W)),
        }
        mean, r = ports.codes(settled.mean, self.wide), self.unsigned(ports.codes(settled.reciprocal, self.wide))
        last = {"mean": mean, "reciprocal": r}
        for i in range(self.lanes):
            for name, code in (("held", self.lane.kept(mean, r)), ("inverse", r)):
                last[f"{name}_{i}"] = np.where(settled.lane == i, code, inputs[f"{name}_{i}"][0])
        return found | {name: Expected((steps - 1,), codes[None]) for name, codes in last.items()}

    def _values(self, codes: np.ndarray) -> Tensor:
        """Values of ports of lanes, [steps, runs, G]."""
        found = ports.values(codes, self.form)
        return found if self.lanes > 1 else found[..., None]

    def _blocked(self, x: Tensor) -> Tensor:
        """B of values, along the lanes."""
        return x if self.blocks is None else quantize(x, self.blocks.replace(dim=-1)) + 0.0

    def _new(self, x: Tensor, sign: int) -> Tensor:
        """Whether an element is its chunk's largest so far (sign 1) or smallest."""
        count, m = self.chunks
        chunks = (x * sign).reshape(count, m, *x.shape[1:])
        found = torch.ones_like(chunks, dtype=torch.bool)
        found[:, 1:] = chunks[:, 1:] > chunks.cummax(1).values[:, :-1]
        return found.reshape(x.shape)

    def _packed(self, x: Tensor) -> np.ndarray:
        """Codes of the port y, [steps, runs]."""
        if self.block is None or self.blocks is None:
            return ports.codes(x[..., 0], self.form)
        codes = encode(x + 0.0, self.blocks.replace(dim=-1))
        fields = [(codes.elements[..., i], 1 + self.block.significand) for i in range(self.lanes)]
        fields.append((codes.shared[..., 0], self.block.exponent))
        if codes.outlier is not None and codes.index is not None:
            fields += [(codes.outlier[..., 0], self.block.exponent), (codes.index[..., 0], self.block.index)]
        kind: Any = object if self.block.bits > 64 else np.uint64
        total, at = np.zeros(x.shape[:2], kind), 0
        for values, bits in fields:
            total = total + values.numpy().astype(kind) * (1 << at if kind is object else np.uint64(1 << at))
            at += bits
        return total

    def _unpacked(self, codes: np.ndarray) -> Tensor:
        """Values of the port stored, [steps, runs, G]."""
        if self.block is None or self.blocks is None:
            return ports.values(codes, self.form)[..., None]
        block, at, fields = self.block, 0, []
        widths = [1 + block.significand] * self.lanes + [block.exponent]
        widths += [block.exponent, block.index] if block.outlier else []
        for bits in widths:
            fields.append(torch.from_numpy(_bits(codes, at, bits)))
            at += bits
        elements, rest = torch.stack(fields[: self.lanes], -1), [field[..., None] for field in fields[self.lanes :]]
        return decode(BlockCodes(elements, *rest), self.blocks.replace(dim=-1))

    def _legal(self, patterns: np.ndarray) -> np.ndarray:
        """The block of some values of F for every pattern: neighbours of an exponent, and one of another."""
        assert self.block is not None
        block, F = self.block, FloatFields(self.form)
        at = self.block.elements
        shared, other = _bits(patterns, at, block.exponent), _bits(patterns, at // 2, block.exponent)
        values = []
        for i in range(self.lanes):
            element = _bits(patterns, i * (1 + block.significand), 1 + block.significand)
            field = np.where(
                (other + i) % (2 * self.lanes) == 0, other, shared - (element >> F.fraction & 1) * (other & 3)
            )
            code = (element >> block.significand << F.sign) | (
                np.clip(field, 0, F.top_rank >> F.fraction) << F.fraction
            )
            code |= element & ((1 << F.fraction) - 1)
            values.append(ports.values(ports.legal(code.astype(np.uint64), F), self.form))
        return self._packed(self._blocked(torch.stack(values, -1).reshape(1, -1, self.lanes))).reshape(
            np.shape(patterns)
        )


@dataclass(frozen=True, slots=True)
class Settled:
    """Of every run, the lane that the divider worked for, its sum, n, s in its unit, and mu and r."""

    lane: np.ndarray
    total: np.ndarray
    count: np.ndarray
    scale: np.ndarray
    mean: Tensor
    reciprocal: Tensor


def _top(value: int, width: int) -> int:
    """A value shifted so that its highest bit is the width's; zero stays zero."""
    return value << width - value.bit_length() if value else 0


def _integers(x: Tensor, unit: int) -> np.ndarray:
    """Values in units of 2^unit, of which they are multiples, as Python integers."""
    scaled = np.ldexp(x.numpy(), -unit)
    return np.array([int(v) for v in scaled.reshape(-1)], object).reshape(scaled.shape)


def _integer(patterns: np.ndarray, width: int) -> np.ndarray:
    """Two's complement patterns as Python integers."""
    values = np.array([int(v) for v in patterns], object)
    return np.where(values >> width - 1 & 1 == 1, values - (1 << width), values)


def _patterns(values: object, width: int) -> np.ndarray:
    """Python integers in two's complement."""
    found = np.asarray(values, object) % (1 << width)
    return found if width > 64 else found.astype(np.uint64)


def _bits(patterns: np.ndarray, at: int, width: int) -> np.ndarray:
    """A field of patterns, int64."""
    if patterns.dtype == object:
        return (patterns >> at & ((1 << width) - 1)).astype(np.int64)
    return (patterns >> np.uint64(at) & np.uint64((1 << width) - 1)).astype(np.int64)
