"""The definition of every bit, in plain torch and float64: slow, readable, and what the kernels are tested against.

Each step below is exact: scaling by powers of two, splitting off an integer part, comparing. The one exception is
harmless: magnitudes so far below a quantum that scaling them underflows round to zero either way.

Stochastic rounding takes its randomness as an argument of x's shape: int32 below 2^30 for float32 x, int64 below 2^62
for float64 x. The fraction to be rounded is truncated to that many bits. That loses nothing for float32 from
``|x| = quantum/128`` upwards and for float64 from ``quantum/1024`` upwards; below, it moves the mean toward zero by
less than one part in 2^30 of a quantum.
"""

# ruff: noqa: A002 - format is the word of the contract and of the field

import torch
from torch import Tensor

from recoup.formats.spec import BlockFloat, Float, Int, Rounding

__all__ = ["quantize"]

RANDOM_BITS = {torch.int32: 30, torch.int64: 62}
NO_EXPONENT, INFINITE_EXPONENT = -5000, 5000  # of zeros and NaN, of infinities: outside every format


def quantize(x: Tensor, format: Float | Int | BlockFloat, random: Tensor | None = None) -> Tensor:
    """``x`` in ``format``, as `recoup.formats.quantize` defines it.

    Args:
        x: float32 or float64.
        format: the format; it must fit x's dtype.
        random: for stochastic rounding, the random integers described on top of this file.

    >>> quantize(torch.tensor([1.2, 300.0, -1e9]), Float.parse("e4m3fn"))
    tensor([   1.2500,  288.0000, -448.0000])
    """
    if isinstance(format, Float):
        y = _float(x.double(), format, random)
    elif isinstance(format, Int):
        y = _int(x.double(), format)
    else:
        y = _block(x.double(), format, random)
    return torch.where(x.isnan(), x, y.to(x.dtype))


def _float(x: Tensor, format: Float, random: Tensor | None) -> Tensor:
    magnitude = torch.where(x.isfinite(), x.abs(), 0.0)
    quantum = floor_log2(magnitude).clamp(min=format.min_exponent) - format.mantissa
    y = scale(_round(scale(magnitude, -quantum), format.rounding, random), quantum)
    if not format.subnormals:
        y = torch.where(magnitude < format.smallest_normal, 0.0, y)
    top = format.largest_value
    above, infinite = y > top, x.isinf()
    if format.overflow == "inf":
        if format.rounding == "nearest":
            # Not "magnitude >= top + ulp / 2": neither that sum nor half an ulp need be a float64.
            infinite |= 2 * (magnitude - top) >= 2.0 ** (format.max_exponent - format.mantissa)
        if format.rounding == "stochastic":
            infinite |= above
        y = torch.where(above, top, y).masked_fill(infinite, torch.inf)
    else:
        y = torch.where(above | infinite, top, y)
    return y.copysign(x)


def _int(x: Tensor, format: Int) -> Tensor:
    y = x.round()
    if format.overflow == "saturate":
        y = y.clamp(format.smallest_value, format.largest_value)
    else:
        y = torch.remainder(y, 2.0**format.bits)  # NaN for infinities
        y = torch.where(y > format.largest_value, y - 2.0**format.bits, y)
    return y + 0.0  # an integer has no negative zero


def _block(x: Tensor, format: BlockFloat, random: Tensor | None) -> Tensor:
    y = torch.empty_like(x)
    for start in range(0, x.shape[format.dim], format.block):
        length = min(format.block, x.shape[format.dim] - start)
        piece = (format.dim, start, length)
        part = None if random is None else random.narrow(*piece)
        y.narrow(*piece).copy_(_one_block(x.narrow(*piece), format, part))
    return y


def _one_block(x: Tensor, format: BlockFloat, random: Tensor | None) -> Tensor:
    """Every slice of ``x`` along the format's dim is one block."""
    magnitude = torch.where(x.isfinite(), x.abs(), 0.0)
    exponent = torch.where(magnitude > 0, floor_log2(magnitude), NO_EXPONENT).masked_fill(x.isinf(), INFINITE_EXPONENT)
    first = exponent.amax(format.dim, keepdim=True)
    shared, kept = first, torch.zeros_like(x, dtype=torch.bool)
    if format.shared == "outlier":
        at_first = exponent == first
        alone = at_first.sum(format.dim, keepdim=True) == 1
        second = exponent.masked_fill(at_first, NO_EXPONENT).amax(format.dim, keepdim=True)
        shared, kept = torch.where(alone, second, first), at_first & alone
    quantum = shared.clamp(format.min_exponent, format.max_exponent) - format.significand + 1
    units = _round(scale(magnitude, -quantum), format.rounding, random).masked_fill(x.isinf(), torch.inf)
    y = scale(units.clamp(max=2.0**format.significand - 1), quantum).copysign(x)
    return torch.where(kept, x, y)


def _round(units: Tensor, rounding: Rounding, random: Tensor | None) -> Tensor:
    """Non-negative ``units`` to integers."""
    if rounding == "nearest":
        return units.round()
    whole = units.floor()
    if rounding == "zero":
        return whole
    assert random is not None
    bits = RANDOM_BITS[random.dtype]
    fraction = ((units - whole) * 2.0**bits).long()
    return whole + (fraction + random >= 1 << bits)


def floor_log2(magnitude: Tensor) -> Tensor:
    """The exponent of every positive finite element (zero: -1)."""
    return torch.frexp(magnitude).exponent - 1


def scale(x: Tensor, exponent: Tensor) -> Tensor:
    """``x 2^exponent`` in two exact steps, since ``2^exponent`` itself may be outside float64."""
    half = exponent // 2
    return x * _power_of_two(half) * _power_of_two(exponent - half)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent.long() + 1023) << 52).view(torch.float64)
