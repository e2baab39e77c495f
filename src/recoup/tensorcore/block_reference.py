"""The adder of block-scaled operands in Python integers: what blocks.py must equal, bit for bit."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.tensorcore.config import SCALES, SUMMED, TensorCore
from recoup.tensorcore.reference import ACCUMULATORS, foreign, output, parts, truncated

__all__ = ["dot", "foreign_scale", "matmul", "step"]

Term = tuple[int, int, int]
"""s, f, e: the number s 2^-f 2^e."""


def terms(
    a: Sequence[float], b: Sequence[float], scale_a: Sequence[float], scale_b: Sequence[float], config: TensorCore
) -> list[Term]:
    """What is aligned of some products of consecutive k; every k has its scales. A multiple of 16 k comes before."""
    form = SCALES[config.scale_format or "ue8m0"]
    scales = [[parts(s, form.mantissa, form.min_exponent) for s in pair] for pair in zip(scale_a, scale_b, strict=True)]
    first, second = config.formats
    found = []
    for x, y, ((s, f, e), (t, g, h)) in zip(a, b, scales, strict=True):
        left, right = parts(x, first.mantissa, first.min_exponent), parts(y, second.mantissa, second.min_exponent)
        fraction = left[1] + right[1] + f + g
        found.append((left[0] * right[0] * s * t, fraction, left[2] + right[2] + e + h))
    if not config.sums_sixteen:
        return found
    summed = []
    for k in range(0, len(a), SUMMED):
        (s, f, e), (t, g, h) = scales[k]
        quarters = sum(int(4 * x * y) for x, y in zip(a[k : k + SUMMED], b[k : k + SUMMED], strict=True))
        summed.append((quarters * s * t, 2 + f + g, e + h))
    return summed


def step(
    c: float,
    a: Sequence[float],
    b: Sequence[float],
    scale_a: Sequence[float],
    scale_b: Sequence[float],
    config: TensorCore,
) -> float:
    """One step: c and a group of products, every k with its scales -> the next accumulator.

    A NaN scale gives NaN; other numbers that are not finite go as in `recoup.tensorcore.reference.step`.
    """
    if any(map(math.isnan, (*scale_a, *scale_b))):
        return math.nan
    special = [x * y for x, y in zip(a, b, strict=True) if not (math.isfinite(x) and math.isfinite(y))]
    if special or not math.isfinite(c):
        return sum(special, start=c)
    fraction, smallest, _ = ACCUMULATORS["float32"]
    aligned = [*terms(a, b, scale_a, scale_b, config), parts(c, fraction, smallest)]
    unit = max(e for _, _, e in aligned) - config.fraction
    total = sum(truncated(s, e - f - unit) for s, f, e in aligned)
    return output(total, unit, config.output)


def dot(
    row: Sequence[float],
    column: Sequence[float],
    scale_a: Sequence[float],
    scale_b: Sequence[float],
    config: TensorCore,
) -> float:
    """One output: K products, and a scale for every ``config.block`` of them in either operand."""
    assert config.block is not None
    part = config.promotion or len(row) or 1
    every = [[s[k // config.block] for k in range(len(row))] for s in (scale_a, scale_b)]
    result = torch.zeros((), dtype=torch.float32)
    for begin in range(0, len(row), part):
        c = 0.0
        for k in range(begin, min(begin + part, len(row)), config.group):
            own = slice(k, min(k + config.group, begin + part))
            c = step(c, row[own], column[own], every[0][own], every[1][own], config)
        result = result + torch.tensor(c, dtype=torch.float32)
    return float(result)


def matmul(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, config: TensorCore) -> Tensor:
    """a [M, K] b [K, N], scale_a [M, S], scale_b [S, N], S = ceil(K / block) -> float32 [M, N]. It is slow."""
    for x, form, name in zip((a, b), config.formats, "ab", strict=True):
        if (value := foreign(x, form)) is not None:
            raise RecoupError(f"tensorcore.matmul: {name} holds {value!r}, which {form!r} does not have")
    rows = zip(a.double().tolist(), scale_a.double().tolist(), strict=True)
    columns = list(zip(b.double().mT.tolist(), scale_b.double().mT.tolist(), strict=True))
    sums = [dot(row, column, s, t, config) for row, s in rows for column, t in columns]
    return torch.tensor(sums, dtype=torch.float32).view(a.shape[0], b.shape[1])


def foreign_scale(scale: Tensor, name: str) -> float | None:
    """An element that is neither NaN nor a value of a scale format, if there is one: infinities are none, zero is no
    power of two."""
    given = scale.detach()[~scale.isnan()]
    low, high = (0.0, SCALES[name].largest_value) if name == "ue4m3" else (2.0**-127, 2.0**127)
    inside = (given >= low) & (given <= high)
    if name == "ue8m0":
        bits = given.view(torch.int32)  # a power of two, or half the smallest normal one
        wrong = ~inside | (((bits & 0x7FFFFF) != 0) & (bits != 1 << 22))
    else:
        inside_only = torch.where(inside, given, 0.0)
        found = foreign(inside_only, SCALES[name])
        if found is not None:
            return found
        wrong = ~inside
    return given[wrong][0].item() if bool(wrong.any()) else None
