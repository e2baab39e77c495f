"""A backward unit's netlist led through whole channels by its protocol: what a memory and a sequencer around it do."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from recoup.formats import ports, quantize
from recoup.lightnorm import reference
from recoup.lightnorm.backward_unit.unit import Backward
from recoup.lightnorm.scale import factors, sizes
from recoup.silicon import Measured

Row = dict[str, Any]


@dataclass
class Drive:
    """Channels [C, n] of a network's gradient, C a multiple of the unit's lanes, each group of lanes a run."""

    unit: Backward
    module: Measured
    grad: Tensor
    saved: reference.Saved
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        G, past = self.unit.lanes, self.unit.activations
        stats = self.saved.statistics
        self.n = self.grad.shape[0] * self.grad.shape[2]
        self.dy = self.by_run(ports.codes(quantize(self.grad.double(), self.unit.form), self.unit.form))
        self.xhat = self.by_run(ports.codes(self.saved.normalized, past.form))
        self.stored = self.unit.packed(self.unit.blocked(self.unit.values(self.dy)))  # [n, runs]
        self.gamma = ports.codes(self.saved.gamma, past.form).reshape(-1, G)
        self.reciprocal = past.unsigned(ports.codes(stats.reciprocal, past.wide)).reshape(-1, G)
        self.ends = [v.numpy().reshape(-1, G, v.shape[1]) for v in (stats.largest, stats.smallest)]
        self.runs = len(self.gamma)

    def by_run(self, codes: np.ndarray) -> np.ndarray:
        """[N, C, P] as [n, runs] or [n, runs, G]."""
        found = codes.transpose(0, 2, 1).reshape(self.n, -1, self.unit.lanes)
        return found if self.unit.lanes > 1 else found[..., 0]

    def through(self) -> dict[str, np.ndarray]:
        """dx codes [n, runs], dgamma, dbeta [runs, G], and whether pass 1 wrote what was read back."""
        G, K = self.unit.lanes, self.unit.config.chunks
        for t in range(self.n + 1):
            late = {"xhat": self.xhat[t - 1]} if t else {}
            now = {"collect": 1, "first": int(t == 0), "dy": self.dy[t]} if t < self.n else {}
            self.rows.append(now | late)
        settled, extrema = {}, {}
        length, constant = sizes(self.n, K), factors(self.n, K, self.unit.config.scale)
        for i in range(G):
            held = {"lane": i, "gamma": self.gamma[:, i], "reciprocal": self.reciprocal[:, i], "count": self.n}
            settled[i] = self.section("settle", held)
            for low in (0, 1):
                for m in sorted(set(length)):
                    value = float(constant[length.index(m)]) / K
                    kind = held | {"low": low, "constant": int(np.ldexp(value, -self.unit.constants[0]))}
                    self.section("prepare", kind)
                    for k in (k for k in range(K) if length[k] == m):
                        block = self.stored[self.ends[low][:, i, k], np.arange(self.runs)]
                        extrema[low, i, k] = self.section("extremum", kind | {"stored": block})
        begin = len(self.rows)
        shown = self.simulated(self.rows)
        extreme, kept = (np.zeros((self.n, self.runs, G), np.uint64) for _ in range(2))
        for (low, i, k), at in extrema.items():
            own, other = (self.ends[end][:, i, k] for end in (low, 1 - low))
            rows = np.flatnonzero(own != other)
            extreme[own[rows], rows, i] = 1
            kept[own[rows], rows, i] = shown["extremum_dx"][at, rows]
        parts = (lambda v: v) if G > 1 else (lambda v: v[..., 0])
        second = [
            {"apply": 1, "stored": s, "extreme": e, "kept": v}
            for s, e, v in zip(self.stored, parts(extreme), parts(kept), strict=True)
        ]
        last = self.simulated([*self.rows, *second, {}])
        found = {name: np.stack([shown[name][settled[i]] for i in range(G)], -1) for name in ("dgamma", "dbeta")}
        return found | {"dx": last["dx"][begin + 1 :], "memory": shown["dx"][1 : self.n + 1]}

    def section(self, name: str, held: Row) -> int:
        """The rows of a section; the one that shows its result."""
        self.rows += [held | {name: 1}] + [held] * self.unit.cycles_of(name)
        return len(self.rows) - 1

    def simulated(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """Outputs of the netlist."""
        inputs = {}
        for port in self.module.inputs:
            kind = np.uint64 if port.element <= 64 else object
            shape = (self.runs,) if port.parts == 1 else (self.runs, port.parts)
            inputs[port.name] = np.stack([np.broadcast_to(row.get(port.name, 0), shape) for row in rows]).astype(kind)
        return self.module.simulate(inputs)

    def codes(self, dx: Tensor) -> np.ndarray:
        """dx [N, C, P] as the port shows it."""
        return self.unit.packed(self.unit.values(self.by_run(ports.codes(dx.double(), self.unit.form))))
