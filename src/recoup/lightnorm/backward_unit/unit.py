"""LightNorm's backward unit: its ports and schedule around the gates, and the vectors that prove it.

One element of every channel of a block a cycle. Pass 1 reads dy, rounds it to blocks (which memory keeps) and takes
the exact sums of g and of g xhat. Then a channel at a time is settled: dgamma = S, dbeta and the mean m are rounded,
sigma = gamma r and m sigma go to its lane; and dx of its extrema is computed, (g - m -+ f S) sigma, f = C(m_k) / K,
exact and rounded once. Pass 2 reads the blocks back and writes dx: of g alone, or at an extremum what memory kept of
it. Nothing is divided but the sum of g by n: gamma / s is gamma r of the forward pass, and the reference's a_k, exact
until dx is rounded, is sigma f S in a register that holds all its bits. Zeros have sign 0; statistics are those of
training (in evaluation dx is g sigma alone: m = S = 0).

Legend: G lanes, the channels of a block; n elements a channel; K chunks; g an element of dy in blocks; S the sum of
g xhat.
"""

from dataclasses import dataclass, replace

import numpy as np

from recoup.errors import RecoupError
from recoup.formats import ports
from recoup.gates.module import Inputs, Module, Port
from recoup.lightnorm.backward_unit.letter import TAKEN, Letter
from recoup.lightnorm.rtl_aim import sized
from recoup.lightnorm.rtl_codes import integers, patterns
from recoup.lightnorm.rtl_conventional import FORMATS, conventional_backward
from recoup.lightnorm.rtl_deciding import deciding
from recoup.lightnorm.rtl_widths import SIGNIFICAND

__all__ = ["Backward"]

MOST, WIDEST = 53, 64
"""Bits of the products that the letter holds in float64, and of a lane's register as uint64."""


