"""How large a layer's sums can become, from its weights and the range of its inputs alone: no data.

Legend: O output channels, K terms of a sum.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.fields import is_number
from recoup.formats import Float, Int
from recoup.lba.config import LBA
from recoup.lba.layers import LBALayer
from recoup.lba.quantizers import quantize_operand

SLACK = 1 + 2.0**-40  # over float64's own rounding, where a bound is multiplied up


@dataclass(frozen=True, slots=True, repr=False)
class Bound:
    """What the sums of a layer can reach; see `bound`.

    Attributes:
        layer: its name.
        sums: per output channel, the largest magnitude of any sum, partial ones too.
        limit: the largest magnitude that the outer sum's format holds, both ends of an `Int` included; infinity: none.
        growth: the factor that rounding may add, which ``sums`` includes: 1 where every rounding is toward zero.
        cannot_saturate: whether no product, no sum of a chunk and no sum of chunks of any channel can leave its format,
            whatever the inputs; of integers that wrap, that none wraps.
        bits: the fewest bits of an `Int` accumulator, of the config's scale, that hold every sum; None for a `Float`.
    """

    layer: str
    sums: tuple[float, ...]
    limit: float
    growth: float
    cannot_saturate: bool
    bits: int | None

    @property
    def largest(self) -> float:
        """Of all channels."""
        return max(self.sums, default=0.0)

    def __repr__(self) -> str:
        """One line."""
        can = "cannot" if self.cannot_saturate else "may"
        needs = "" if self.bits is None else f", cannot overflow {self.bits} bits or more"
        return f"Bound({self.layer}: |sum| <= {self.largest:g} of {self.limit:g}, {can} saturate{needs})"


@dataclass(frozen=True, slots=True)
class _Reach:
    """The least and the largest sum of a channel, exact; and of its chunks."""

    low: float
    high: float
    chunk_low: float
    chunk_high: float


def bound(layer: Any, input_range: tuple[float, float]) -> Bound:
    """The largest sums that a layer's weights can make of inputs within a range, against what its unit holds.

        high_o = sum_k max(0, w_ok low, w_ok high),   low_o = sum_k min(0, w_ok low, w_ok high)

    and |sum| <= max(high_o, -low_o), which inputs at the ends of the range reach exactly where the range holds zero:
    A2Q's l1 bound. Every partial sum is within it, in any order and for any chunk; zeros, of a convolution's padding or
    of what underflows, count as inputs, so a range without zero is taken up to it. Sums are exact (`math.fsum`).

    With every rounding toward zero no step is larger than the exact one, so the bound is the unit's too. To nearest, a
    rounding to M bits adds up to 2^-(M+1) of the number (stochastic: 2^-M), subnormals half a quantum (a whole one):
    each product once, each inner sum once a term of its chunk, each outer sum once a chunk, one on the other. A fixed
    point sum of numbers that are no multiples of its unit adds half a unit a term.

    Args:
        layer: an LBA layer (`recoup.lba.LBALinear`, ``LBAConv1d``, ``LBAConv2d``, transformers' Conv1D) with its
            weights as they are, quantised where the config asks for it, and its shift.
        input_range: (low, high) of what reaches the layer, before any quantiser; two ints say that all inputs are whole
            numbers. Float operands then may round up by half a step; `Int` operands make any scale of it, so that their
            codes lie from -largest (from 0 where low >= 0 or codes have no sign) to largest (to 0 where high <= 0), and
            sums count codes. A calibrated scale says which codes the ends become.

    Returns:
        A `Bound`.

    Raises:
        RecoupError: no LBA layer; NaN or infinite weights; a range that is no pair of numbers with low <= high; one
            below zero for unsigned codes whose scale is each call's own, which refuse it.

    Source: the l1 bound is that of A2Q (Colbert et al., 2023); zeros, chunks and rounding are our addition.

    >>> from recoup.lba import LBALinear
    >>> layer = LBALinear(2, 1, config=LBA.int12(), bias=False)
    >>> layer.weight.data = torch.tensor([[3.0, -7.0]])
    >>> bound(layer, (0, 255))
    Bound(LBALinear: |sum| <= 1785 of 2048, cannot saturate, cannot overflow 12 bits or more)
    """
    if not isinstance(layer, LBALayer):
        raise RecoupError(
            f"lba.bound: layer must be a layer on a narrow accumulator, such as emulate_(model, LBA()) makes; "
            f"got {type(layer).__name__}"
        )
    low, high = _range(input_range)
    weight = layer.matrix.detach()
    if not bool(weight.isfinite().all()):
        count = int((~weight.isfinite()).sum())
        raise RecoupError(f"{layer.title}: lba.bound: the weight holds {count} NaN or infinite values")
    unit, whole = layer.unit, isinstance(low, int) and isinstance(high, int)
    ends = _operand_range(float(low), float(high), layer)
    weight = layer.quantized_weight()[0].detach().cpu().flatten(1)
    whole = (whole or isinstance(unit.pair[0], Int)) and bool((weight == weight.trunc()).all())
    return _against(layer.layer, weight, ends, unit, whole)


def _range(value: Any) -> tuple[float, float]:
    pair = tuple(value) if isinstance(value, Iterable) else ()
    if len(pair) != 2 or not all(is_number(end) and math.isfinite(end) for end in pair) or pair[0] > pair[1]:
        raise RecoupError(f"lba.bound(input_range={value!r}): input_range must be two numbers (low, high), low <= high")
    return pair


def _operand_range(low: float, high: float, layer: LBALayer) -> tuple[float, float]:
    """What the unit multiplies of inputs within a range: float32 numbers, zero included."""
    low, high = -_below(max(-low, 0.0)), _below(max(high, 0.0))
    form, largest = layer.config.pair[0], layer.largest_input()
    if isinstance(form, Int) and largest is not None:  # codes grow with what they are of
        ends, _ = quantize_operand(
            torch.tensor([low, high], dtype=torch.float32), form, largest=largest, layer=layer.title
        )
        return float(ends[0]) + 0.0, float(ends[1])
    if isinstance(form, Int):
        if low < 0 and not form.signed:
            raise RecoupError(
                f"{layer.title}: lba.bound(input_range={(low, high)}): operands {form!r} have no sign, and negative "
                "inputs are refused: the range must begin at 0"
            )
        return -form.largest_value * (low < 0), form.largest_value * (high > 0)
    more = 1 + _relative(form)
    return low * more, high * more


def _below(x: float) -> float:
    """The largest float32 number that is not above x >= 0."""
    near = torch.tensor(min(x, torch.finfo(torch.float32).max), dtype=torch.float64).float()
    return float(near if float(near) <= x else torch.nextafter(near, torch.zeros((), dtype=torch.float32)))


def _relative(format: Float | Int | None) -> float:  # noqa: A002
    """By how much of a number rounding to a format may make it larger."""
    if not isinstance(format, Float) or format.rounding == "zero":
        return 0.0
    return 2.0 ** -(format.mantissa + (1 if format.rounding == "nearest" else 0))


def _absolute(format: Float | Int | None, unit: LBA, whole: bool) -> float:  # noqa: A002
    """And by how much, however small the number is."""
    if isinstance(format, Int):
        return 0.0 if whole and unit.scale <= 1 else unit.scale / 2
    if not isinstance(format, Float) or not format.subnormals or format.rounding == "zero" or not unit.underflow:
        return 0.0
    return 2.0**format.min_exponent * _relative(format)


def _against(name: str, weight_OK: Tensor, ends: tuple[float, float], unit: LBA, whole: bool) -> Bound:
    K = weight_OK.shape[1]
    chunk = max(1, min(unit.chunk or K, K))
    chunks = -(-K // chunk)
    reaches = [_reach(row, ends, chunk) for row in weight_OK.double()]
    # What rounding adds: a factor, of as many roundings as there are one on the other, and a quantum each.
    steps = (unit.product, 1, K), (unit.accumulator, chunk, K), (unit.outer, chunks, chunks)
    growth = math.exp(math.fsum(times * math.log1p(_relative(f)) for f, times, _ in steps))
    added = growth * math.fsum(_absolute(f, unit, whole) * count for f, _, count in steps)
    rounded = growth > 1 or added > 0 or any(_relative(form) > 0 for form in unit.pair)

    def more(x: float) -> float:
        """A magnitude with what rounding adds."""
        return (x * growth + added) * SLACK if rounded else x

    product = float(weight_OK.abs().max()) * max(-ends[0], ends[1]) if weight_OK.numel() else 0.0
    fits = unit.product is None or more(product) <= unit.product.largest_value
    totals = [(-more(-r.low), more(r.high)) for r in reaches]
    inner = totals if unit.promotion is None else [(-more(-r.chunk_low), more(r.chunk_high)) for r in reaches]
    for sums, held in ((inner, unit.accumulator), (totals, unit.outer)):
        low, high = _limits(held, unit)
        fits = fits and all(low <= least and most <= high for least, most in sums)
    bits = None
    if isinstance(unit.accumulator, Int):
        bits = max((_bits(*(end / unit.scale for end in sums)) for sums in inner), default=2)
    limit = max(map(abs, _limits(unit.outer, unit)))
    return Bound(name, tuple(max(-low, high) + 0.0 for low, high in totals), limit, growth, fits, bits)


def _reach(row: Tensor, ends: tuple[float, float], chunk: int) -> _Reach:
    """Of one channel; products of float32 numbers are exact in float64, and `math.fsum` adds them exactly."""
    down, up = row * ends[0], row * ends[1]
    lows, highs = torch.minimum(down, up).tolist(), torch.maximum(down, up).tolist()
    least, most = ([math.fsum(some[i : i + chunk]) for i in range(0, len(some), chunk)] for some in (lows, highs))
    return _Reach(math.fsum(lows), math.fsum(highs), min(least, default=0.0), max(most, default=0.0))


def _limits(format: Float | Int, unit: LBA) -> tuple[float, float]:  # noqa: A002
    """The ends of a format; of integers also where they wrap."""
    if isinstance(format, Int):
        return format.smallest_value * unit.scale, format.largest_value * unit.scale
    return -format.largest_value, format.largest_value


def _bits(low: float, high: float) -> int:
    """Of the narrowest signed integer, of 2 bits at least, that holds both ends in units."""
    least, most = math.floor(low), math.ceil(high)
    return max(2, most.bit_length() + 1, (-least - 1).bit_length() + 1 if least < 0 else 2)
