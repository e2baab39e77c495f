"""A float as integers, and back: what the bit patterns of formats are made of, exact and free of float arithmetic.

Subnormals count whatever the processor's flush-to-zero mode, on every device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Pieces", "in_units", "place", "put_together", "take_apart"]

FRACTION = {torch.float32: 23, torch.float64: 52}
EXPONENT = {torch.float32: 8, torch.float64: 11}
SIGN = -(1 << 63)  # the top bit of an int64
NO_EXPONENT = -5000  # of zeros: below every format
SMALLEST = -1074  # float64's smallest subnormal is 2^SMALLEST
MOST = 63  # the widest shift of an int64; a significand has 53 bits, so none of it is left


class Pieces(NamedTuple):
    """Where finite, ``|x| = significand 2^power`` and ``exponent = floor(log2|x|)``; of zeros, `NO_EXPONENT`."""

    negative: Tensor
    significand: Tensor
    power: Tensor
    exponent: Tensor
    infinite: Tensor
    nan: Tensor


def take_apart(x: Tensor) -> Pieces:
    """The pieces of a float32 or float64 tensor: booleans, and int64 of x's shape."""
    width, ones = FRACTION[x.dtype], (1 << EXPONENT[x.dtype]) - 1
    raw = x.detach().view(torch.int32 if x.dtype == torch.float32 else torch.int64).long()
    field, fraction = (raw >> width) & ones, raw & ((1 << width) - 1)
    significand = torch.where(field > 0, fraction + (1 << width), fraction)
    power = field.clamp(min=1) - (ones >> 1) - width
    exponent = torch.where(significand > 0, _floor_log2(significand) + power, NO_EXPONENT)
    special = field == ones
    return Pieces(raw < 0, significand, power, exponent, special & (fraction == 0), special & (fraction > 0))


def in_units(pieces: Pieces, power: Tensor | int) -> tuple[Tensor, Tensor]:
    """``|x| / 2^power`` as integers, and where that is exact; quotients from 2^63 on are meaningless."""
    shift = pieces.power - power
    up, down = shift.clamp(0, MOST), (-shift).clamp(0, MOST)
    units = pieces.significand << up >> down
    return units, units << down == pieces.significand << up


def put_together(negative: Tensor, units: Tensor, power: Tensor) -> Tensor:
    """The float64 ``+-units 2^power``, which must be one: units from 0 to 2^53 - 1."""
    top = _floor_log2(units)
    exponent = top + power
    normal = ((exponent + 1022) << 52) + (units << (52 - top))  # the hidden bit adds the 1 that is missing from 1023
    subnormal = units << (power - SMALLEST).clamp(0, MOST)
    raw = torch.where(exponent >= -1022, normal, subnormal).masked_fill(units == 0, 0)
    return torch.where(negative, raw | SIGN, raw).view(torch.float64)


def _floor_log2(units: Tensor) -> Tensor:
    """Of integers from 1 to 2^53 - 1, which are normal float64; of 0, 0."""
    return torch.frexp(units.clamp(min=1).double()).exponent.long() - 1


def place(chosen: Tensor) -> tuple[tuple[int, ...], str]:
    """The index of the first True, and how it is written after a tensor's name: ``[0, 3]``, nothing for a scalar."""
    index = tuple(chosen.nonzero()[0].tolist())
    return index, f"[{', '.join(map(str, index))}]" if index else ""
