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

import numpy as np
import torch
from torch import Tensor

from recoup.formats import ports, quantize
from recoup.gates.module import Expected, Inputs, Port
from recoup.lightnorm.exact import odd
from recoup.lightnorm.rtl_codes import Codes, integer, integers, patterns, top
from recoup.lightnorm.rtl_gates import Gates
from recoup.lightnorm.rtl_normalise import Normalise

__all__ = ["Letter"]

AFTER = 8
"""Steps that normalize with what was settled."""


@dataclass(frozen=True)
class Letter(Codes, Gates):
    """What the unit's ports and registers show."""

    @cached_property
    def lane(self) -> Normalise:
        """What a lane's normalization computes."""
        return Normalise(self.config, self.elements, self.eps, self.centred)

    @cached_property
    def chunks(self) -> tuple[int, int]:
        """How many chunks a run takes, and elements of each."""
        count = min(self.config.chunks, 2)
        return count, min(3, self.elements // count)

    @property
    def folds(self) -> list[dict[str, int]]:
        """The cycles after a chunk."""
        return [{"fold": 1}, {"fold": 1, "low": 1}]

    @property
    def extrema(self) -> dict[str, int]:
        """What of a chunk is told: the sign with which it is the largest."""
        return {"largest": 1, "smallest": -1}

    @cached_property
    def schedule(self) -> dict[str, list[int]]:
        """A run: what all have in common."""
        (count, m), rows = self.chunks, []
        for _ in range(count):
            rows += [{"collect": 1, "chunk": int(i == 0)} for i in range(m)] + self.folds
        rows.append({})  # the pass is a cycle late
        rows.append({"settle": 1, "normalise": 1})
        rows += [{"normalise": int(i % 4 != 3)} for i in range(self.settling)] + [{"normalise": 1}] * AFTER
        names = (*(name for name in self.flags if name != "first"), "settle", "normalise")
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
        G = self.channels
        found = {name: np.array((v + [0] * steps)[:steps], np.uint64) for name, v in self.schedule.items()}
        first = np.zeros((steps, 2 * G), np.uint64)
        first[[0, self.chunks[1]], :G] = 1
        found["first"] = first
        if G > 1:
            found["lane"] = np.broadcast_to(np.arange(2 * G, dtype=np.uint64) % G, (steps, 2 * G))
        return found

    @property
    def totals(self) -> dict[str, int]:
        """What is summed up of a channel, and in how many bits."""
        return {"sum": self.sum_bits, "range": self.range_bits}

    @property
    def registers(self) -> dict[str, tuple[Port, ...]]:
        """By use: those that begin with a state, and those that are told."""
        channels = range(self.channels)
        sums = [Port(f"{name}_{i}", "out", bits, "") for name, bits in self.totals.items() for i in channels]
        kept = [
            Port(f"{name}_{i}", "out", port.width, "", legal=port.legal)
            for name, port in zip(("held", "inverse")[-len(self.lane.held) :], self.lane.held, strict=True)
            for i in channels
        ]
        divider = [Port("dividend", "out", self.width + 1, ""), Port("divisor", "out", self.width, "")]
        phase = Port("phase", "out", self.settling.bit_length(), "")
        return {"presets": (*sums, *kept, phase), "probes": (*sums, *kept, *divider)}

    # What it shows ---------------------------------------------------------------------------------------------------

    def expected(self, inputs: Inputs) -> Mapping[str, Expected]:
        """Pass 1 of exact integers, mu and r of exact quotients, pass 2 of `Normalise.computed`, for every run."""
        T, G = len(inputs["x"]), self.lanes
        collect, normalise = (np.array((self.schedule[name] + [0] * T)[:T], bool) for name in ("collect", "normalise"))
        given = self.blocked(self.values(inputs["x"]))  # [T, runs, G]
        sums = self._collected(inputs, given[collect])
        settled = self._settled_values(inputs, sums)
        taken = self.unpacked(inputs["stored"][normalise])
        xhat, y = self._second(inputs, taken, normalise, settled)
        shown = given.clone()
        shown[normalise] = y
        parts = (lambda v: v) if G > 1 else (lambda v: v[..., 0])
        late = range(1, T)
        found = {
            "y": Expected(late, self.packed(shown[:-1])),
            "xhat": Expected(np.flatnonzero(normalise).tolist(), parts(ports.codes(xhat, self.form))),
        }
        for name, sign in self.extrema.items():
            flags = np.zeros((T, *given.shape[1:]), np.uint64)
            flags[collect] = self._new(given[collect], sign).numpy()
            found[f"new_{name}"] = Expected(late, parts(flags[:-1]))
        for i in range(self.channels):
            for name, values in sums.items():
                found[f"{name}_{i}"] = Expected((self.starts_at,), patterns(values[None, :, i], self.totals[name]))
        return found | self._divider(inputs, settled, T)

    def _collected(self, inputs: Inputs, x: Tensor) -> dict[str, np.ndarray]:
        """Sums and summed ranges, in units of F's smallest step, object [runs, channels]."""
        begin, found = inputs["first"][0].astype(bool), {}
        for name, terms in self._terms(integers(x, self.unit)).items():
            bits = self.totals[name] + (name == "range")  # which has no sign
            before = np.stack([integer(inputs[f"{name}_{i}"][0], bits) for i in range(self.channels)], -1)
            found[name] = np.where(begin[:, None], 0, before) + terms
        return found

    def _terms(self, units: np.ndarray) -> dict[str, np.ndarray]:
        """What a run adds to `totals`, of elements [steps, runs, G]."""
        chunks = units.reshape(*self.chunks, *units.shape[1:])
        return {"sum": units.sum(0), "range": (chunks.max(1) - chunks.min(1)).sum(0)}

    def _settled_values(self, inputs: Inputs, sums: dict[str, np.ndarray]) -> "Settled":
        """mu and r of the lane of every run."""
        runs = len(sums["range"])
        lane = inputs["lane"][self.starts_at].astype(int) if self.channels > 1 else np.zeros(runs, int)
        total, spread = (sums[name][np.arange(runs), lane] for name in ("sum", "range"))
        count, constant = (np.array([int(v) for v in inputs[n][self.starts_at]], object) for n in ("count", "constant"))
        scale = spread * constant * (1 << self.pad) + self.eps_units
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
        steps, channels = np.flatnonzero(normalise), range(self.channels)
        new = steps[:, None] > self.phase("store")
        held = []
        mean, r = ports.codes(settled.mean, self.wide), self.unsigned(ports.codes(settled.reciprocal, self.wide))
        for name, code in self.lane.kept(mean, r).items():
            found = [np.where(new & (settled.lane == i), code, inputs[f"{name}_{i}"]) for i in channels]
            held.append(np.stack(found * (self.lanes // self.channels), -1).reshape(-1))
        affine = [self.values(inputs[name][normalise]).reshape(-1) for name in self.parameters]
        xhat, y = self.lane.computed(x.reshape(-1), held, affine)
        return xhat.reshape(x.shape), self.blocked(y.reshape(x.shape))

    def _divider(self, inputs: Inputs, settled: "Settled", steps: int) -> dict[str, Expected]:
        """The ports of mu and r, what is left of both divisions, s, and the product of the significands."""
        W, digits = self.width, self.digits
        rests = []
        for above, below in ((np.abs(settled.total), settled.count), (settled.scale * 0 + 1, settled.scale)):
            pairs = zip(above.tolist(), below.tolist(), strict=True)
            rests.append([2 * ((top(a, W) << digits - 1) % top(b, W)) for a, b in pairs])
        found = {
            "dividend": Expected((self.phase("keep"), self.phase("end")), patterns(rests, W + 1)),
            "divisor": Expected((self.phase("align s"),), patterns([settled.scale], W)),
        }
        mean, r = ports.codes(settled.mean, self.wide), self.unsigned(ports.codes(settled.reciprocal, self.wide))
        last = {"mean": mean, "reciprocal": r}
        for i in range(self.channels):
            for name, code in self.lane.kept(mean, r).items():
                last[f"{name}_{i}"] = np.where(settled.lane == i, code, inputs[f"{name}_{i}"][0])
        return found | {name: Expected((steps - 1,), codes[None]) for name, codes in last.items()}

    def _new(self, x: Tensor, sign: int) -> Tensor:
        """Whether an element is its chunk's largest so far (sign 1) or smallest."""
        count, m = self.chunks
        chunks = (x * sign).reshape(count, m, *x.shape[1:])
        found = torch.ones_like(chunks, dtype=torch.bool)
        found[:, 1:] = chunks[:, 1:] > chunks.cummax(1).values[:, :-1]
        return found.reshape(x.shape)


@dataclass(frozen=True, slots=True)
class Settled:
    """Of every run, the lane that the divider worked for, its sum, n, s in its unit, and mu and r."""

    lane: np.ndarray
    total: np.ndarray
    count: np.ndarray
    scale: np.ndarray
    mean: Tensor
    reciprocal: Tensor
