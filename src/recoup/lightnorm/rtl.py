"""LightNorm's forward unit in gates: statistics, a divider, normalization, packing and unpacking, joined into one.

One element of every channel of a block a cycle. Pass 1 reads x, rounds it to blocks (which memory keeps) and takes the
statistics; then the divider settles mean and reciprocal, channel by channel; pass 2 reads the blocks back and writes
y. Sums and ranges are integers in units of the format's smallest step, so that they are exact; s = R C(m)/K + eps is,
too, and 1/s and sum / n are cut from exact quotients.

Legend: G lanes, the channels of a block; n elements a channel; K chunks of equal length m; R the sum of the chunks'
ranges.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recoup.formats import BlockCodes, FloatFields, decode, encode, ports, quantize
from recoup.gates.module import Expected, Inputs, Module, Port
from recoup.lightnorm import reference
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.rtl_gates import Gates
from recoup.lightnorm.scale import constant

__all__ = ["build"]


def build(config: LightNorm, *, elements: int = 1 << 17, eps: float = 1e-5) -> Module:
    """The forward unit of a config, bit-identical to `recoup.lightnorm.reference` in training.

    Args:
        config: formats, blocks along channels, K.
        elements: the most elements of a channel; a run has any multiple of K from 2 K up to it.
        eps: what is added to s.

    Raises:
        RecoupError: a config that has no such unit: ``forward``, ``backward`` or ``statistics`` None, blocks along
            places; an eps that is not positive; too few elements.
    """
    return Forward.of(config, elements, eps).module()


@dataclass(frozen=True)
class Forward(Gates):
    """The unit: what it is made of, its ports and schedule, and what it computes."""

    def module(self) -> Module:
        """Ports and schedule around the gates."""
        G, n = self.lanes, 2 * self.config.chunks
        return Module(
            name="lightnorm_forward",
            title=self.title,
            ports=tuple(self._ports()),
            elaborate=self.elaborate,
            expected=self.expected,
            latency=1,
            steps=len(self.schedule["collect"]) + 1,
            control=self.control,
            protocol={
                "pass 1": "an element of every lane a cycle with collect = 1; y shows the block that memory keeps one "
                "clock edge later; first = 1 with a channel's first element, chunk = 1 with a chunk's; after a chunk's "
                "last element two cycles with fold = 1, the second with low = 1, and first = 1 in the channel's first",
                "extrema": "new_largest and new_smallest tell, a clock edge after an element, that it is the chunk's "
                "largest or smallest so far; the last of a chunk is its first maximum or minimum",
                "divider": f"one cycle with settle = 1, then {self.settling} cycles, for the lane that is held at "
                "lane, with count = n and constant = C(m) / K held too",
                "pass 2": "normalise = 1, a block at stored a cycle; xhat in the same cycle, y one clock edge later",
            },
            work=float(G),
            facts={
                "lanes": G,
                "bits of the exact sum": self.sum_bits,
                "bits of s": self.width,
                "cycles of the divider a channel": self.settling,
                "unit of constant": f"2^{self.constants[0]}",
                "elements of a verification run": n,
            },
        )

    @property
    def title(self) -> str:
        """In tables."""
        form, D = self.form, self.config.difference
        parts = [f"forward, {ports.told(form)}", "x - mu " + ("exact" if D is None else ports.told(D))]
        if self.block is not None:
            parts.append(f"blocks of {self.block.size}, {self.config.shared}")
        return ", ".join(parts)

    def _ports(self) -> list[Port]:
        F, G = self.form, self.lanes
        one = ports.port("x", "in", F, f"activations rounded to {ports.told(F)}, pass 1")
        lanes = {"width": one.width * G, "parts": G}
        stored = self.block.bits if self.block else one.width
        what = "a block" if self.block else "an element"
        found = [Port(**{**_fields(one), **lanes})]
        for name, meaning in (("gamma", "F(gamma), held in pass 2"), ("beta", "F(beta), held in pass 2")):
            found.append(Port(**{**_fields(one), **lanes, "name": name, "meaning": meaning}))
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
        if G > 1:
            found.append(Port("lane", "in", (G - 1).bit_length(), "the lane that the divider works for"))
        found += [
            Port("stored", "in", stored, f"{what} of memory, pass 2", legal=self._legal if self.block else one.legal),
            Port("count", "in", self.elements.bit_length(), "n"),
            Port("constant", "in", self.constant_bits, f"C(m) / K in units of 2^{self.constants[0]}"),
            Port("y", "out", stored, f"{what}: of x in pass 1, of y in pass 2"),
            Port("xhat", "out", one.width * G, "xhat, pass 2", parts=G),
            Port("new_largest", "out", G, "this element is the chunk's largest so far", parts=G),
            Port("new_smallest", "out", G, "and its smallest", parts=G),
        ]
        return found

    # What it computes ------------------------------------------------------------------------------------------------

    @cached_property
    def schedule(self) -> dict[str, list[int]]:
        """A run for verification: 2 K elements, in chunks of two."""
        K, rows = self.config.chunks, []
        for k in range(K):
            for i in range(2):
                rows.append({"collect": 1, "first": int(k == i == 0), "chunk": int(i == 0)})
            rows += [{"fold": 1, "first": int(k == 0)}, {"fold": 1, "low": 1}]
        rows.append({})  # the pass is a cycle late
        for lane in range(self.lanes):
            rows += [{"settle": 1, "lane": lane}] + [{"lane": lane}] * self.settling
        rows += [{"normalise": 1}] * (2 * K)
        names = ("collect", "first", "chunk", "fold", "low", "settle", "normalise", "lane")
        return {name: [row.get(name, 0) for row in rows] for name in names if name != "lane" or self.lanes > 1}

    def expected(self, inputs: Inputs) -> Mapping[str, Expected]:
        """`reference.statistics` of pass 1, `reference.normalize` and `reference.affine` of pass 2, for every run."""
        config, G = self.config, self.lanes
        first = [step for step, on in enumerate(self.schedule["collect"]) if on]
        second = [step for step, on in enumerate(self.schedule["normalise"]) if on]
        x = self._values(inputs["x"][first])  # [n, runs, G]
        n, runs = x.shape[:2]
        x_q = self._blocked(x)
        x_NCP = x_q.reshape(n, runs * G).t()[None]
        stats = reference.statistics(x_NCP, config, self.eps)
        new = [self._new(x_q, sign) for sign in (1, -1)]
        taken = self._unpacked(inputs["stored"][second])
        mean, r = (v.reshape(runs, G).expand(len(second), runs, G) for v in (stats.mean, stats.reciprocal))
        flat = taken.reshape(1, -1, 1)
        xhat = reference.normalize(flat, mean.reshape(-1), r.reshape(-1), config, torch.float64)
        gamma, beta = (self._values(inputs[name][second]).reshape(-1) for name in ("gamma", "beta"))
        y = reference.affine(xhat, gamma, beta, config, torch.float64).reshape(taken.shape)
        shown = [step + 1 for step in first]
        parts = (lambda v: v) if G > 1 else (lambda v: v[..., 0])
        found = {
            "y": Expected([*shown, *(step + 1 for step in second)], self._packed(torch.cat([x_q, y]))),
            "xhat": Expected(second, parts(ports.codes(xhat.reshape(taken.shape), self.form))),
        }
        for name, flags in zip(("new_largest", "new_smallest"), new, strict=True):
            found[name] = Expected(shown, parts(flags.numpy().astype(np.uint64)))
        return found

    def _values(self, codes: np.ndarray) -> Tensor:
        """Values of ports of lanes, [steps, runs, G]."""
        found = ports.values(codes, self.form)
        return found if self.lanes > 1 else found[..., None]

    def _blocked(self, x: Tensor) -> Tensor:
        """B of values, along the lanes."""
        return x if self.blocks is None else quantize(x, self.blocks.replace(dim=-1)) + 0.0

    @staticmethod
    def _new(x: Tensor, sign: int) -> Tensor:
        """Whether an element is its chunk's largest so far (sign 1) or smallest, for chunks of two."""
        found = torch.ones_like(x, dtype=torch.bool)
        found[1::2] = x[1::2] * sign > x[::2] * sign
        return found

    def _packed(self, x: Tensor) -> np.ndarray:
        """Codes of the port y, [steps, runs]."""
        if self.block is None or self.blocks is None:
            return ports.codes(x[..., 0], self.form)
        codes = encode(x + 0.0, self.blocks.replace(dim=-1))
        fields = [(codes.elements[..., i], 1 + self.block.significand) for i in range(self.lanes)]
        fields.append((codes.shared[..., 0], self.block.exponent))
        if codes.outlier is not None and codes.index is not None:
            fields += [(codes.outlier[..., 0], self.block.exponent), (codes.index[..., 0], self.block.index)]
        total, at = np.zeros(x.shape[:2], object), 0
        for values, bits in fields:
            total = total + (values.numpy().astype(object) << at)
            at += bits
        return total if self.block.bits > 64 else total.astype(np.uint64)

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

    def control(self, steps: int) -> Inputs:
        """The schedule, and what is held."""
        held = {"count": 2 * self.config.chunks, "constant": self._constant(2)}
        found = {name: (values + [0] * steps)[:steps] for name, values in self.schedule.items()}
        found |= {name: [value] * steps for name, value in held.items()}
        wide = {"constant": object if self.constant_bits > 64 else np.uint64}
        return {name: np.array(values, wide.get(name, np.uint64)) for name, values in found.items()}

    def _constant(self, m: int) -> int:
        value = Fraction(constant(m, self.config.scale) / self.config.chunks) / Fraction(2) ** self.constants[0]
        return int(value)


def _bits(patterns: np.ndarray, at: int, width: int) -> np.ndarray:
    """A field of patterns, int64."""
    if patterns.dtype == object:
        return (patterns >> at & ((1 << width) - 1)).astype(np.int64)
    return (patterns >> np.uint64(at) & np.uint64((1 << width) - 1)).astype(np.int64)


def _fields(port: Port) -> dict[str, Any]:
    """What a port was made of."""
    return {field.name: getattr(port, field.name) for field in fields(port)}
