"""Codes at the ports of LightNorm's units: of lanes, of blocks, and of registers that are wider than 64 bits.

Legend: G lanes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recoup.formats import BlockCodes, FloatFields, decode, encode, ports, quantize
from recoup.lightnorm.rtl_widths import Widths

__all__ = ["Codes", "bits_at", "integer", "integers", "patterns"]


@dataclass(frozen=True)
class Codes(Widths):
    """Values of a unit's format as its ports have them."""

    def values(self, codes: np.ndarray) -> Tensor:
        """Values of ports of lanes, [steps, runs, G]."""
        found = ports.values(codes, self.form)
        return found if self.lanes > 1 else found[..., None]

    def blocked(self, x: Tensor) -> Tensor:
        """B of values, along the lanes."""
        return x if self.blocks is None else quantize(x, self.blocks.replace(dim=-1)) + 0.0

    def packed(self, x: Tensor) -> np.ndarray:
        """Codes of a port of a block, [steps, runs]."""
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

    def unpacked(self, codes: np.ndarray) -> Tensor:
        """Values of the port stored, [steps, runs, G]."""
        if self.block is None or self.blocks is None:
            return ports.values(codes, self.form)[..., None]
        block, at, fields = self.block, 0, []
        widths = [1 + block.significand] * self.lanes + [block.exponent]
        widths += [block.exponent, block.index] if block.outlier else []
        for bits in widths:
            fields.append(torch.from_numpy(bits_at(codes, at, bits)))
            at += bits
        elements, rest = torch.stack(fields[: self.lanes], -1), [field[..., None] for field in fields[self.lanes :]]
        return decode(BlockCodes(elements, *rest), self.blocks.replace(dim=-1))

    def legal_block(self, patterns: np.ndarray) -> np.ndarray:
        """The block of some values of F for every pattern: neighbours of an exponent, and one of another."""
        assert self.block is not None
        block, F = self.block, FloatFields(self.form)
        at = self.block.elements
        shared, other = bits_at(patterns, at, block.exponent), bits_at(patterns, at // 2, block.exponent)
        values = []
        for i in range(self.lanes):
            element = bits_at(patterns, i * (1 + block.significand), 1 + block.significand)
            field = np.where(
                (other + i) % (2 * self.lanes) == 0, other, shared - (element >> F.fraction & 1) * (other & 3)
            )
            code = (element >> block.significand << F.sign) | (
                np.clip(field, 0, F.top_rank >> F.fraction) << F.fraction
            )
            code |= element & ((1 << F.fraction) - 1)
            values.append(ports.values(ports.legal(code.astype(np.uint64), F), self.form))
        return self.packed(self.blocked(torch.stack(values, -1).reshape(1, -1, self.lanes))).reshape(np.shape(patterns))


def integers(x: Tensor, unit: int) -> np.ndarray:
    """Values in units of 2^unit, of which they are multiples, as Python integers."""
    scaled = np.ldexp(x.numpy(), -unit)
    return np.array([int(v) for v in scaled.reshape(-1)], object).reshape(scaled.shape)


def integer(patterns: np.ndarray, width: int) -> np.ndarray:
    """Two's complement patterns as Python integers."""
    values = np.array([int(v) for v in patterns], object)
    return np.where(values >> width - 1 & 1 == 1, values - (1 << width), values)


def patterns(values: object, width: int) -> np.ndarray:
    """Python integers in two's complement."""
    found = np.asarray(values, object) % (1 << width)
    return found if width > 64 else found.astype(np.uint64)


def bits_at(patterns: np.ndarray, at: int, width: int) -> np.ndarray:
    """A field of patterns, int64."""
    if patterns.dtype == object:
        return (patterns >> at & ((1 << width) - 1)).astype(np.int64)
    return (patterns >> np.uint64(at) & np.uint64((1 << width) - 1)).astype(np.int64)


def top(value: int, width: int) -> int:
    """A value shifted so that its highest bit is the width's; zero stays zero."""
    return value << width - value.bit_length() if value else 0
