"""A format as the integers its kernels compare and shift by, shared by CPU and GPU.

The kernels read a float as an integer of the same width: sign, exponent field, fraction. Magnitudes then compare as
integers, and rounding is an addition and a mask, so that x's subnormals count whatever the processor's flush-to-zero
mode.
"""

# ruff: noqa: A002 - format is the word of the contract and of the field

import struct
from functools import lru_cache
from typing import NamedTuple

import torch

from recoup.errors import RecoupError
from recoup.formats.spec import BlockFloat, Float, Int

__all__ = [
    "BlockConstants",
    "FloatConstants",
    "NearestConstants",
    "block_constants",
    "float_constants",
    "kernel_dtype",
    "nearest_constants",
]


class Layout(NamedTuple):
    """An IEEE type: fraction bits, exponent bias, and struct's codes for the float and its integer."""

    fraction: int
    bias: int
    codes: tuple[str, str]

    def bits(self, value: float) -> int:
        """The integer that has the same bits as ``value``, rounded to nearest."""
        return struct.unpack(self.codes[1], struct.pack(self.codes[0], value))[0]


LAYOUTS = {torch.float32: Layout(23, 127, ("<f", "<i")), torch.float64: Layout(52, 1023, ("<d", "<q"))}
FLOAT32_LARGEST = torch.finfo(torch.float32).max


class FloatConstants(NamedTuple):
    """What rounds the magnitude ``u`` of x, as an integer, to a `Float`.

    A magnitude whose exponent field is ``e`` (1 for x's own subnormals) loses ``max(start + 1 - e, shift)`` low bits.
    Then, in this order: below ``zero_below`` it becomes 0; a result above ``largest`` becomes ``beyond``; from
    ``infinite_from`` on ``u`` gives ``top``. ``quantum`` is what a stochastic step up from zero gives. ``nearest`` is a
    mask on the rounding increment.
    """

    fraction: int
    start: int
    shift: int
    zero_below: int
    largest: int
    beyond: int
    infinite_from: int
    top: int
    quantum: int
    nearest: int


class NearestConstants(NamedTuple):
    """What rounds ``u`` to nearest by adding and subtracting a power of two whose ulp is the quantum.

    That power is ``max(2^floor(log2 u), lowest)`` with ``raise_by`` added to its exponent field.
    """

    fraction: int
    lowest: int
    raise_by: int
    zero_below: int
    largest: int
    infinite_from: int
    top: int


class BlockConstants(NamedTuple):
    """What rounds magnitudes to a `BlockFloat`: its shared exponents as exponent fields, and its switches."""

    fraction: int
    lowest: int
    highest: int
    significand: int
    outlier: bool
    nearest: int


@lru_cache(maxsize=1024)
def float_constants(format: Float, dtype: torch.dtype) -> FloatConstants:
    """The constants of ``format`` on ``dtype``, which must hold every one of its values."""
    layout = LAYOUTS[dtype]
    shift = layout.fraction - format.mantissa
    quantum = 2.0 ** (format.min_exponent - format.mantissa)
    largest, infinity = layout.bits(format.largest_value), layout.bits(float("inf"))
    beyond, infinite_from, top = largest, infinity, largest
    if format.overflow == "inf":
        top = infinity
        if format.rounding == "nearest":
            infinite_from = largest + max(1 << shift >> 1, 1)  # half an ulp; where x has none, the next value
        if format.rounding == "stochastic":
            beyond = infinity
    zero_below = 0
    if not format.subnormals:
        zero_below = layout.bits(format.smallest_normal)
    elif format.rounding == "zero":
        zero_below = layout.bits(quantum)
    elif format.rounding == "nearest":
        zero_below = layout.bits(quantum / 2) + 1  # the tie goes to zero, the even one
    return FloatConstants(
        fraction=layout.fraction,
        start=format.min_exponent + layout.bias + shift - 1,
        shift=shift,
        zero_below=zero_below,
        largest=largest,
        beyond=beyond,
        infinite_from=infinite_from,
        top=top,
        quantum=layout.bits(quantum),
        nearest=-(format.rounding == "nearest"),
    )


@lru_cache(maxsize=1024)
def nearest_constants(format: Float, dtype: torch.dtype) -> NearestConstants | None:
    """The constants of the shorter way to round to nearest, or None where it would be wrong.

    It needs the dtype to hold the power of two, and the quantum's half to be a normal number: then flushing x's
    subnormals to zero changes nothing.
    """
    layout = LAYOUTS[dtype]
    shift = layout.fraction - format.mantissa
    holds = shift > 0 and format.max_exponent + shift <= layout.bias
    if format.rounding != "nearest" or not holds or format.min_exponent - format.mantissa <= 1 - layout.bias:
        return None
    c = float_constants(format, dtype)
    return NearestConstants(
        fraction=layout.fraction,
        lowest=layout.bits(format.smallest_normal),
        raise_by=shift << layout.fraction,
        zero_below=0 if format.subnormals else c.zero_below,
        largest=c.largest,
        infinite_from=c.infinite_from,
        top=c.top,
    )


@lru_cache(maxsize=1024)
def block_constants(format: BlockFloat, dtype: torch.dtype) -> BlockConstants:
    """The constants of ``format`` on ``dtype``, which must hold every one of its values."""
    layout = LAYOUTS[dtype]
    return BlockConstants(
        fraction=layout.fraction,
        lowest=format.min_exponent + layout.bias,
        highest=format.max_exponent + layout.bias,
        significand=format.significand,
        outlier=format.shared == "outlier",
        nearest=-(format.rounding == "nearest"),
    )


@lru_cache(maxsize=1024)
def kernel_dtype(format: Float | Int | BlockFloat, dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in so that results are exact: ``dtype``, or float64 for what float32 cannot express.

    Raises:
        RecoupError: a finite float32 could give a value that is no float32.
    """
    if dtype == torch.float64:
        return dtype
    if isinstance(format, Int):
        if format.bits > 24:
            raise RecoupError(f"quantize: {format!r}: float32 holds integers of at most 24 bits; convert x to float64")
        return dtype
    if isinstance(format, BlockFloat):
        if format.significand > 24:
            raise RecoupError(
                f"quantize: {format!r}: float32 holds significands of at most 24 bits; convert x to float64"
            )
        return dtype if format.exponent <= 8 else torch.float64
    largest = format.largest_value
    if largest <= FLOAT32_LARGEST and struct.unpack("<f", struct.pack("<f", largest))[0] != largest:
        raise RecoupError(f"quantize: {format!r}: its largest value {largest!r} is no float32; convert x to float64")
    coarse = max(127, format.min_exponent) - format.mantissa > 127 - 23
    if format.max_exponent > 127 and coarse and format.rounding != "zero":
        raise RecoupError(
            f"quantize: {format!r}: float32's largest values would round up to 2^128, which is no float32; "
            "convert x to float64 or keep max_exponent to at most 127"
        )
    fits = format.mantissa <= 23 and format.min_exponent >= -126 and format.max_exponent <= 127
    return dtype if fits else torch.float64
