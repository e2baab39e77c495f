"""LightNorm's forward unit: statistics, a divider, normalization and packers, joined into one.

One element of every channel of a block a cycle. Pass 1 reads x, rounds it to blocks (which memory keeps) and takes the
statistics; then the divider settles mu, r = 1/s and their product, channel by channel; pass 2 reads the blocks back and
writes y. Sums and ranges are integers in units of the format's smallest step, so that they are exact; s = R C(m)/K +
eps is, too, and 1/s and sum / n are cut from exact quotients.

Legend: G lanes, the channels of a block; n elements a channel; K chunks of equal length m; R the sum of the chunks'
ranges.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from recoup.formats import ports, quantize
from recoup.gates.module import Inputs, Module, Port, element_type
from recoup.lightnorm.rtl_aim import Aim
from recoup.lightnorm.rtl_conventional import FORMATS, conventional

__all__ = ["Forward"]


@dataclass(frozen=True)
class Forward(Aim):
    """The unit: what it is made of, its ports and schedule, and what it computes."""

    def module(self) -> Module:
        """Ports and schedule around the gates."""
        G = self.lanes
        return Module(
            name="lightnorm_forward",
            title=self.title,
            ports=tuple(self._ports()),
            elaborate=self.elaborate,
            expected=self.expected,
            latency=1,
            steps=len(self.schedule["collect"]) + 1,
            control=self.control,
            presets=self.registers["presets"],
            probes=self.registers["probes"],
            cleared=("collect_late", "fold_late"),
            aim=self.aim,
            units=(self.lane.module(),),
            protocol={
                "pass 1": "an element of every lane a cycle with collect = 1; y shows the block that memory keeps one "
                "clock edge later; first = 1 with a channel's first element, chunk = 1 with a chunk's; after a chunk's "
                "last element two cycles with fold = 1, the second with low = 1, and first = 1 in the channel's first",
                "extrema": "new_largest and new_smallest tell, a clock edge after an element, that it is the chunk's "
                "largest or smallest so far; the last of a chunk is its first maximum or minimum",
                "divider": f"one cycle with settle = 1, then {self.settling} cycles, for the lane that is held at "
                "lane, with count = n and constant = C(m) / K held too; from then on mean and reciprocal show mu and r",
                "pass 2": "normalise = 1, a block at stored a cycle; xhat in the same cycle, y one clock edge later",
            },
            work=float(G),
            baselines=lambda: {title: conventional(form, title) for title, form in FORMATS.items()},
            facts={
                "lanes": G,
                "bits of the exact sum": self.sum_bits,
                "bits of s": self.width,
                "cycles of the divider a channel": self.settling,
                "unit of constant": f"2^{self.constants[0]}",
                "elements of a verification run": self.chunks[0] * self.chunks[1],
            },
        )

    def ordinary(self, runs: int, steps: int, generator: np.random.Generator) -> Inputs:
        """What `recoup.lightnorm.rtl.typical` says."""
        G, shape = self.lanes, (steps, runs, self.lanes)
        drawn = {"x": generator.normal(0.0, 1.0, shape), "gamma": 1 + generator.normal(0.0, 0.25, (1, *shape[1:]))}
        drawn["beta"] = generator.normal(0.0, 0.5, (1, *shape[1:]))
        drawn = {name: drawn[name] for name in ("x", *self.parameters)}
        values = {n: quantize(torch.from_numpy(np.broadcast_to(v, shape).copy()), self.form) for n, v in drawn.items()}
        found = {name: ports.codes(value if G > 1 else value[..., 0], self.form) for name, value in values.items()}
        found["stored"] = self.packed(self.blocked(values["x"]))
        flags = {p.name: np.zeros((steps, runs), element_type(p)) for p in self._ports() if p.direction == "in"}
        half = steps // 2
        flags["collect"][:half] = flags["normalise"][half:] = flags["first"][0] = flags["chunk"][0] = 1
        mean, r = ports.codes(torch.zeros(runs, dtype=torch.float64), self.wide), torch.ones(runs, dtype=torch.float64)
        inverse = self.unsigned(ports.codes(r, self.wide))
        for i in range(self.channels):
            found |= {f"{name}_{i}": codes[None] for name, codes in self.lane.kept(mean, inverse).items()}
            for name, bits in self.totals.items():
                found[f"{name}_{i}"] = np.zeros((1, runs), np.uint64 if bits <= 64 else object)
        found["phase"] = np.full((1, runs), self.phases["store"][1], np.uint64)
        return flags | found

    @property
    def title(self) -> str:
        """In tables."""
        form, D, K = self.form, self.config.difference, self.config.chunks
        parts = [f"forward, {ports.told(form)}", "x - mu " + ("exact" if D is None else ports.told(D))]
        if self.block is not None:
            parts.append(f"blocks of {self.block.size}, {self.config.shared}")
        return ", ".join([*parts, f"{K} chunk{'s' * (K > 1)}"])

    def _ports(self) -> list[Port]:
        F, G = self.form, self.lanes
        one = ports.port("x", "in", F, f"activations rounded to {ports.told(F)}, pass 1")
        lanes = {"width": one.width * G, "parts": G}
        stored = self.block.bits if self.block else one.width
        what = "a block" if self.block else "an element"
        found = [Port(**{**_fields(one), **lanes})]
        for name in self.parameters:
            found.append(Port(**{**_fields(one), **lanes, "name": name, "meaning": f"F({name}), held in pass 2"}))
        flags = {
            "collect": "an element of pass 1",
            "first": "the channel's first element; in a fold cycle the first chunk's",
            "chunk": "the chunk's first element",
            "fold": "the chunk's largest element is added to R, or its smallest taken off",
            "low": "with fold: the smallest",
            "settle": "the divider begins",
            "normalise": "pass 2",
        }
        found += [Port(name, "in", 1, meaning) for name, meaning in flags.items()]
        if self.channels > 1:
            found.append(Port("lane", "in", (G - 1).bit_length(), "the lane that the divider works for"))
        found += [
            Port(
                "stored", "in", stored, f"{what} of memory, pass 2", legal=self.legal_block if self.block else one.legal
            ),
            Port("count", "in", self.elements.bit_length(), "n"),
            Port("constant", "in", self.constant_bits, f"C(m) / K in units of 2^{self.constants[0]}"),
            Port("y", "out", stored, f"{what}: of x in pass 1, of y in pass 2"),
            Port("xhat", "out", one.width * G, "xhat, pass 2", parts=G),
            Port("mean", "out", ports.port("mean", "out", self.wide, "").width, "mu of the lane that was settled last"),
            self.reciprocal("reciprocal", "out", "its r = S(1/s), without sign"),
            Port("new_largest", "out", G, "this element is the chunk's largest so far", parts=G),
            Port("new_smallest", "out", G, "and its smallest", parts=G),
        ]
        return found


def _fields(port: Port) -> dict[str, Any]:
    """What a port was made of."""
    return {field.name: getattr(port, field.name) for field in fields(port)}
