"""Every bit of range batch normalization in low precision, readable: float64, one line an arrow of the paper's figure.

Legend: N samples, C channels, P places of a sample; the n = N P elements of a channel count in the order (sample,
place); K chunks.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recoup.formats import BlockFloat, Float
from recoup.formats import reference as formats
from recoup.lightnorm.config import LightNorm
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

    mu = S(sum x / n),   s = (1/K) sum_k C(m_k) (max_k - min_k) + eps,   r = S(1/s)
    """
    x_CN = x_NCP.transpose(0, 1).flatten(1)
    n = x_CN.shape[1]
    # fsum rounds the exact sum once; it refuses what is not finite.
    sums = [math.fsum(row.tolist()) if bool(row.isfinite().all()) else math.nan for row in x_CN]
    mean = torch.tensor(sums, dtype=torch.float64) / n
    deviation, start = torch.zeros(len(x_CN), dtype=torch.float64), 0
    largest, smallest = [], []
    for m, factor in zip(sizes(n, config.chunks), factors(n, config.chunks, config.scale), strict=True):
        part = x_CN[:, start : start + m]
        deviation += float(factor) * (part.amax(1) - part.amin(1))
        largest.append(start + (part == part.amax(1, keepdim=True)).int().argmax(1))
        smallest.append(start + (part == part.amin(1, keepdim=True)).int().argmax(1))
        start += m
    deviation = deviation / config.chunks + eps
    deviation = torch.where(mean.isnan(), torch.nan, deviation)
    mean, reciprocal = (rounded(v, config.statistics, torch.float64) for v in (mean, 1 / deviation))
    return Statistics(mean, deviation, reciprocal, torch.stack(largest, 1), torch.stack(smallest, 1))


def normalize(x: Tensor, mean: Tensor, reciprocal: Tensor, config: LightNorm, dtype: torch.dtype) -> Tensor:
    """xhat = F((x - mu) r), float64."""
    return rounded((x - mean[:, None]) * reciprocal[:, None], config.forward, dtype)


def affine(xhat: Tensor, gamma: Tensor, beta: Tensor, config: LightNorm, dtype: torch.dtype) -> Tensor:
    """y = B(F(gamma xhat + beta))."""
    y = rounded(gamma[:, None] * xhat + beta[:, None], config.forward, dtype)
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
        a_k = gamma r C(m_k) S / K,  multiplied in this order

    with F' the format ``backward`` and S' `LightNorm.gradient_statistics`. Rounding passes gradients straight through.
    In eval mode (no extrema) mu and s are constants: dx = B(F'(g gamma r)).

    Source: the closed form of section 3 of our specification, checked by central differences; the order of operations
    is our definition.
    """
    dtype, (N, C, P) = grad.dtype, grad.shape
    stats, K = saved.statistics, saved.statistics.largest.shape[1]
    g = blocked(rounded(grad, config.backward, dtype), config.backward_blocks)
    bad = ~grad.isfinite().all(2).all(0)
    g = torch.where(bad[:, None], torch.nan, g)
    g_CN, xhat_CN = (v.transpose(0, 1).flatten(1) for v in (g, saved.normalized))
    plain, product = _sums(g_CN), _sums(g_CN * xhat_CN)
    total, mean, cross = (
        rounded(v, config.gradient_statistics, torch.float64) for v in (plain, plain / (N * P), product)
    )
    slope = saved.gamma * stats.reciprocal
    if K == 0:
        dx_CN = g_CN * slope[:, None]
    else:
        dx_CN = (g_CN - mean[:, None]) * slope[:, None]
        for k, factor in enumerate(factors(N * P, K, config.scale)):
            amount = slope * float(factor) * cross / K
            high, low = stats.largest[:, k], stats.smallest[:, k]
            rows = (high != low).nonzero().squeeze(1)  # in a constant chunk the two would cancel
            dx_CN[rows, high[rows]] -= amount[rows]
            dx_CN[rows, low[rows]] += amount[rows]
    dx = rounded(dx_CN.view(C, N, P).transpose(0, 1), config.backward, dtype)
    return blocked(dx, config.backward_blocks).to(dtype), cross.to(dtype), total.to(dtype)


def _sums(x_CN: Tensor) -> Tensor:
    """Exact sums of rows, rounded once; NaN where an element is not finite."""
    rows = [math.fsum(row.tolist()) if bool(row.isfinite().all()) else math.nan for row in x_CN]
    return torch.tensor(rows, dtype=torch.float64)
