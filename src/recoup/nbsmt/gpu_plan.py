"""What the CUDA path decides before anything is launched: tables of operands, columns and sizes. Plain Python.

Shape suffixes: those of gpu_operands.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

from recoup.formats import Int
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.groups import Activation, Weight, groups
from recoup.nbsmt.ports import UNSIGNED, activation_port
from recoup.network.convolution import Geometry, Pair

WORKSPACE = 1 << 30
"""Bytes of activation operands at a time; a larger batch goes through in parts."""

ALIGNMENT = 16
"""The columns of a group are a multiple of it, so that every 16-byte load is aligned."""

CASES = 16
"""What an operand depends on besides the code itself: see `tables`."""


@lru_cache
def tables(config: NBSMT) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The activation table and the weight table of every group: 2 bits a case, as signed 32-bit numbers.

    Case 2 * pattern + wide: bit u - 1 of the pattern says that partner t + u is not zero, ``wide`` that the code itself
    does not fit 4 bits. The bits say what the operand is: 0 nothing, 1 the code, 2 the reduced code, 3 the reduced code
    less the code.
    """
    cases = list(product(range(CASES // 2), (False, True)))

    def pack(kinds: list[int]) -> int:
        bits = sum(kind << 2 * case for case, kind in enumerate(kinds))
        return bits - (1 << 32) if bits >> 31 else bits

    found = groups(config)
    return (
        tuple(pack([_activation_kind(g.activation, *case) for case in cases]) for g in found),
        tuple(pack([_weight_kind(g.weights, config.threads, *case) for case in cases]) for g in found),
    )


def _activation_kind(activation: Activation, pattern: int, wide: bool) -> int:
    active = sum(pattern >> (offset - 1) & 1 for offset in activation.partners)
    return {"0": 0, "x": 1, "r": 2, "narrow": int(not wide), "wide": int(wide)}[activation.values[min(active, 2)]]


def _weight_kind(parts: tuple[Weight, ...], threads: int, pattern: int, wide: bool) -> int:
    active = tuple(offset for offset in range(1, threads) if pattern >> (offset - 1) & 1)
    widths = ("any", "wide" if wide else "narrow")
    values = [part.value for part in parts if part.partners in (None, active) and part.width in widths]
    return {"w": 1, "q": 2, "q-w": 3}[values[0]] if values else 0


@dataclass(frozen=True, slots=True)
class Columns:
    """How ``channels`` are dealt to threads: ``slots`` a thread, ``width`` with padding, ``total`` columns in all."""

    config: NBSMT
    channels: int

    @property
    def slots(self) -> int:
        return -(-self.channels // self.config.threads)

    @property
    def width(self) -> int:
        step = ALIGNMENT // self.config.threads
        return -(-self.slots // step) * step

    @property
    def total(self) -> int:
        return len(groups(self.config)) * self.config.threads * self.width

    def constants(self, table: tuple[int, ...], ordered: bool) -> dict[str, Any]:
        """The compile-time arguments of a kernel that writes operands."""
        return {
            "TABLES": table,
            "GROUPS": len(table),
            "THREADS": self.config.threads,
            "ADJACENT": self.config.pairing == "adjacent",
            "ORDERED": ordered,
            "KEEP": self.config.policy != "S",
            "ROUNDING": self.config.rounding,
        }

    def port(self, zero: int) -> dict[str, int]:
        """The compile-time arguments that say what fits the port of activations."""
        port = activation_port(self.config, zero)
        return {"LOW": port.low, "HIGH": port.high, "SHIFT": port.shift, "ZERO": zero}


@dataclass(frozen=True, slots=True)
class Plan:
    """A convolution's configuration and sizes.

    Attributes:
        x: the input's shape [N, C, H, W].
        weight: the weight's shape [O, I, kh, kw].
        padded: height and width of the input with its padding.
        out: height and width of the output.
        zero: of the activation codes: 0 unsigned, stored less 128; 128 signed, stored as they are.
    """

    config: NBSMT
    geometry: Geometry
    x: tuple[int, ...]
    weight: tuple[int, ...]
    padded: Pair
    out: Pair
    zero: int = UNSIGNED

    @classmethod
    def of(
        cls, x: tuple[int, ...], weight: tuple[int, ...], config: NBSMT, geometry: Geometry, zero: int = UNSIGNED
    ) -> "Plan":
        top, left = geometry.padding
        return cls(config, geometry, x, weight, (x[2] + 2 * top, x[3] + 2 * left), geometry.outputs(x[2:]), zero)

    @property
    def taps(self) -> int:
        return self.weight[2] * self.weight[3]

    @property
    def activation_columns(self) -> Columns:
        return Columns(self.config, self.x[1])

    @property
    def weight_columns(self) -> Columns:
        return Columns(self.config, self.weight[1])

    @property
    def most(self) -> int:
        """What no sum can exceed whatever the weights: neither the array's nor the GPU's, whose activations lie in
        -128..127 and which adds every group that a weight is in."""
        weight_tables = tables(self.config)[1]
        shared = max(sum(table >> 2 * case & 3 != 0 for table in weight_tables) for case in range(CASES))
        return 128 * max(255, 128 * shared) * self.weight[1] * self.taps

    @property
    def register(self) -> Int | None:
        """The accumulator, where a sum could leave it."""
        own = self.config.accumulator
        return None if own is None or self.most <= own.largest_value else own

    @property
    def saturates(self) -> bool:
        """Whether registers are followed slot by slot; others hold their sums, cut to their bits where they wrap."""
        return self.register is not None and self.register.overflow == "saturate"

    def parts(self) -> Iterator[slice]:
        """The batch in parts whose operands fit the workspace; at least one image each."""
        each = self.padded[0] * self.padded[1] * self.activation_columns.total
        step = max(1, WORKSPACE // each)
        return (slice(first, first + step) for first in range(0, self.x[0], step))
