"""Block floating point in gates: neighbours that share an exponent, packed and unpacked a whole block a cycle."""

from dataclasses import dataclass
from typing import Any

from recoup.gates.arithmetic import Bits, Layout, Number, any_of, named, normalised, shifted_right, width_of
from recoup.gates.module import amaranth

__all__ = ["Block", "pack_block", "rebased", "unpack_block"]

hdl = amaranth("hdl")


@dataclass(frozen=True, slots=True)
class Block:
    """A block's code: from bit 0 its elements, then the shared exponent, and with outliers theirs and the index.

    Attributes:
        size: elements.
        significand: bits of an element's magnitude; a sign stands above.
        exponent: bits of an exponent.
        low: the exponent that code 1 means.
        outlier: whether a lone largest element keeps its own exponent.
    """

    size: int
    significand: int
    exponent: int
    low: int
    outlier: bool

    @property
    def index(self) -> int:
        """Bits of the outlier's place."""
        return (self.size - 1).bit_length()

    @property
    def elements(self) -> int:
        """Bits of all elements."""
        return self.size * (1 + self.significand)

    @property
    def bits(self) -> int:
        """Bits of the code."""
        return self.elements + self.exponent + (self.exponent + self.index) * self.outlier


def rebased(m: Any, n: Number, layout: Layout, name: str) -> Number:
    """A value of a format, with its leading bit on top, as a number whose exponents count from the smallest binade.

    One below that binade, a subnormal with its leading bit on top, gets that binade's exponent and its leading zeros.
    """
    significand = hdl.Cat(hdl.Const(0, max(layout.fraction + 1 - n.width, 0)), n.significand)
    below = layout.low - n.base
    if layout.subnormals and below > 0:
        missing = hdl.Mux(n.exponent < below, below - n.exponent, 0)[: width_of(below)]
        significand, _ = shifted_right(
            m, significand, named(m, f"{name}_below", missing), f"{name}_gradual", keep=False
        )
    field = (n.exponent + (n.base - layout.low)) if below else n.exponent
    E = width_of(layout.high - layout.low)
    field = hdl.Cat(field, hdl.Const(0, E))[:E] & significand[-1].replicate(E)
    field = named(m, f"{name}_field", field)
    return Number(n.sign, field, significand, layout.low - layout.fraction, layout.high - layout.low, clear=True)


def pack_block(m: Any, numbers: list[Number], layout: Layout, block: Block, name: str) -> Bits:
    """The code of a block of quantised values of a format that has the block's significand."""
    keys = []
    for i, n in enumerate(numbers):
        # The binade, counted from 1; 0 for zero and subnormals, whose quantum is the smallest binade's.
        key = n.exponent + (n.base - layout.low + 1)
        width = width_of(layout.high - layout.low + 1)
        keys.append(named(m, f"{name}_key_{i}", key[:width] & n.significand[-1].replicate(width)))
    first = _largest(m, keys, f"{name}_first")
    shared, kept = first, [hdl.Const(0, 1)] * len(keys)
    if block.outlier:
        at = [named(m, f"{name}_at_{i}", key == first) for i, key in enumerate(keys)]
        twice = hdl.Const(0, 1)
        seen = hdl.Const(0, 1)
        for one in at:
            twice, seen = twice | (seen & one), seen | one
        alone = named(m, f"{name}_alone", ~twice)
        rest = [key & ~one.replicate(len(key)) for key, one in zip(keys, at, strict=True)]
        second = _largest(m, rest, f"{name}_second")
        shared = named(m, f"{name}_shared", hdl.Mux(alone, second, first))
        kept = [named(m, f"{name}_kept_{i}", alone & one) for i, one in enumerate(at)]
    shared, own = (
        named(m, f"{name}_{what}", key | ~any_of(key)) for what, key in (("shared_code", shared), ("own_code", first))
    )
    elements = []
    for i, (n, key) in enumerate(zip(numbers, keys, strict=True)):
        exponent = hdl.Mux(kept[i], own, shared)
        distance = named(m, f"{name}_distance_{i}", (exponent - (key | ~any_of(key)))[: len(key)])
        cut = max(n.width - block.significand, 0)
        units, _ = shifted_right(m, n.significand[cut:], distance, f"{name}_units_{i}", keep=False)
        units = named(m, f"{name}_element_{i}", units)
        elements += [units, hdl.Const(0, block.significand - len(units)), n.sign & any_of(units)]
    offset = layout.low - block.low
    codes = [(key + offset)[: block.exponent] if offset else key for key in (shared, own)]
    codes = [hdl.Cat(code, hdl.Const(0, block.exponent))[: block.exponent] for code in codes]
    if not block.outlier:
        return hdl.Cat(*elements, codes[0])
    found = named(m, f"{name}_outlier", any_of(hdl.Cat(*kept)) & (own != shared))
    index = [
        any_of(hdl.Cat(*(kept[i] for i in range(block.size) if i >> bit & 1))) & found for bit in range(block.index)
    ]
    return hdl.Cat(*elements, codes[0], hdl.Mux(found, codes[1], codes[0]), *index)


def unpack_block(m: Any, code: Bits, block: Block, name: str) -> list[Number]:
    """The values of a block, each with its leading bit on top."""
    shared = code[block.elements : block.elements + block.exponent]
    rest = code[block.elements + block.exponent :]
    outlier, index = rest[: block.exponent], rest[block.exponent :]
    numbers = []
    for i in range(block.size):
        at = i * (1 + block.significand)
        exponent: Bits = shared
        if block.outlier:
            exponent = hdl.Mux(index == i, outlier, shared) if block.index else outlier
        number = Number(
            sign=code[at + block.significand],
            exponent=exponent,
            significand=code[at : at + block.significand],
            low=block.low - block.significand,
            most=(1 << block.exponent) - 2,
            leading=block.significand - 1,
        )
        numbers.append(normalised(m, number, f"{name}_{i}"))
    return numbers


def _largest(m: Any, values: list[Bits], name: str) -> Bits:
    """The largest of unsigned values."""
    level = 0
    while len(values) > 1:
        pairs = [(values[i], values[i + 1]) for i in range(0, len(values) - 1, 2)]
        found = [
            named(m, f"{name}_{level}_{i}", hdl.Mux(one < other, other, one)) for i, (one, other) in enumerate(pairs)
        ]
        values, level = found + values[2 * len(pairs) :], level + 1
    return values[0]
