"""Every bit of range batch normalization in low precision, readable: one line an arrow of the paper's figure.

What a format rounds is exact before: float64 where that holds the value, else rounded to odd (`exact`). Without a
format an operation is float64 rounded to nearest.

Legend: N samples, C channels, P places of a sample; the n = N P elements of a channel count in the order (sample,
place); K chunks.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from recoup.formats import BlockFloat, Float
from recoup.formats import reference as formats
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.exact import exact_reciprocals, multiplied_and_added, odd, scaled_difference, settled, uncertainty
from recoup.lightnorm.scale import factors, sizes

__all__ = ["Saved", "Statistics", "backward", "forward", "infer", "statistics"]


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a channel is normalized with; float64 [C], indices int64 [C, K].

    Attributes:
        mean: mu, rounded.
        deviation: s, eps included, not rounded.
        reciprocal: 1 / s, rounded.
        largest, smallest: index among a channel's elements of the first maximum and minimum of every chunk.
    """

    mean: Tensor
    deviation: Tensor
    reciprocal: Tensor
    largest: Tensor
    smallest: Tensor


@dataclass(frozen=True, slots=True)
class Saved:
    """What the backward pass reads: xhat [N, C, P], the statistics, and gamma as it was used, float64 [C]."""

    normalized: Tensor
    statistics: Statistics
    gamma: Tensor


def rounded(x: Tensor, format: Float | None, dtype: torch.dtype) -> Tensor:  # noqa: A002
    """An arrow: x in a format; in ``dtype`` where there is none."""
    return x.to(dtype).double() if format is None else formats.quantize(x.double(), format)


def blocked(x: Tensor, blocks: BlockFloat | None) -> Tensor:
    """x [N, C, P] in blocks of channels, or of a sample's places."""
    return x if blocks is None else formats.quantize(x, blocks)


def statistics(x_NCP: Tensor, config: LightNorm, eps: float) -> Statistics:
    """Mean, scale and extrema of quantised activations, float64 [N, C, P].

    mu = S(sum x / n),   s = sum_k C(m_k) / K (max_k - min_k) + eps,   r = S(1/s)

    mu and r are rounded from the exact quotients; C(m_k) / K and eps are float64 numbers.
    """
    x_CN = x_NCP.transpose(0, 1).flatten(1)
    n = x_CN.shape[1]
    deviation, start = torch.zeros(len(x_CN), dtype=torch.float64), 0
    ends, indices = [], []
    for m, factor in zip(sizes(n, config.chunks), factors(n, config.chunks, config.scale), strict=True):
        part = x_CN[:, start : start + m]
        both = part.amax(1), part.amin(1)
        deviation += float(factor) * (both[0] - both[1])
        ends.append(torch.stack(both, 1))
        indices.append(torch.stack([start + (part == end[:, None]).int().argmax(1) for end in both], 1))
        start += m
    ends_CK2, indices_CK2 = torch.stack(ends, 1), torch.stack(indices, 1)
    deviation = deviation / config.chunks + eps
    mean = _sums(x_CN, n, config.statistics)
    deviation = torch.where(mean.isnan(), torch.nan, deviation)
    reciprocal = _reciprocals(1 / deviation, ends_CK2, n, config, eps)
    return Statistics(mean, deviation, reciprocal, indices_CK2[..., 0], indices_CK2[..., 1])


def _reciprocals(near: Tensor, ends: Tensor, elements: int, config: LightNorm, eps: float) -> Tensor:
    """S(1/s) of the exact 1/s, which are near some float64."""
    form, error = config.statistics, uncertainty(config.chunks)
    if form is None:
        return near
    low, high = (formats.quantize(near * (1 + sign * error), form) for sign in (-1, 1))
    return exact_reciprocals(low, low != high, ends, elements, config, eps)


def normalize(x: Tensor, mean: Tensor, reciprocal: Tensor, config: LightNorm, dtype: torch.dtype) -> Tensor:
    """xhat = F(D(x - mu) r), float64."""
    if config.difference is not None:
        x = formats.quantize(_exactly(x, mean, torch.ones_like(mean)), config.difference)
        mean = torch.zeros_like(mean)
    if config.forward is None:
        return ((x - mean[:, None]) * reciprocal[:, None]).to(dtype).double()
    return formats.quantize(_exactly(x, mean, reciprocal), config.forward)


