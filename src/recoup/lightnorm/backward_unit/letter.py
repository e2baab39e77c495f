"""What LightNorm's backward unit computes, and the run that shows it: integers and the reference's formulas, not the
gates' steps.

A run for verification begins in the middle of a channel, whose sums are registers' first states, while the lanes hold
sigma and m sigma of another one. It takes some elements more, settles one lane's channel, prepares one kind of
extremum, computes one, and lets the lanes go on with what was settled. Registers are wider than any output shows, so
they are told as well.

Legend: G lanes; T steps; g an element of dy in blocks, m the mean of g, S the sum of g xhat, sigma = gamma r, f = C/K.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from recoup.formats import Float, ports, quantize
from recoup.gates.module import Expected, Inputs, Port
from recoup.lightnorm.backward_unit.gates import Gates
from recoup.lightnorm.backward_unit.lane import Lane
from recoup.lightnorm.backward_unit.operands import Operands, pieces
from recoup.lightnorm.exact import odd
from recoup.lightnorm.rtl_codes import integer, integers, patterns, top

__all__ = ["Letter"]

TAKEN, AFTER = 3, 8
"""Elements of pass 1 in a run, and of pass 2 after all was settled."""


@dataclass(frozen=True)
class Letter(Operands, Gates):
    """What the unit's ports and registers show."""

    @cached_property
    def lane(self) -> Lane:
        """What a lane's dx is."""
        return Lane(self.config, self.elements, self.eps)

    @cached_property
    def schedule(self) -> dict[str, list[int]]:
        """A run: what all have in common."""
        rows = [{"collect": 1} for _ in range(TAKEN)] + [{}]  # the pass is a cycle late
        rows.append({"settle": 1, "apply": 1})
        rows += [{"apply": int(i % 4 != 3)} for i in range(self.cycles_of("settle"))]
        for section in ("prepare", "extremum"):
            rows += [{section: 1}] + [{}] * self.cycles_of(section)
        rows += [{"apply": 1}] * AFTER
        names = ("collect", "settle", "prepare", "extremum", "apply")
        return {name: [row.get(name, 0) for row in rows] for name in names}

    def starts_at(self, section: str) -> int:
        """The step in which a section's port is 1."""
        return self.schedule[section].index(1)

    def phase(self, name: str) -> int:
        """The step in which a phase begins."""
        section = next(section for section, phases in self.sections.items() if name in phases)
        return self.starts_at(section) + 1 + self.phases[name][0] - self.ends[section][0]

    def control(self, steps: int) -> Inputs:
        """Schedules for every lane whose channel may be settled, for both kinds of extremum, of a channel's begin and
        of what comes later."""
        G = self.lanes
        found = {name: np.array((v + [0] * steps)[:steps], np.uint64) for name, v in self.schedule.items()}
        runs = np.arange(4 * G, dtype=np.uint64)
        first = np.zeros((steps, 4 * G), np.uint64)
        first[0] = runs % np.uint64(2 * G) < G
        found["first"] = first
        found["low"] = np.broadcast_to(runs // np.uint64(2 * G), (steps, 4 * G))
        if G > 1:
            found["lane"] = np.broadcast_to(runs % np.uint64(G), (steps, 4 * G))
        return found

    @property
    def registers(self) -> dict[str, tuple[Port, ...]]:
        """By use: those that begin with a state, and those that are told."""
        lanes = range(self.lanes)
        sums = [Port(f"sum_{i}", "out", self.sum_bits, "") for i in lanes]
        sums += [Port(f"cross_{i}", "out", self.cross_bits, "") for i in lanes]
        kept = [Port(f"held_{p.name}_{i}", "out", p.width, "", legal=p.legal) for p in self.held for i in lanes]
        wide = [Port("dividend", "out", self.width + 1, ""), Port("divisor", "out", self.width, "")]
        phase = Port("phase", "out", self.ends["extremum"][1].bit_length(), "")
        return {"presets": (*sums, *kept, phase), "probes": (*sums, *kept, *wide)}

    # What it shows ---------------------------------------------------------------------------------------------------

    def expected(self, inputs: Inputs) -> Mapping[str, Expected]:
        """Pass 1 of exact integers, what is settled of exact quotients and products, pass 2 of `Lane.computed`."""
        T, G = len(inputs["dy"]), self.lanes
        given = self.blocked(self.values(inputs["dy"]))  # [T, runs, G]
        sums, crosses = self._collected(inputs, given)
        settled = self._settled_values(inputs, sums, crosses)
        shown = given.clone()
        apply = np.flatnonzero((self.schedule["apply"] + [0] * T)[:T])
        shown[apply] = self.blocked(self._second(inputs, apply, settled))
        found = {"dx": Expected(range(1, T), self.packed(shown[:-1]))}
        for i in range(G):
            for name, values, bits in (("sum", sums, self.sum_bits), ("cross", crosses, self.cross_bits)):
                found[f"{name}_{i}"] = Expected((self.starts_at("settle"),), patterns(values[None, :, i], bits))
            for name, code in (("slope", settled.slope), ("shift", settled.shift)):
                last = np.where(settled.lane == i, code, inputs[f"held_{name}_{i}"][0])
                found[f"held_{name}_{i}"] = Expected((T - 1,), last[None])
        for name in ("dgamma", "dbeta", "mean"):
            found[name] = Expected((T - 1,), ports.codes(getattr(settled, name), self.wide)[None])
        return found | self._wide(inputs, settled)

    def _collected(self, inputs: Inputs, g: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The sums of g and of g xhat, in units of their smallest steps, object [runs, G]."""
        X = self.activations.form
        xhat = ports.values(inputs["xhat"][1 : TAKEN + 1], X)
        xhat = xhat if self.lanes > 1 else xhat[..., None]
        units = integers(g[:TAKEN], self.unit)
        terms = units, units * integers(xhat, self.activations.unit)
        begin, found = inputs["first"][0].astype(bool), []
        for name, bits, term in zip(("sum", "cross"), (self.sum_bits, self.cross_bits), terms, strict=True):
            before = np.stack([integer(inputs[f"{name}_{i}"][0], bits) for i in range(self.lanes)], -1)
            found.append(np.where(begin[:, None], 0, before) + term.sum(0))
        return found[0], found[1]

    def _settled_values(self, inputs: Inputs, sums: np.ndarray, crosses: np.ndarray) -> "Settled":
        """What is settled of the lane of every run."""
        runs = len(sums)
        lane = inputs["lane"][0].astype(int) if self.lanes > 1 else np.zeros(runs, int)
        total, cross = (v[np.arange(runs), lane] for v in (sums, crosses))
        count = np.array([int(v) for v in inputs["count"][0]], object)
        unit, cross_unit = Fraction(2) ** self.unit, Fraction(2) ** self.cross_unit
        dgamma, dbeta, mean = (
            rounded(values, self.wide)
            for values in (
                [c * cross_unit for c in cross],
                [t * unit for t in total],
                [Fraction(t, n) * unit for t, n in zip(total, count, strict=True)],
            )
        )
        slope = self.sigma(inputs["gamma"][0], inputs["reciprocal"][0])
        shift = self.kept(slope, ports.codes(mean, self.wide))
        return Settled(lane, total, cross, count, dgamma, dbeta, mean, slope, shift)

    def _second(self, inputs: Inputs, steps: np.ndarray, settled: "Settled") -> Tensor:
        """dx before blocks, [steps, runs, G]."""
        new, held = steps[:, None] > self.phase("store"), []
        g = self.unpacked(inputs["stored"][steps])
        for name, code in (("slope", settled.slope), ("shift", settled.shift)):
            lanes = [np.where(new & (settled.lane == i), code, inputs[f"held_{name}_{i}"]) for i in range(self.lanes)]
            held.append(np.stack(lanes, -1).reshape(-1))
        dx = self.lane.computed(g.reshape(-1), held[0], held[1]).reshape(g.shape)
        extreme = torch.from_numpy(inputs["extreme"][steps].astype(bool)).reshape(g.shape)
        return torch.where(extreme, self.values(inputs["kept"][steps]).reshape(g.shape), dx)

    def _wide(self, inputs: Inputs, settled: "Settled") -> dict[str, Expected]:
        """dx at an extremum, and the two wide registers after every phase that matters."""
        W, digits = self.width, self.digits
        sigma, exponent = self.slope_parts(settled.slope)
        size = np.abs(sigma).astype(np.int64).astype(object)
        (shift, place), unit = self.places, self.form.min_exponent - self.wide.mantissa
        m, S = (integers(v, unit) for v in (settled.mean, settled.dgamma))
        constant = np.array([int(v) for v in inputs["constant"][0]], object)
        towards = np.where(inputs["low"][0] > 0, -1, 1)
        t = (m << shift) + towards * constant * S
        at, runs = self.phase("load gradient"), np.arange(len(m))
        g = integers(self.unpacked(inputs["stored"][at : at + 1]), self.unit)[0, runs, settled.lane]
        apart = ((g << place) - t) * size
        scale = exponent + unit + self.constants[0]
        signed = apart * np.sign(sigma).astype(int)
        values = [Fraction(d) * Fraction(2) ** int(e) for d, e in zip(signed.tolist(), scale, strict=True)]
        pairs = zip(np.abs(settled.total).tolist(), settled.count.tolist(), strict=True)
        rest = np.array([2 * ((top(a, W) << digits - 1) % top(b, W)) for a, b in pairs], object)
        cross, total, shown = np.abs(settled.cross), np.abs(settled.total), np.abs(apart)
        dividend = {
            "cross by eight": cross << W - self.cross_bits + 1,
            "keep cross": _tops(cross, W),
            "total by eight": total << W - self.sum_bits + 1,
            "keep total": _tops(total, W),
            "keep mean": rest,
            "compare prepared": (np.abs(m) << shift) * size,
            "compare": (np.abs(g) << place) * size,
            "dx by eight": shown,
            "keep dx": _tops(shown, W),
        }
        significand = pieces(ports.codes(settled.mean, self.wide), self.wide)[0].astype(object)
        divisor = {
            "divide": _tops(settled.count, W),
            "store": significand * size,
            "compare prepared": np.abs(S) * constant * size,
            "load gradient": np.abs(t) * size,
        }
        found = {
            name: Expected(tuple(self.phase(phase) for phase in rows), patterns(np.stack(list(rows.values())), bits))
            for name, rows, bits in (("dividend", dividend, W + 1), ("divisor", divisor, W))
        }
        codes = ports.codes(rounded(values, self.form), self.form)
        return found | {"extremum_dx": Expected((len(inputs["dy"]) - 1,), codes[None])}


@dataclass(frozen=True, slots=True)
class Settled:
    """Of every run, the lane that was settled, its sums and n, what is rounded of them, and codes of sigma and of m
    |sigma|."""

    lane: np.ndarray
    total: np.ndarray
    cross: np.ndarray
    count: np.ndarray
    dgamma: Tensor
    dbeta: Tensor
    mean: Tensor
    slope: np.ndarray
    shift: np.ndarray


def rounded(exact: list[Fraction], form: Float) -> Tensor:
    """Exact numbers in a format."""
    return quantize(torch.tensor([odd(v) for v in exact], dtype=torch.float64), form) + 0.0


def _tops(values: np.ndarray, width: int) -> np.ndarray:
    """`top` of each."""
    return np.array([top(value, width) for value in values.tolist()], object)
