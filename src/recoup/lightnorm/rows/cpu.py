"""The passes of layer and RMS norm on the CPU: tensors to the kernels of cpu_kernels.py, samples over the thread pool.

The names are those of anywhere.py, which takes what the kernels do not hold for: float64, no format, a format of x -
mu. The bits are the same.

Legend: S samples, D features.
"""

import numpy as np
import torch
from torch import Tensor

from recoup.kernels.arrays import array
from recoup.kernels.threads import over_rows
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.cpu_rounding import rounding_of
from recoup.lightnorm.rows import anywhere
from recoup.lightnorm.rows.cpu_kernels import columns_kernel, gradient_kernel, normalize_kernel, products_kernel

__all__ = ["columns", "gradient", "normalize", "products"]


def normalize(
    x: Tensor, mean: Tensor, reciprocal: Tensor, scale: Tensor, shift: Tensor, config: LightNorm
) -> tuple[Tensor, Tensor]:
    """See `anywhere.normalize`."""
    if x.dtype != torch.float32 or config.forward is None or config.difference is not None:
        return anywhere.normalize(x, mean, reciprocal, scale, shift, config)
    y, xhat = torch.empty_like(x), torch.empty_like(x)
    arrays = [array(v) for v in (x, xhat, y)]
    vectors, numbers = [array(v) for v in (mean, reciprocal, scale, shift)], tuple(rounding_of(config.forward))
    over_rows(lambda a, b: normalize_kernel(*arrays, a, b, *vectors, numbers), *x.shape)
    return y, xhat


def products(dy: Tensor, xhat: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `anywhere.products`."""
    if dy.dtype != torch.float32:
        return anywhere.products(dy, xhat, scale)
    plain, cross, vector = np.empty((len(dy), 2)), np.empty((len(dy), 2)), array(scale)
    arrays = array(dy), array(xhat)
    over_rows(lambda a, b: products_kernel(*arrays, a, b, vector, plain, cross), *dy.shape)
    return torch.from_numpy(plain), torch.from_numpy(cross)


def gradient(dy: Tensor, mean: Tensor, reciprocal: Tensor, scale: Tensor, config: LightNorm) -> Tensor:
    """See `anywhere.gradient`."""
    if dy.dtype != torch.float32 or config.backward is None:
        return anywhere.gradient(dy, mean, reciprocal, scale, config)
    dx, vectors = torch.empty_like(dy), [array(v) for v in (mean, reciprocal, scale)]
    arrays, numbers = (array(dy), array(dx)), tuple(rounding_of(config.backward))
    over_rows(lambda a, b: gradient_kernel(*arrays, a, b, *vectors, numbers), *dy.shape)
    return dx


def columns(dy: Tensor, xhat: Tensor) -> tuple[Tensor, Tensor]:
    """See `anywhere.columns`; features over the thread pool."""
    if dy.dtype != torch.float32:
        return anywhere.columns(dy, xhat)
    samples, features = dy.shape
    plain, cross, arrays = np.empty((features, 2)), np.empty((features, 2)), (array(dy), array(xhat))
    over_rows(lambda a, b: columns_kernel(*arrays, a, b, plain, cross), features, samples)
    return torch.from_numpy(plain), torch.from_numpy(cross)
