"""The passes of layer and RMS norm by torch's own operations on float64, on any device: CUDA runs them.

Each operation of torch is one rounding, or exact with what it lost (`recoup.lightnorm.exact`), so that the bits are
those of the CPU's kernels.

Legend: S samples, D features.
"""

import torch
from torch import Tensor

from recoup.formats import quantize
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.exact import exact_product, exact_sum, multiplied_and_added, scaled_difference

__all__ = ["columns", "gradient", "normalize", "products"]


def normalize(
    x: Tensor, mean: Tensor, reciprocal: Tensor, scale: Tensor, shift: Tensor, config: LightNorm
) -> tuple[Tensor, Tensor]:
    """y = F(a xhat + beta) and xhat = F(D(x - mu) r) of x [S, D], in x's dtype; mu and r float64 [S], a and beta
    float64 [D]."""
    v, mu, r, form = x.double(), mean[:, None], reciprocal[:, None], config.forward
    if config.difference is not None:
        v, mu = quantize(scaled_difference(v, mu, torch.ones_like(r)), config.difference), torch.zeros_like(mu)
    if form is None:
        xhat = ((v - mu) * r).to(x.dtype)
        return (scale * xhat.double() + shift).to(x.dtype), xhat
    xhat = quantize(scaled_difference(v, mu, r), form)
    y = quantize(multiplied_and_added(scale, xhat, shift), form)
    return y.to(x.dtype), xhat.to(x.dtype)


def products(dy: Tensor, xhat: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Every sample's sums of g = a dy and of g xhat, as pairs float64 [S, 2]."""
    g = scale * dy.double()
    return _added(g, torch.zeros_like(g)), _added(*exact_product(g, xhat.double()))


def gradient(dy: Tensor, mean: Tensor, reciprocal: Tensor, scale: Tensor, config: LightNorm) -> Tensor:
    """dx = F'((a dy - m) r) of dy [S, D], in its dtype; what the chunks' ends lose and gain comes later."""
    g, m, r = scale * dy.double(), mean[:, None], reciprocal[:, None]
    if config.backward is None:
        return ((g - m) * r).to(dy.dtype)
    return quantize(scaled_difference(g, m, r), config.backward).to(dy.dtype)


def columns(dy: Tensor, xhat: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the samples of dy and of dy xhat, as pairs float64 [D, 2]."""
    g, h = dy.T.double(), xhat.T.double()
    return _added(g, torch.zeros_like(g)), _added(*exact_product(g, h))


def _added(values: Tensor, errors: Tensor) -> Tensor:
    """Sums of rows as pairs [R, 2]: halves are added to each other, with what that loses."""
    if values.shape[1] == 0:
        return values.new_zeros(len(values), 2)
    while (size := values.shape[1]) > 1:
        half = size // 2
        total, lost = exact_sum(values[:, :half], values[:, half : 2 * half])
        lost = errors[:, :half] + errors[:, half : 2 * half] + lost
        values, errors = (torch.cat([new, old[:, 2 * half :]], 1) for new, old in ((total, values), (lost, errors)))
    return torch.cat([values, errors], 1)
