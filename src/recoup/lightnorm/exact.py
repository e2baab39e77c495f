"""Exact arithmetic for what is then rounded to a format: results as float64 *rounded to odd*.

A result that float64 does not hold becomes the one of its two neighbours whose last bit is 1. Quantising that to a
format of at most 50 bits gives what quantising the exact value gives; quantising the nearest float64 does not where the
exact value lies within 2^-53 of a step.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from recoup.formats import Float
from recoup.formats import reference as formats
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.scale import factors

__all__ = [
    "exact_product",
    "exact_reciprocal",
    "exact_reciprocals",
    "exact_sum",
    "multiplied_and_added",
    "odd",
    "quotient",
    "scaled_difference",
    "settled",
    "uncertainty",
]

SPLIT = float((1 << 27) + 1)  # cuts a float64 into two halves of 26 bits


def odd(exact: Fraction) -> float:
    """An exact number within float64's range, rounded to odd.

    >>> odd(1 + Fraction(1, 1 << 60)) > 1, odd(Fraction(3, 2))
    (True, 1.5)
    """
    nearest = float(exact)
    if Fraction(nearest) == exact or int(math.ldexp(math.frexp(nearest)[0], 53)) & 1:
        return nearest
    return math.nextafter(nearest, math.inf if exact > Fraction(nearest) else -math.inf)


def settled(value: float, error: float, exact: Callable[[], Fraction], form: Float | None) -> float:
    """An exact number in a format, of which ``value`` is an approximation within that relative error.

    ``exact`` is asked only where the approximation does not decide.
    """
    if form is None:
        return value
    low, high = _rounded([value * (1 - error), value * (1 + error)], form)
    return low if low == high or not math.isfinite(value) else _rounded([odd(exact())], form)[0]


def uncertainty(chunks: int) -> float:
    """By how much 1/s may be off, relatively, when s is added up over K chunks in float64: K + 4 roundings."""
    return (chunks + 4) * 2.0**-52


def exact_reciprocals(
    r: Tensor, doubtful: Tensor, ends: Tensor, elements: int, config: LightNorm, eps: float
) -> Tensor:
    """S(1/s) of the exact s in the channels [C] where float64 leaves it in doubt; there ``ends`` [C, K, 2] are finite.

    s = sum_k C(m_k) / K (max_k - min_k) + eps, of the float64 numbers C(m_k) / K and eps.
    """
    rows = (doubtful & r.isfinite()).nonzero().squeeze(1).tolist()
    if not rows or config.statistics is None:
        return r
    constants = [float(c) for c in factors(elements, config.chunks, config.scale)]
    r = r.clone()
    for c in rows:
        r[c] = exact_reciprocal(ends[c].tolist(), constants, config.statistics, eps)
    return r


def exact_reciprocal(ends: list[list[float]], constants: list[float], form: Float, eps: float) -> float:
    """The same of one channel, or sample, with the constants of its chunks."""
    chunks = zip(constants, ends, strict=True)
    s = Fraction(eps) + sum(
        Fraction(c / len(constants)) * (Fraction(high) - Fraction(low)) for c, (high, low) in chunks
    )
    return _rounded([odd(1 / s)], form)[0]


def _rounded(values: list[float], form: Float) -> list[float]:
    return formats.quantize(torch.tensor(values, dtype=torch.float64), form).tolist()


def scaled_difference(x: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """``(x - mean) factor`` of float64 tensors, rounded to odd."""
    x, mean, factor = torch.broadcast_tensors(x, mean, factor)
    difference, lost = exact_sum(x, -mean)
    result = _to_odd(*exact_product(difference, factor))
    rest = (lost != 0) & result.isfinite()  # what two float64 do not hold either
    if rest.any():
        triples = zip(x[rest].tolist(), mean[rest].tolist(), factor[rest].tolist(), strict=True)
        exact = [odd((Fraction(a) - Fraction(b)) * Fraction(c)) for a, b, c in triples]
        result = result.masked_scatter(rest, torch.tensor(exact, dtype=torch.float64, device=result.device))
    return result


def multiplied_and_added(factor: Tensor, x: Tensor, term: Tensor) -> Tensor:
    """``factor x + term`` rounded to odd; a zero has the sign of float64's.

    Of three numbers the two smaller ones are added to odd first: that keeps which side of a float64 the sum lies on
    (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    product, lost = exact_product(factor, x)
    high, low = exact_sum(lost, term)
    total, rest = exact_sum(product, high)
    result = _to_odd(*exact_sum(total, _to_odd(*exact_sum(rest, low))))
    return torch.where(result == 0, product + term, result)


def over(x: Tensor, divisor: int) -> Tensor:
    """x / divisor, rounded once on every device: by a plain number CUDA would multiply with the reciprocal."""
    return x / x.new_full((), divisor)


def quotient(pairs: Tensor, divisor: int) -> Tensor:
    """The sum of float64 pairs [..., 2] over a divisor, rounded to odd."""
    total = _to_odd(*exact_sum(*pairs.unbind(-1)))
    result = over(total, divisor)
    product, lost = exact_product(result, torch.full_like(result, divisor))
    return _to_odd(result, (total - product) - lost)


def exact_sum(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x + y, and exactly what rounding took from it (Knuth)."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def exact_product(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x y, and exactly what rounding took from it (Dekker)."""
    product = x * y
    high, low = _halves(x)
    high_y, low_y = _halves(y)
    return product, ((high * high_y - product) + high * low_y + low * high_y) + low * low_y


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    large = x * SPLIT
    high = large - (large - x)
    return high, x - high


def _to_odd(value: Tensor, error: Tensor) -> Tensor:
    """The exact ``value + error``, of which value is the nearest float64, rounded to odd."""
    bits = value.view(torch.int64)
    moved = torch.where((error > 0) == (value > 0), bits + 1, bits - 1)
    inexact = (error != 0) & value.isfinite() & (bits & 1 == 0)
    return torch.where(inexact, moved, bits).view(torch.float64)
