"""Products of block-scaled operands on the CPU: tensors to the kernels of block_kernels.py, over the thread pool.

The bits are those of blocks.py, which runs on any device.

Legend: B matrices of a batch, M rows, N columns, K terms; S = ceil(K / block) scales.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.kernels.arrays import array
from recoup.kernels.threads import over_rows
from recoup.tensorcore.block_kernels import TILE, prepare_kernel, products_kernel, sixteens_kernel
from recoup.tensorcore.config import SCALES, SUMMED, TensorCore

__all__ = ["products"]


def products(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, config: TensorCore) -> Tensor:
    """See `recoup.tensorcore.blocks.products`."""
    one = _sixteens if config.sums_sixteen else _each
    y = torch.stack([one(*pair, config) for pair in zip(a, b, scale_a, scale_b, strict=True)])
    wrong = scale_a.isnan().any(2)[:, :, None] | scale_b.isnan().any(1)[:, None]
    return y.masked_fill(wrong, torch.nan)


def _prepared(x: Tensor, scale: Tensor, block: int, exponents: tuple[int, int], width: int) -> tuple[Tensor, Tensor]:
    """x [K, N] and its scales as tiles [T, K, width]: values with their scales, and exponents.

    ``exponents``: of the smallest normal numbers of x's format and of the scales'.
    """
    K, N = x.shape
    tiles = -(-N // width)
    values, powers = torch.empty(tiles, K, width, dtype=torch.float64), torch.empty(tiles, K, width)
    arrays = [array(t) for t in (x, scale)], [array(t) for t in (values, powers)]

    def run(first: int, last: int) -> None:
        prepare_kernel(*arrays[0], block, *exponents, *arrays[1], first, last)

    over_rows(run, tiles, K * width)
    return values, powers


def _each(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, config: TensorCore) -> Tensor:
    """Of one pair of matrices [M, K], [K, N]: every product is aligned."""
    assert config.block is not None
    smallest, (first, second) = _scale_exponent(config), config.formats
    x, e = _prepared(a.mT, scale_a.mT, config.block, (first.min_exponent, smallest), 1)
    y, f = _prepared(b, scale_b, config.block, (second.min_exponent, smallest), TILE)
    return _run(products_kernel, (x[:, :, 0], e[:, :, 0], y, f), config, a.shape[0], b.shape)


def _sixteens(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, config: TensorCore) -> Tensor:
    """Of one pair: sums of sixteen are."""
    assert config.block is not None
    exponents, (K, N) = (_scale_exponent(config), 0), b.shape
    every = torch.arange(-(-K // SUMMED)) * SUMMED // config.block
    left, right = scale_a.mT[every], scale_b[every]
    s, e = _prepared(left, torch.ones_like(left), 1, exponents, 1)
    t, f = _prepared(right, torch.ones_like(right), 1, exponents, TILE)
    tiles = F.pad(b, [0, -N % TILE]).view(K, -1, TILE).transpose(0, 1).contiguous()
    operands = (a.contiguous(), s[:, :, 0].nan_to_num(1.0), e[:, :, 0], tiles, t.nan_to_num(1.0), f)
    return _run(sixteens_kernel, operands, config, a.shape[0], b.shape)


def _scale_exponent(config: TensorCore) -> int:
    return SCALES[config.scale_format or "ue8m0"].min_exponent


def _run(kernel: object, operands: tuple[Tensor, ...], config: TensorCore, M: int, shape: tuple[int, ...]) -> Tensor:
    """Rows of tiles over the pool -> [M, N]."""
    (K, N), tiles = shape, -(-shape[1] // TILE)
    y, arrays = torch.empty(tiles, M, TILE), [array(t) for t in operands]
    numbers, result = (config.group, config.fraction, config.promotion or K), array(y)

    def run(first: int, last: int) -> None:
        kernel(*arrays, *numbers, result, first, last)  # type: ignore[operator]

    over_rows(run, tiles * M, K * TILE)
    return y.permute(1, 0, 2).reshape(M, tiles * TILE)[:, :N].contiguous()