def _exactly(x: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """(x - mean) factor, rounded to odd; the vectors are those of the channels."""
    return scaled_difference(x, mean[:, None], factor[:, None])


def affine(xhat: Tensor, gamma: Tensor, beta: Tensor, config: LightNorm, dtype: torch.dtype) -> Tensor:
    """y = B(F(gamma xhat + beta))."""
    scale, shift = gamma[:, None].double(), beta[:, None].double()
    y = scale * xhat + shift if config.forward is None else multiplied_and_added(scale, xhat, shift)
    y = rounded(y, config.forward, dtype)
    return blocked(y, config.forward_blocks).to(dtype)


def _taken(x: Tensor, config: LightNorm) -> Tensor:
    """x_q = B(F(x)) as float64; channels with a NaN or infinity become NaN."""
    x_q = blocked(rounded(x, config.forward, x.dtype), config.forward_blocks)
    bad = ~x.isfinite().all(2).all(0)
    return torch.where(bad[:, None], torch.nan, x_q)


def forward(x: Tensor, gamma: Tensor, beta: Tensor, config: LightNorm, eps: float) -> tuple[Tensor, Saved]:
    """Training: y in x's dtype for x [N, C, P], and what the gradients need.

    ``gamma`` and ``beta``: [C], in x's dtype.
    """
    dtype = x.dtype
    x_q = _taken(x, config)
    scale, shift = (rounded(v, config.forward, dtype) for v in (gamma, beta))
    stats = statistics(x_q, config, eps)
    xhat = normalize(x_q, stats.mean, stats.reciprocal, config, dtype)
    return affine(xhat, scale, shift, config, dtype), Saved(xhat, stats, scale)


def infer(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, config: LightNorm, eps: float
) -> tuple[Tensor, Saved]:
    """Evaluation with running statistics: mu = S(mean), r = S(1 / sqrt(var + eps))."""
    dtype, none = x.dtype, torch.zeros(len(gamma), 0, dtype=torch.int64)
    deviation = (var.double() + eps).sqrt()
    mu, reciprocal = (rounded(v, config.statistics, torch.float64) for v in (mean.double(), 1 / deviation))
    scale, shift = (rounded(v, config.forward, dtype) for v in (gamma, beta))
    xhat = normalize(_taken(x, config), mu, reciprocal, config, dtype)
    return affine(xhat, scale, shift, config, dtype), Saved(
        xhat, Statistics(mu, deviation, reciprocal, none, none), scale
    )


def backward(grad: Tensor, saved: Saved, config: LightNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gamma and beta, in grad's dtype, for grad [N, C, P].

        g = B(F'(dy)),   dbeta = S'(sum g),   dgamma = S = S'(sum g xhat),   m = S'(sum g / n)
        dx = B(F'((g - m) (gamma r) - a_k [first maximum of chunk k] + a_k [first minimum])),
        a_k = gamma r C(m_k) S / K

    with F' the format ``backward`` and S' `LightNorm.gradient_statistics`. Rounding passes gradients straight through.
    In eval mode (no extrema) mu and s are constants: dx = B(F'(g gamma r)). gamma r is a float64 (exact where there
    are formats); without a format F' the products of a_k are float64, from left to right.

    Source: the closed form of section 3 of our specification, checked by central differences; the order of operations
    is our definition.
    """
    dtype, (N, C, P) = grad.dtype, grad.shape
    stats, K = saved.statistics, saved.statistics.largest.shape[1]
    g = blocked(rounded(grad, config.backward, dtype), config.backward_blocks)
    bad = ~grad.isfinite().all(2).all(0)
    g = torch.where(bad[:, None], torch.nan, g)
    g_CN, xhat_CN = (v.transpose(0, 1).flatten(1) for v in (g, saved.normalized))
    form = config.gradient_statistics
    total, mean, cross = _sums(g_CN, 1, form), _sums(g_CN, N * P, form), _sums(g_CN * xhat_CN, 1, form)
    slope = saved.gamma * stats.reciprocal
    mean = mean if K else torch.zeros_like(mean)
    dx_CN = (g_CN - mean[:, None]) * slope[:, None] if config.backward is None else _exactly(g_CN, mean, slope)
    for k, factor in enumerate(factors(N * P, K, config.scale) if K else ()):
        amount = slope * float(factor) * cross / K
        for sign, at in ((-1, stats.largest[:, k]), (1, stats.smallest[:, k])):
            rows = (stats.largest[:, k] != stats.smallest[:, k]).nonzero().squeeze(1)  # else the two would cancel
            if config.backward is None:
                dx_CN[rows, at[rows]] += sign * amount[rows]
                continue
            for c in rows.tolist():
                v, m, a, S = (float(v) for v in (g_CN[c, at[c]], mean[c], slope[c], cross[c]))
                dx_CN[c, at[c]] = _at_extremum(v, m, a, S, sign * float(factor) / K)
    dx = rounded(dx_CN.view(C, N, P).transpose(0, 1), config.backward, dtype)
    return blocked(dx, config.backward_blocks).to(dtype), cross.to(dtype), total.to(dtype)


def _at_extremum(g: float, mean: float, slope: float, cross: float, factor: float) -> float:
    """(g - m) slope + slope factor S, rounded to odd; a zero has the sign of float64's."""
    near = (g - mean) * slope + slope * factor * cross
    if not math.isfinite(near):
        return near
    exact = ((Fraction(g) - Fraction(mean)) + Fraction(factor) * Fraction(cross)) * Fraction(slope)
    return odd(exact) if exact else math.copysign(0.0, near)


def _sums(x_CN: Tensor, divisor: int, form: Float | None) -> Tensor:
    """Exact sums of rows over a divisor, rounded once; NaN where an element is not finite."""
    return torch.tensor([_sum(row.tolist(), divisor, form) for row in x_CN], dtype=torch.float64)


def _sum(values: list[float], divisor: int, form: Float | None) -> float:
    if not all(map(math.isfinite, values)):  # which fsum refuses
        return math.nan
    return settled(
        math.fsum(values) / divisor, 2.0**-51, lambda: sum(map(Fraction, values), Fraction(0)) / divisor, form
    )