@dataclass(frozen=True)
class Backward(Letter):
    """The unit: what it is made of, its ports and schedule, and what it computes."""

    def module(self) -> Module:
        """Ports and schedule around the gates.

        Raises:
            RecoupError: formats so wide that m sigma has more than 53 bits, or its code more than 64; channels of
                fewer elements than a run of the verification takes.
        """
        if self.elements < TAKEN:
            raise RecoupError(f"silicon: elements={self.elements}: the backward unit needs {TAKEN} or more a channel")
        if self.shift_bits > MOST or self.held[1].width > WIDEST:
            raise RecoupError(
                f"silicon: {self.config!r}: m gamma / s has {self.shift_bits} bits, at most {MOST} can be, and "
                f"{self.held[1].width} with its exponent, sign and flags, at most {WIDEST}"
            )
        return Module(
            name="lightnorm_backward",
            title=self.title,
            ports=tuple(self._ports()),
            elaborate=self.elaborate,
            expected=self.expected,
            latency=1,
            steps=len(self.schedule["collect"]) + 1,
            control=self.control,
            presets=self.registers["presets"],
            probes=self.registers["probes"],
            cleared=("collect_late",),
            aim=self.aim,
            units=(self.lane.module(),),
            protocol=self._protocol(),
            work=float(self.lanes),
            baselines=lambda: {
                f"{t}, backward": conventional_backward(f, f"{t}, backward") for t, f in FORMATS.items()
            },
            facts={
                "lanes": self.lanes,
                "bits of the exact sum of dy": self.sum_bits,
                "bits of the exact sum of dy xhat": self.cross_bits,
                "bits of the wide registers": self.width,
                "cycles to settle a channel": self.cycles_of("settle"),
                "cycles to prepare a kind of extremum": self.cycles_of("prepare"),
                "cycles of an extremum": self.cycles_of("extremum"),
                "unit of constant": f"2^{self.constants[0]}",
            },
        )

    @property
    def title(self) -> str:
        """In tables."""
        parts = [f"backward, {ports.told(self.form)}"]
        if self.block is not None:
            parts.append(f"blocks of {self.block.size}, {self.config.shared}")
        return ", ".join(parts)

    def _protocol(self) -> dict[str, str]:
        """The ports' sequence."""
        settle, prepare, extremum = (self.cycles_of(name) for name in self.sections)
        return {
            "pass 1": "an element of every lane a cycle with collect = 1, first = 1 with a channel's first; a cycle "
            "later its xhat at xhat, and dx shows the block that memory keeps; a cycle more and the sums are complete. "
            "Nothing is collected from there till the last lane is settled, nor in a cycle before one whose block at "
            "stored is used; one section runs at a time",
            "settle": f"one cycle with settle = 1, then {settle} cycles, for the lane at lane, with gamma, reciprocal "
            "and count = n held: then dgamma, dbeta and mean show the channel's, and the lane holds what pass 2 needs. "
            "lane, gamma and reciprocal stay, and no other channel is settled, till the last extremum of this one",
            "extrema": "for a kind of extremum and a length of chunk one cycle with prepare = 1, then "
            f"{prepare} cycles; low = 1 for minima and constant = C(m) / K are held till the last of the kind. "
            f"For every extremum one cycle with extremum = 1, then {extremum} cycles, its block held at stored; then "
            "extremum_dx shows its dx, which memory keeps beside its index. Maximum and minimum are the first "
            "of their chunk, as the forward unit tells; a chunk where both are one element has none",
            "pass 2": "apply = 1, a block at stored a cycle; dx a clock edge later. A lane's element that is an "
            "extremum has its bit of extreme set and its dx of memory at kept",
        }

    def _ports(self) -> list[Port]:
        F, G, past = self.form, self.lanes, self.activations
        stored, what = (self.block.bits, "a block") if self.block else (ports.layout(F).bits, "an element")
        one = ports.port("stored", "in", F, f"{what} of memory, for an extremum and in pass 2")

        def lanes(name: str, form: object, meaning: str) -> Port:
            found = ports.port(name, "in", form, meaning)  # type: ignore[arg-type]
            return replace(found, width=found.width * G, parts=G)

        flags = {
            "collect": "an element of pass 1",
            "first": "the channel's first element",
            "settle": "a channel's settling begins",
            "prepare": "what all extrema of a kind share begins",
            "extremum": "dx of an extremum begins",
            "low": "the extrema are minima",
            "apply": "pass 2",
        }
        found = [
            lanes("dy", F, f"gradients rounded to {ports.told(F)}, pass 1"),
            lanes("xhat", past.form, "xhat of the elements a cycle before, pass 1"),
            ports.port("gamma", "in", past.form, "F(gamma) of the channel that is settled"),
            past.reciprocal("reciprocal", "in", "its r = S(1/s), without sign"),
            *(Port(name, "in", 1, meaning) for name, meaning in flags.items()),
        ]
        if G > 1:
            found.append(Port("lane", "in", (G - 1).bit_length(), "the lane of that channel"))
        found += [
            replace(one, width=stored, legal=self.legal_block, complete=False, edges=(), narrow=0)
            if self.block
            else one,
            Port("extreme", "in", G, "the element is an extremum, pass 2", parts=G),
            lanes("kept", F, "dx of those that are, pass 2"),
            Port("count", "in", self.count_bits, "n"),
            Port("constant", "in", self.constant_bits, f"C(m) / K in units of 2^{self.constants[0]}"),
            Port("dx", "out", stored, f"{what}: of dy in pass 1, of dx in pass 2"),
            Port("extremum_dx", "out", ports.layout(F).bits, "dx of the extremum, not yet in blocks"),
        ]
        wide = {"dgamma": "S of the channel that was settled last", "dbeta": "its sum of dy", "mean": "its mean of dy"}
        return found + [ports.port(name, "out", self.wide, meaning) for name, meaning in wide.items()]

    # What a run for verification is given ----------------------------------------------------------------------------

    def aim(self, inputs: dict[str, np.ndarray], generator: np.random.Generator) -> Inputs:
        """Structured vectors made into runs that begin in the middle of a channel."""
        T, runs = inputs["stored"].shape[:2]
        found = dict(inputs)
        code = ports.port("dy", "in", self.form, "")
        near = code.legal(generator.integers(0, 1 << code.width, (runs, self.lanes), dtype=np.uint64))  # type: ignore[misc]
        slope, mean = self.aimed(near, generator)
        for i in range(self.lanes):
            found[f"held_slope_{i}"] = slope[None, :, i]
            found[f"held_shift_{i}"] = self.kept(slope, mean)[None, :, i]
        beside = near.astype(np.int64) + generator.choice([0, 0, 1, -1], (T, *near.shape))
        beside = code.legal(beside.astype(np.uint64) & np.uint64((1 << code.width) - 1))  # type: ignore[misc]
        (sigma, exponent), m = self.slope_parts(slope), ports.values(mean, self.wide).numpy()
        decide = deciding(self.form, None, m, np.ldexp(sigma, exponent), T, generator)
        chosen = generator.random((T, runs))
        codes = np.where(chosen[..., None] < 0.5, decide, beside)
        blocks = self.packed(self.blocked(ports.values(codes, self.form)))
        found["stored"] = np.where(chosen < 0.85, blocks, found["stored"])
        start = self.starts_at("extremum")
        found["stored"][start : start + self.cycles_of("extremum") + 1] = found["stored"][start]
        gamma, r = self.few((1, runs), generator)
        drawn = {"gamma": gamma, "reciprocal": self.activations.unsigned(r)}
        for name, value in drawn.items():  # held
            found[name] = np.repeat(np.where(generator.random(runs) < 0.5, value, found[name][:1]), T, 0)
        return found | self._states(found, generator)

    def _states(self, inputs: dict[str, np.ndarray], generator: np.random.Generator) -> dict[str, np.ndarray]:
        """Sums of the elements before, n, and C(m) / K."""
        T, runs = inputs["stored"].shape[:2]
        count = TAKEN + sized(np.full(runs, self.elements - TAKEN, object), generator)
        zeros = {f"{n}_{i}": np.zeros((1, runs), np.uint64) for n in ("sum", "cross") for i in range(self.lanes)}
        own = self._collected({**inputs, **zeros}, self.blocked(self.values(inputs["dy"])))
        largest = int(self.form.largest_value / 2.0**self.unit)
        other = int(self.activations.form.largest_value / 2.0**self.activations.unit)
        at = self.starts_at("extremum")
        extreme = integers(self.unpacked(inputs["stored"][at : at + 1]), self.unit)[0]  # [runs, G]
        found = {}
        for name, most, bits, taken in (
            ("sum", largest, self.sum_bits, own[0]), ("cross", largest * other, self.cross_bits, own[1]),
        ):  # fmt: skip
            for i in range(self.lanes):
                limit = (count - TAKEN) * most
                total = sized(limit, generator) * generator.choice([1, -1], runs)
                power = np.array([1 << int(k) for k in generator.random(runs) * bits], object)
                total = np.where(generator.random(runs) < 0.2, np.sign(total) * power, total)
                if name == "sum":  # m = g, so that S alone is left
                    total = np.where(generator.random(runs) < 0.3, extreme[:, i] * count, total)
                found[f"{name}_{i}"] = patterns(np.clip(total - taken[:, i], -limit, limit), bits)[None]
        shift = generator.integers(0, self.constant_bits - SIGNIFICAND, runs).astype(object)
        value = generator.integers(1 << SIGNIFICAND, 2 << SIGNIFICAND, runs).astype(object)
        ones = np.array(
            [(2 << SIGNIFICAND) - (1 << int(low)) for low in generator.integers(0, SIGNIFICAND, runs)], object
        )
        value = np.where(generator.random(runs) < 0.4, ones, value) << shift  # ones, which carry far
        value += np.where(generator.random(runs) < 0.5, (1 << shift) - 1, 0)  # what float64 has not, it takes as well
        found["phase"] = np.full((1, runs), self.ends["settle"][1], np.uint64)  # at rest
        found["count"] = np.repeat(patterns(count, self.count_bits)[None], T, 0)
        found["constant"] = np.repeat(patterns(value, self.constant_bits)[None], T, 0)
        return found
