"""The formats on the CPU: tensors to the kernels of cpu_kernels.py, equal to reference.py bit for bit."""

# ruff: noqa: A002 - format is the word of the contract and of the field

import math

import numpy as np
import torch
from torch import Tensor

from recoup.formats.constants import block_constants, float_constants, nearest_constants
from recoup.formats.cpu_kernels import (
    LANES,
    block_kernel,
    float_kernel,
    float_nearest_kernel,
    float_random_kernel,
    int_kernel,
)
from recoup.formats.spec import BlockFloat, Float, Int
from recoup.kernels.arrays import array
from recoup.kernels.threads import over_rows

__all__ = ["quantize"]

INTEGERS = {torch.float32: np.int32, torch.float64: np.int64}
SHORT = 16  # columns fewer than this do not fill a vector, so the block's dimension is moved to the front first


def quantize(x: Tensor, format: Float | Int | BlockFloat, random: Tensor | None = None) -> Tensor:
    """``x`` in ``format``: what `reference.quantize` defines, with x's strides where x is dense.

    Args:
        x: float32 or float64 on the CPU; its dtype holds the format (see `constants.kernel_dtype`).
        format: the format.
        random: for stochastic rounding, random integers of x's shape as reference.py describes them.
    """
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    if isinstance(format, BlockFloat):
        _quantize_blocks(x, y, format, random)
        return y
    if x.stride() != y.stride():
        x = torch.empty_like(x).copy_(x)
    source, result = _flat(x), _flat(y)
    if isinstance(format, Int):
        limits = (format.smallest_value, format.largest_value, 2.0**format.bits)
        wrap = format.overflow == "wrap"
        over_rows(lambda first, last: int_kernel(source, result, first, last, limits, wrap), source.size, 1)
        return y
    integer = INTEGERS[x.dtype]
    source, result = source.view(integer), result.view(integer)
    nearest = nearest_constants(format, x.dtype)
    constants = tuple(nearest or float_constants(format, x.dtype))  # numba takes plain tuples fastest
    if random is None:
        kernel = float_nearest_kernel if nearest else float_kernel
        over_rows(lambda first, last: kernel(source, result, first, last, constants), source.size, 1)
        return y
    if random.stride() != x.stride():
        random = torch.empty_like(x, dtype=random.dtype).copy_(random)
    chance = _flat(random)
    over_rows(lambda first, last: float_random_kernel(source, result, first, last, constants, chance), source.size, 1)
    return y


def _quantize_blocks(x: Tensor, y: Tensor, format: BlockFloat, random: Tensor | None) -> None:
    """Into ``y``; blocks become columns of a contiguous (outer, channels, inner) array."""
    dim = format.dim % x.dim()
    front = dim if math.prod(x.shape[dim + 1 :]) >= SHORT else 0
    columns = x.movedim(dim, front).contiguous()
    channels, inner = columns.shape[front], math.prod(columns.shape[front + 1 :])
    rounded = torch.empty_like(columns)
    integer = INTEGERS[x.dtype]
    source, result, chance = _flat(columns).view(integer), _flat(rounded).view(integer), np.empty(0, integer)
    if random is not None:
        chance = _flat(random.movedim(dim, front).contiguous())
    blocks, tiles = -(-channels // format.block), -(-inner // LANES)
    shape, constants = (channels, inner, format.block, blocks, tiles), tuple(block_constants(format, x.dtype))
    rows = x.numel() // (channels * inner) * blocks * tiles
    over_rows(
        lambda first, last: block_kernel(source, result, first, last, shape, constants, chance),
        rows,
        min(format.block, channels) * min(inner, LANES),
    )
    y.movedim(dim, front).copy_(rounded)


def _flat(x: Tensor) -> np.ndarray:
    """The memory of a dense tensor, in order."""
    flat = x if x.is_contiguous() else x.as_strided((x.numel(),), (1,))
    return array(flat).reshape(-1)
