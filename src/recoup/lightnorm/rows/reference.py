"""Every bit of layer norm and RMS norm by ranges, readable: exact numbers, then the format where an arrow stands.

The D features of a sample take the place of a channel's n elements in `recoup.lightnorm.reference`; what is rounded
where is the same. A sum is exact, and a product that a format rounds too; without a format an operation is float64
rounded to nearest. Blocks lie along the features, whatever `LightNorm.axis` says.

Legend: S samples, D features, K chunks of the features; g_SD = a dy; a_D = gain gamma.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from recoup.formats import BlockFloat, Float
from recoup.formats import reference as formats
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.exact import exact_reciprocal, odd, scaled_difference
from recoup.lightnorm.reference import normalize, rounded
from recoup.lightnorm.scale import factors, magnitude_factors, sizes

__all__ = ["Kind", "Saved", "along_features", "backward", "constants_of", "forward"]

Kind = Literal["layer", "rms"]
NOWHERE = -1


@dataclass(frozen=True, slots=True)
class Saved:
    """What the backward pass reads.

    Attributes:
        normalized: xhat, float64 [S, D].
        reciprocal: r, float64 [S].
        ends: int64 [S, K, 2]: of every chunk the feature at which dx loses r C S / K, and the one at which it gains
            that; `NOWHERE`: none does. Of a layer norm the first maximum and the first minimum, none where they are
            one. Of an RMS norm the first largest |x|: it loses where x is positive, gains where it is negative.
        scale: a, float64 [D].
    """

    normalized: Tensor
    reciprocal: Tensor
    ends: Tensor
    scale: Tensor


def constants_of(kind: Kind, features: int, config: LightNorm) -> np.ndarray:
    """C(m_k) of a layer norm's chunks, A(m_k) of an RMS norm's; float64 [K]."""
    if kind == "rms":
        return magnitude_factors(features, config.chunks)
    return factors(features, config.chunks, config.scale)


def along_features(blocks: BlockFloat | None) -> BlockFloat | None:
    """A config's blocks, of [S, D]."""
    return None if blocks is None else blocks.replace(dim=1)


def forward(
    x: Tensor, gamma: Tensor, beta: Tensor, gain: Tensor | None, kind: Kind, config: LightNorm, eps: float
) -> tuple[Tensor, Saved]:
    """y in x's dtype for x [S, D], and what the gradients need.

        layer   mu = S(sum x_q / D),   s = (1/K) sum_k C(m_k) (max_k x_q - min_k x_q) + eps,   xhat = F(D(x_q - mu) r)
        rms                            s = (1/K) sum_k A(m_k) max_k |x_q| + eps,               xhat = F(x_q r)
        both    x_q = B(F(x)),   r = S(1/s),   y = B(F(gain F(gamma) xhat + F(beta)))

    Without a format a = gain gamma is a float64 rounded to nearest before it is multiplied. A sample with a NaN or
    infinity becomes NaN.

    Args:
        x: float32 or float64.
        gamma, beta: [D], in x's dtype; zeros are a beta that there is not.
        gain: float32 [D], a repair; None: ones.
        kind: ``layer`` or ``rms``.
        config: formats, blocks, chunks.
        eps: added to s.
    """
    dtype = x.dtype
    x_q = _stored(x, config.forward, config.forward_blocks)
    scale, shift = (rounded(v, config.forward, dtype) for v in (gamma, beta))
    scale = scale if gain is None else gain.double() * scale
    constants = constants_of(kind, x.shape[1], config).tolist()
    spans, ends = _chunks(x_q, kind, config.chunks)
    reciprocal = _reciprocals(x_q, spans, constants, config, eps)
    if kind == "layer":
        mean = _settled([_exact(row) for row in x_q.tolist()], x.shape[1], config.statistics)
        xhat = normalize(x_q, mean, reciprocal, config, dtype)
    else:
        xhat = normalize(x_q, torch.zeros_like(reciprocal), reciprocal, config.replace(difference=None), dtype)
    return _affine(xhat, scale, shift, config, dtype), Saved(xhat, reciprocal, ends, scale)


def _stored(x: Tensor, form: Float | None, blocks: BlockFloat | None) -> Tensor:
    """B(F(x)) as float64; samples with a NaN or infinity become NaN."""
    x_q = rounded(x, form, x.dtype)
    x_q = x_q if blocks is None else formats.quantize(x_q, along_features(blocks))  # type: ignore[arg-type]
    return torch.where(x.isfinite().all(1)[:, None], x_q, torch.nan)


def _chunks(x: Tensor, kind: Kind, chunks: int) -> tuple[list[list[float]], Tensor]:
    """Range, or largest magnitude, of every sample's chunks; and `Saved.ends`."""
    spans: list[list[float]] = [[] for _ in x]
    ends = torch.full((len(x), chunks, 2), NOWHERE, dtype=torch.int64)
    for s, row in enumerate(x.tolist()):
        start = 0
        for k, m in enumerate(sizes(len(row), chunks)):
            part = row[start : start + m] if kind == "layer" else [abs(v) for v in row[start : start + m]]
            high, low = start + part.index(max(part)), start + part.index(min(part))
            if kind == "layer":
                spans[s].append(row[high] - row[low])
                ends[s, k] = torch.tensor([high, low] if high != low else [NOWHERE, NOWHERE])
            else:
                spans[s].append(abs(row[high]))
                ends[s, k] = torch.tensor([high if row[high] > 0 else NOWHERE, high if row[high] < 0 else NOWHERE])
            start += m
    return spans, ends


