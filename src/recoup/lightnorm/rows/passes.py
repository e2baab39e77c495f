"""Layer norm and RMS norm of [S, D] by ranges: what is read from memory, in what order, and where it runs.

Rounding, sums and extrema of a sample are batch norm's of a channel (`recoup.lightnorm.separate`): with x as [1, S, D]
and blocks of places. What follows is a sample's own: kernels by numba on the CPU, torch's operations on CUDA. The bits
are the same.

Legend: S samples, D features, K chunks.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from recoup.formats import Float, quantize
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.exact import exact_reciprocal, over, uncertainty
from recoup.lightnorm.rows import anywhere, cpu
from recoup.lightnorm.rows.reference import NOWHERE, Kind, at_end, constants_of
from recoup.lightnorm.separate import SeparatePasses, averaged, blocked, device_of, rounded, statistics

DOUBT = 2.0**-48  # more than the roundings of a chunk's ends lose, of the sum of magnitudes

Forward = tuple[Tensor, Tensor, Tensor, Tensor]


def forward(
    x: Tensor, gamma: Tensor, beta: Tensor, gain: Tensor | None, kind: Kind, config: LightNorm, eps: float
) -> Forward:
    """y and xhat, both [S, D] in x's dtype; r, float64 [S]; `reference.Saved.ends`. See `reference.forward`."""
    reads, own = _reads(device_of(x), config), _elementwise(x)
    x_q = reads.read_input(x[None])
    sums, extrema, indices, features = reads.moments(x_q)
    if kind == "layer":
        mean, _, r = statistics(sums, extrema, features, config, eps)
        ends, unit = _first_extrema(indices), config
    else:
        mean, unit = torch.zeros_like(sums[:, 0]), _without_difference(config)
        largest, ends = _first_magnitudes(extrema, indices)
        r = _reciprocals(torch.where(sums.isnan().any(1)[:, None], torch.nan, largest), features, config, eps)
    scale, shift = multiplier(gamma, gain, config), rounded(beta.detach(), config.forward).double()
    y, xhat = own.normalize(x_q[0], mean, r, scale, shift, unit)
    return blocked(y[None], reads.config.forward_blocks)[0], xhat, r, ends


def backward(
    grad: Tensor,
    xhat: Tensor,
    r: Tensor,
    ends: Tensor,
    gamma: Tensor,
    gain: Tensor | None,
    kind: Kind,
    config: LightNorm,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [S, D], gamma and beta [D], in grad's dtype; see `reference.backward`."""
    reads, own = _reads(device_of(grad), config), _elementwise(grad)
    dy, scale, form = reads.read_gradient(grad[None])[0], multiplier(gamma, gain, config), config.gradient_statistics
    sums, products = own.products(dy, xhat, scale)
    cross = averaged(products, 1, form)
    mean = averaged(sums, grad.shape[1], form) if kind == "layer" else torch.zeros_like(cross)
    dx = own.gradient(dy, mean, r, scale, config)
    constants = constants_of(kind, grad.shape[1], config).tolist()
    _write_ends(dx, scale, dy, mean, cross, r, ends, constants, config.backward)
    dbeta, dgamma = (averaged(v, 1, form) for v in own.columns(dy, xhat))
    dgamma = dgamma if gain is None else gain.double() * dgamma
    dx = blocked(dx[None], reads.config.backward_blocks)[0]
    return dx, dgamma.to(grad.dtype), dbeta.to(grad.dtype)


def multiplier(gamma: Tensor, gain: Tensor | None, config: LightNorm) -> Tensor:
    """a = gain F(gamma), float64 [D]."""
    scale = rounded(gamma.detach(), config.forward).double()
    return scale if gain is None else gain.double() * scale


@lru_cache(maxsize=64)
def _reads(device: Any, config: LightNorm) -> SeparatePasses:
    """What batch norm's passes do for samples as channels; their blocks lie along the features."""
    return SeparatePasses(device, config.replace(axis="place"))


def _without_difference(config: LightNorm) -> LightNorm:
    """An RMS norm takes no mean away."""
    return config if config.difference is None else config.replace(difference=None)


def _elementwise(x: Tensor) -> Any:
    return cpu if x.device.type == "cpu" else anywhere


def _first_extrema(indices: Tensor) -> Tensor:
    """`reference.Saved.ends` of a layer norm, from the first maximum and minimum of every chunk, [S, K, 2]."""
    return torch.where((indices[..., :1] == indices[..., 1:]), NOWHERE, indices)


def _first_magnitudes(extrema: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The largest magnitude of every chunk, [S, K], and `reference.Saved.ends` of an RMS norm.

    The first largest |x| is the first maximum or the first minimum.
    """
    high, low = extrema[..., 0], -extrema[..., 1]
    positive = (high > low) | ((high == low) & (indices[..., 0] < indices[..., 1]))
    largest = torch.maximum(high, low)
    loses = torch.where(positive & (largest > 0), indices[..., 0], NOWHERE)
    gains = torch.where(~positive & (largest > 0), indices[..., 1], NOWHERE)
    return largest, torch.stack([loses, gains], -1)


def _reciprocals(largest: Tensor, features: int, config: LightNorm, eps: float) -> Tensor:
    """S(1/s) of an RMS norm, s = (1/K) sum_k A(m_k) max_k |x| + eps, of magnitudes [S, K]."""
    constants, form = constants_of("rms", features, config).tolist(), config.statistics
    s = torch.zeros_like(largest[:, 0])
    for k, constant in enumerate(constants):
        s = s + constant * largest[:, k]
    s = over(s, config.chunks) + eps
    r = rounded(1 / s, form)
    if form is None:
        return r
    low, high = (rounded(1 / s * (1 + sign * uncertainty(config.chunks)), form) for sign in (-1, 1))
    for row in ((low != high) & (1 / s).isfinite()).nonzero().squeeze(1).tolist():
        r[row] = exact_reciprocal([[v, 0.0] for v in largest[row].tolist()], constants, form, eps)
    return r


def _write_ends(
    dx: Tensor,
    scale: Tensor,
    dy: Tensor,
    mean: Tensor,
    cross: Tensor,
    r: Tensor,
    ends: Tensor,
    constants: list[float],
    form: Float | None,
) -> None:
    """Write dx where chunks' ends lose and gain: exactly, though float64 decides all but a few."""
    K = len(constants)
    rows, chunks, sides = (ends != NOWHERE).nonzero(as_tuple=True)
    at = ends[rows, chunks, sides]
    g, m, slope, S = scale[at] * dy[rows, at].double(), mean[rows], r[rows], cross[rows]
    sign, C = 2.0 * sides - 1, torch.tensor(constants, dtype=torch.float64, device=dx.device)[chunks]
    if form is None:
        dx[rows, at] = ((g - m) * slope + sign * over(slope * C * S, K)).to(dx.dtype)
        return
    factor = sign * over(C, K)
    near, size = (g - m) * slope + slope * factor * S, (g.abs() + m.abs() + (factor * S).abs()) * slope
    low, high = (quantize(near + way * DOUBT * size, form) for way in (-1, 1))
    values = quantize(near, form)
    for i in (low < high).nonzero().squeeze(1).tolist():
        exact = at_end(*(float(v[i]) for v in (g, m, slope, S, factor)))
        values[i] = quantize(torch.tensor([exact], dtype=torch.float64), form).to(values.device)[0]
    dx[rows, at] = values.to(dx.dtype)
