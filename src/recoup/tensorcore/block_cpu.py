"""Products of block-scaled operands on the CPU: tensors to the kernels of block_kernels.py, over the thread pool.

The bits are those of blocks.py, which runs on any device.

Where all is finite and float32 holds the operands times their scales, as it does those of layers, units whose products
are aligned one by one take the faster kernels of units without scales (`quick`).

Legend: B matrices of a batch, M rows, N columns, K terms; S = ceil(K / block) scales.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.kernels.arrays import array
from recoup.kernels.threads import over_rows
from recoup.tensorcore import cpu
from recoup.tensorcore.block_kernels import TILE, prepare_kernel, products_kernel, sixteens_kernel
from recoup.tensorcore.blocks import each_scale
from recoup.tensorcore.config import SCALES, SUMMED, TensorCore

__all__ = ["products", "quick"]

FLOAT32_MIN, FLOAT32_MAX = -126, 127  # exponents of its normal numbers


def products(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, config: TensorCore) -> Tensor:
    """See `recoup.tensorcore.blocks.products`."""
    one = _sixteens if config.sums_sixteen else _each
    y = torch.stack([one(*pair, config) for pair in zip(a, b, scale_a, scale_b, strict=True)])
    wrong = scale_a.isnan().any(2)[:, :, None] | scale_b.isnan().any(1)[:, None]
    return y.masked_fill(wrong, torch.nan)


def quick(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, config: TensorCore) -> Tensor | None:
    """The same of any operands, on the kernels of units without scales, which know the scales for the exponents of
    zeros and subnormal numbers. None where an operand has other values than finite ones of its format, where a scale
    is NaN, where float32 does not hold an operand times its scales, and of sums of sixteen."""
    if config.sums_sixteen or bool(scale_a.isnan().any() | scale_b.isnan().any()):
        return None
    every = zip(a, b, scale_a, scale_b, _power(scale_a), _power(scale_b), strict=True)
    made = []
    for x, y, s, t, *powers in every:
        found = _quick(x, y, s, t, powers, config)
        if found is None:
            return None
        made.append(found)
    return torch.stack(made)


def _quick(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, powers: list[Tensor], config: TensorCore) -> Any:
    """Of one pair of matrices."""
    assert config.block is not None
    for form, own in zip(config.formats, powers, strict=True):
        low, high = form.min_exponent - form.mantissa + int(own.min()), form.max_exponent + int(own.max())
        if low < FLOAT32_MIN or high > FLOAT32_MAX:
            return None
    x = a * each_scale(scale_a, config.block, a.shape[1], 1)
    y = b * each_scale(scale_b, config.block, b.shape[0], 0)
    result, faults = cpu.products(x, y, config, cpu.Scales(powers[0], powers[1], config.block))
    return None if faults else result


def _power(scale: Tensor) -> Tensor:
    """The exponents of powers of two, int32, in integers, which no processor flushes."""
    return (scale.contiguous().view(torch.int32) >> 23) - 127


def _prepared(x: Tensor, scale: Tensor, block: int, exponents: tuple[int, int], width: int) -> tuple[Tensor, Tensor]:
    """x [K, N] and its scales as tiles [T, K, width]: values with their scales, and exponents.

    ``exponents``: of the smallest normal numbers of x's format and of the scales'.
    """
    K, N = x.shape
    tiles = -(-N // width)
    values, powers = (
        torch.empty(tiles, K, width, dtype=torch.float64),
        torch.empty(tiles, K, width, dtype=torch.float32),
    )
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
    y, arrays = torch.empty(tiles, M, TILE, dtype=torch.float32), [array(t) for t in operands]
    numbers, result = (config.group, config.fraction, config.promotion or K), array(y)

    def run(first: int, last: int) -> None:
        kernel(*arrays, *numbers, result, first, last)  # type: ignore[operator]

    over_rows(run, tiles * M, K * TILE)
    return y.permute(1, 0, 2).reshape(M, tiles * TILE)[:, :N].contiguous()