def _reciprocals(
    x_q: Tensor, spans: list[list[float]], constants: list[float], config: LightNorm, eps: float
) -> Tensor:
    """S(1/s); without a format s and 1/s are float64."""
    form, found = config.statistics, []
    for row in spans:
        s = 0.0
        for constant, span in zip(constants, row, strict=True):
            s += constant * span
        s = s / len(row) + eps
        near = 1 / s if s else math.inf
        exact = form is not None and math.isfinite(near)
        found.append(exact_reciprocal([[v, 0.0] for v in row], constants, form, eps) if exact else near)  # type: ignore[arg-type]
    r = torch.tensor(found, dtype=torch.float64)
    r = torch.where(x_q.isnan().any(1), torch.nan, r)
    return r if form is None else formats.quantize(r, form)


def _affine(xhat: Tensor, scale: Tensor, shift: Tensor, config: LightNorm, dtype: torch.dtype) -> Tensor:
    """y = B(F(a xhat + beta))."""
    y = scale * xhat + shift
    if config.forward is not None:
        terms = zip(*(v.expand_as(y).flatten().tolist() for v in (scale, xhat, shift, y)), strict=True)
        exact = [
            _to_odd(Fraction(a) * Fraction(h) + Fraction(b), near) if math.isfinite(near) else near
            for a, h, b, near in terms
        ]
        y = torch.tensor(exact, dtype=torch.float64).view_as(y)
    y = rounded(y, config.forward, dtype)
    blocks = along_features(config.forward_blocks)
    return (y if blocks is None else formats.quantize(y, blocks)).to(dtype)


def backward(
    grad: Tensor, saved: Saved, gain: Tensor | None, kind: Kind, config: LightNorm
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gamma and beta, in grad's dtype, for grad [S, D].

        dy_q = B(F'(dy)),   g = a dy_q
        m = S'(sum_D g / D), of an RMS norm 0;   S = S'(sum_D g xhat)
        dx = B(F'((g - m) r - r c_k S / K [loses] + r c_k S / K [gains])),   c_k = C(m_k), of an RMS norm A(m_k)
        dgamma = gain S'(sum_S dy_q xhat),   dbeta = S'(sum_S dy_q)

    with F' the format ``backward`` and S' `LightNorm.gradient_statistics`. g is a float64: exact, unless gain and
    formats need more than 53 bits (without a gain they never do), rounded to nearest then. Rounding passes gradients
    straight through; the gain is a constant of the layer, and its product with S' one of float64. Without a format F'
    the products r c_k S / K are float64, from left to right.

    Source: the closed form of section 7 of our specification, checked by central differences; the order of operations
    and what the gain does to gradients are our definition.
    """
    dtype, D = grad.dtype, grad.shape[1]
    form = config.gradient_statistics
    dy = _stored(grad, config.backward, config.backward_blocks)
    g, xhat, r = saved.scale * dy, saved.normalized, saved.reciprocal
    S = _settled([_exact(row, other) for row, other in zip(g.tolist(), xhat.tolist(), strict=True)], 1, form)
    mean = _settled([_exact(row) for row in g.tolist()], D, form) if kind == "layer" else torch.zeros_like(S)
    dx = (g - mean[:, None]) * r[:, None]
    dx = dx if config.backward is None else scaled_difference(g, mean[:, None], r[:, None])
    constants = constants_of(kind, D, config)
    for s, k, side in (saved.ends != NOWHERE).nonzero().tolist():
        at, factor = int(saved.ends[s, k, side]), float(constants[k])
        if config.backward is None:
            amount = r[s] * factor * S[s] / config.chunks
            dx[s, at] += amount if side else -amount
        else:
            factor = factor / config.chunks * (1 if side else -1)
            dx[s, at] = at_end(float(g[s, at]), float(mean[s]), float(r[s]), float(S[s]), factor)
    dx = rounded(dx, config.backward, dtype)
    blocks = along_features(config.backward_blocks)
    dx = (dx if blocks is None else formats.quantize(dx, blocks)).to(dtype)
    columns = dy.T.tolist(), xhat.T.tolist()
    dgamma = _settled([_exact(one, other) for one, other in zip(*columns, strict=True)], 1, form)
    dbeta = _settled([_exact(column) for column in columns[0]], 1, form)
    dgamma = dgamma if gain is None else gain.double() * dgamma
    return dx, dgamma.to(dtype), dbeta.to(dtype)


def at_end(g: float, mean: float, r: float, S: float, factor: float) -> float:
    """(g - m) r + factor S r, rounded to odd; a zero has the sign of float64's."""
    near = (g - mean) * r + r * factor * S
    if not math.isfinite(near):
        return near
    return _to_odd((Fraction(g) - Fraction(mean) + Fraction(factor) * Fraction(S)) * Fraction(r), near)


def _to_odd(exact: Fraction, near: float) -> float:
    return odd(exact) if exact else math.copysign(0.0, near)


def _exact(values: Sequence[float], others: Sequence[float] | None = None) -> Fraction | None:
    """The sum of values, or of their products with others; None where one is not finite."""
    if not all(map(math.isfinite, [*values, *(others or ())])):
        return None
    if others is None:
        return sum(map(Fraction, values), Fraction(0))
    return sum((Fraction(v) * Fraction(w) for v, w in zip(values, others, strict=True)), Fraction(0))


def _settled(sums: Sequence[Fraction | None], divisor: int, form: Float | None) -> Tensor:
    """Exact sums over a divisor, rounded once; without a format the sum and the quotient are float64."""
    if form is None:
        found = [math.nan if v is None else float(v) / divisor for v in sums]
    else:
        found = [math.nan if v is None else odd(v / divisor) for v in sums]
    settled = torch.tensor(found, dtype=torch.float64)
    return settled if form is None else formats.quantize(settled, form)
