"""LightNorm's passes on the CPU: tensors to the kernels of cpu_kernels.py, channels over the thread pool.

Legend: x [N, C, P]; K chunks. The names are those of gpu.py; `passes` puts them together.
"""

import numpy as np
import torch
from torch import Tensor

from recoup.formats import Float
from recoup.kernels.arrays import array
from recoup.kernels.magnitudes import magnitudes
from recoup.kernels.threads import over_rows
from recoup.lightnorm.cpu_kernels import gradient_kernel, moments_kernel, normalize_kernel, products_kernel
from recoup.lightnorm.cpu_rounding import rounding_of
from recoup.lightnorm.tiling import segments

INTEGERS = {torch.float32: np.int32, torch.float64: np.int64}
INFINITE32 = 0x7F800000


def finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    if x.dtype == torch.float32:
        return magnitudes(x)[0] < INFINITE32
    return bool(x.isfinite().all())


def _flat(x: Tensor) -> np.ndarray:
    return array(x).reshape(-1)


def moments(x: Tensor, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums as pairs float64 [C, 2]; the chunks' maxima and minima, float64 [C, K, 2], and indices, int64 [C, K, 2]."""
    N, C, P = x.shape
    sums, ends, indices = np.empty((C, 2)), np.empty((C, chunks, 2)), np.empty((C, chunks, 2), np.int64)
    source, shape, pieces = _flat(x), (C, P), segments(N, P, chunks)
    keys = source.view(INTEGERS[x.dtype])
    over_rows(lambda a, b: moments_kernel(source, keys, a, b, shape, pieces, sums, ends, indices), C, N * P)
    return torch.from_numpy(sums), torch.from_numpy(ends), torch.from_numpy(indices)


def normalize(
    x: Tensor,
    mean: Tensor,
    reciprocal: Tensor,
    scale: Tensor,
    shift: Tensor,
    format: Float | None,  # noqa: A002
    difference: Float | None = None,
) -> tuple[Tensor, Tensor]:
    """y = F(gamma xhat + beta) and xhat = F(D(x - mu) r), in x's dtype; the vectors are float64 [C]."""
    y, xhat = torch.empty_like(x), torch.empty_like(x)
    vectors = [array(v) for v in (mean, reciprocal, scale, shift)]
    arrays, shape = [_flat(v) for v in (x, xhat, y)], tuple(x.shape)
    numbers = tuple(rounding_of(format)), tuple(rounding_of(difference))
    over_rows(lambda a, b: normalize_kernel(*arrays, a, b, shape, *vectors, *numbers), shape[1], shape[0] * shape[2])
    return y, xhat


def products(g: Tensor, xhat: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of g and of g xhat, as pairs float64 [C, 2]."""
    N, C, P = g.shape
    plain, cross = np.empty((C, 2)), np.empty((C, 2))
    arrays = _flat(g), _flat(xhat)
    over_rows(lambda a, b: products_kernel(*arrays, a, b, (N, C, P), plain, cross), C, N * P)
    return torch.from_numpy(plain), torch.from_numpy(cross)


def gradient(
    g: Tensor,
    mean: Tensor,
    slope: Tensor,
    amounts: Tensor,
    indices: Tensor,
    format: Float | None,  # noqa: A002
) -> Tensor:
    """dx = F'((g - m) slope, less the amount at a chunk's first maximum, plus it at its first minimum)."""
    dx = torch.empty_like(g)
    vectors = [array(v) for v in (mean, slope, amounts, indices)]
    arrays, shape, numbers = (_flat(g), _flat(dx)), tuple(g.shape), tuple(rounding_of(format))
    over_rows(lambda a, b: gradient_kernel(*arrays, a, b, shape, *vectors, numbers), shape[1], shape[0] * shape[2])
    return dx
