"""Vectors for LightNorm's forward unit: legal states of its registers, and operands that meet.

Structured vectors draw every port by itself. What decides here lies between ports: elements that tie, a mu near the
elements, sums of every size, whose low bits only a small sum shows.

Legend: G lanes; T steps.
"""

from dataclasses import dataclass

import numpy as np

from recoup.formats import FloatFields, ports
from recoup.gates.module import Inputs
from recoup.lightnorm.rtl_codes import patterns
from recoup.lightnorm.rtl_deciding import deciding
from recoup.lightnorm.rtl_letter import Letter
from recoup.lightnorm.rtl_widths import SIGNIFICAND

__all__ = ["Aim", "sized"]


@dataclass(frozen=True)
class Aim(Letter):
    """What a run for verification is given."""

    def aim(self, inputs: dict[str, np.ndarray], generator: np.random.Generator) -> Inputs:
        """Structured vectors made into runs that begin in the middle of a channel."""
        T, runs = inputs["stored"].shape[:2]
        found = dict(inputs)
        found["x"] = self._tied(inputs["x"], generator)
        code = ports.port("x", "in", self.form, "")
        near = code.legal(generator.integers(0, 1 << code.width, (runs, self.channels), dtype=np.uint64))  # type: ignore[misc]
        near, mean, r = self.lane.aimed(near, generator)
        found |= {
            f"{name}_{i}": codes[None, :, i]
            for name, codes in self.lane.kept(mean, r).items()
            for i in range(self.channels)
        }
        beside = self._beside(np.broadcast_to(near, (T, runs, self.lanes)), generator)
        mu, inverse = (self._of_lanes(ports.values(codes, self.wide).numpy()) for codes in (mean, self.signed(r)))
        mu = mu if self.centred else np.zeros_like(mu)
        decide = deciding(self.form, self.config.difference, mu, inverse, T, generator)
        chosen = generator.random((T, runs))
        codes = np.where(chosen[..., None] < 0.6, decide, beside)
        blocks = self.packed(self.blocked(ports.values(codes, self.form)))
        found["stored"] = np.where(chosen < 0.75, blocks, inputs["stored"])
        return found | self._states(found, generator)

    def _of_lanes(self, values: np.ndarray) -> np.ndarray:
        """What lanes have of their channels, [runs, G]; without a mean it is zero."""
        return np.repeat(values, self.lanes // self.channels, -1)

    def _beside(self, codes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Codes of F, most of them unchanged, some a step away or of the other sign."""
        fields, port = FloatFields(self.form), ports.port("x", "in", self.form, "")
        assert port.legal is not None
        moved = codes.astype(np.int64) + generator.choice([0, 0, 0, 1, -1], codes.shape)
        moved ^= generator.choice([0, 0, 0, 1 << fields.sign], codes.shape)
        return port.legal(moved.astype(np.uint64) & np.uint64((1 << port.width) - 1))

    def _tied(self, x: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Elements of pass 1, half of them those before or beside them."""
        found = x.copy()
        for step in range(1, self.starts_at):
            again = generator.random(x.shape[1:]) < 0.5
            found[step] = np.where(again, self._beside(found[step - 1], generator), x[step])
        return found

    def _states(self, inputs: dict[str, np.ndarray], generator: np.random.Generator) -> dict[str, np.ndarray]:
        """Sums and ranges of the elements and chunks before, n, and C(m) / K."""
        T, runs, G = *inputs["stored"].shape[:2], self.channels
        chunks, m = self.chunks
        begins = inputs["first"][0].astype(bool)
        zeros = {f"{name}_{i}": np.zeros((1, runs), np.uint64) for name in self.totals for i in range(G)}
        collect = np.array(self.schedule["collect"] + [0] * T, bool)[:T]
        given = self.blocked(self.values(inputs["x"][collect]))
        own = self._collected({**inputs, **zeros}, given)
        largest = int(self.form.largest_value / 2.0**self.unit)
        taken = chunks * m * (self.lanes // G)
        count = taken + sized(np.full(runs, self.elements - taken, object), generator)
        found, spreads = {}, []
        for i in range(G):
            most = (count - taken) * largest
            total = sized(most, generator) * generator.choice([1, -1], runs)
            if self.centred:
                found[f"sum_{i}"] = patterns(np.clip(total - own["sum"][:, i], -most, most), self.sum_bits)[None]
            most = np.full(runs, self.span * largest * (self.config.chunks - chunks), object)
            spread = np.clip(sized(most, generator) - own["range"][:, i], 0, most)
            found[f"range_{i}"] = patterns(spread, self.range_bits)[None]
            spreads.append(np.where(begins, 0, spread) + own["range"][:, i])
        lane = inputs["lane"][0].astype(int) if G > 1 else np.zeros(runs, int)
        constant = self._constants(np.stack(spreads)[lane, np.arange(runs)], generator)
        found["phase"] = np.full((1, runs), self.phases["store"][1], np.uint64)  # idle: else it might store
        if self.centred:
            found["count"] = np.repeat(patterns(count, self.elements.bit_length())[None], T, 0)
        found["constant"] = np.repeat(patterns(constant, self.constant_bits)[None], T, 0)
        return found

    def _constants(self, spread: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Float64 numbers of C(m)/K's size, most such that R C, or R C + eps, has long runs of ones or zeros."""
        found, bits = [], SIGNIFICAND + 1
        for R in spread.tolist():
            shift = int(generator.integers(0, self.constant_bits - SIGNIFICAND))
            value = int(generator.integers(1 << SIGNIFICAND, 2 << SIGNIFICAND))
            rest = int(generator.integers(0, 1 << shift))  # what float64 has not, the unit takes as well
            # R as far as it is used after some of the multiplier's steps
            part = R >> int(generator.integers(0, R.bit_length() + 1)) * int(generator.integers(0, 2))
            if part and generator.random() < 0.75:
                top = (part << bits - 1 + shift).bit_length() - int(generator.integers(0, 2))
                less = int(generator.integers(0, 2)) * self.eps_units
                aim = ((1 << top + self.pad) - less >> self.pad) + int(generator.integers(-2, 2))
                aimed = aim // part >> shift
                value = aimed if aimed.bit_length() == bits else value
            found.append(value << shift | rest)
        return np.array(found, object)


def sized(most: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Python integers from 0 up to each of ``most``, of any number of bits alike, some with only zeros at the end."""
    found = []
    for limit in most.tolist():
        bits = limit.bit_length() if generator.random() < 0.25 else int(generator.integers(0, limit.bit_length() + 1))
        value = int.from_bytes(generator.bytes(bits // 8 + 1), "little") & ((1 << bits) - 1)
        zeros = int(generator.integers(0, bits + 1)) if generator.random() < 0.5 else 0
        found.append(min(value >> zeros << zeros, limit))
    return np.array(found, object)
