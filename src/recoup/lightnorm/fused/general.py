"""LightNorm's fused passes for every format, by numba; they hold for all but NaN and infinite inputs.

Legend: x [N, C, P]; K chunks.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from recoup.kernels.arrays import array
from recoup.kernels.threads import over_rows
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.cpu import INTEGERS
from recoup.lightnorm.cpu_kernels import LANES
from recoup.lightnorm.cpu_rounding import rounding_of
from recoup.lightnorm.fused.general_kernels import gradient_pass, moments_pass, normalize_pass, products_pass
from recoup.lightnorm.fused.sequence import Doubles, FusedPasses, Indices
from recoup.lightnorm.fused.tile_format import tile_format
from recoup.lightnorm.tiling import Limits, Tiling, tiling

# A tile and its scratch are 16 KiB each of float32: together a first-level cache.
LIMITS = Limits(elements=4096, shortest=64, longest=4096, lanes=LANES)


class GeneralPasses(FusedPasses):
    """The passes by numba; ``forward`` and ``backward`` formats for ordinary factors, and for any."""

    def __init__(self, config: LightNorm, chunks: int, dtype: torch.dtype, tiling: Tiling) -> None:
        super().__init__(config, chunks, dtype, tiling)
        self.pieces = tuple(tiling)
        fore = tile_format(config.forward, config.forward_blocks, dtype)
        back = tile_format(config.backward, config.backward_blocks, dtype)
        self.fore = fore.for_any_factors().numbers(), fore.numbers()
        self.difference = tuple(rounding_of(config.difference))
        self.back = back.for_any_factors().numbers(), back.numbers()

    def moments(self, x: Tensor, sums: Doubles, ends: Doubles, indices: Indices) -> bool:
        keys, unfit, numbers = _bits(x), np.zeros(1, np.int64), self.fore[True]
        out = sums, ends, indices
        over_rows(lambda a, b: moments_pass(keys, a, b, self.pieces, numbers, *out, unfit), *self.tiling.of_panels)
        return not unfit[0]

    def normalize(self, x: Tensor, y: Tensor, xhat: Tensor, factors: Doubles, ordinary: bool) -> bool:
        arrays, unfit, numbers = (
            (_bits(x), array(xhat).reshape(-1), _bits(y)),
            np.zeros(1, np.int64),
            self.fore[ordinary],
        )
        over_rows(
            lambda a, b: normalize_pass(*arrays, a, b, self.pieces, numbers, self.difference, factors, unfit),
            *self.tiling.of_blocks,
        )
        return not unfit[0]

    def products(self, grad: Tensor, xhat: Tensor, plain: Doubles, cross: Doubles) -> bool:
        arrays, unfit, numbers = (_bits(grad), _bits(xhat)), np.zeros(1, np.int64), self.back[True]
        out = plain, cross
        over_rows(lambda a, b: products_pass(*arrays, a, b, self.pieces, numbers, *out, unfit), *self.tiling.of_panels)
        return not unfit[0]

    def gradient(
        self, grad: Tensor, dx: Tensor, factors: Doubles, amounts: Doubles, indices: Tensor, ordinary: bool
    ) -> bool:
        arrays, unfit, numbers = (_bits(grad), _bits(dx)), np.zeros(1, np.int64), self.back[ordinary]
        vectors = factors, amounts, array(indices)
        over_rows(
            lambda a, b: gradient_pass(*arrays, a, b, self.pieces, numbers, *vectors, unfit), *self.tiling.of_blocks
        )
        return not unfit[0]


@lru_cache(maxsize=256)
def general_passes(config: LightNorm, chunks: int, dtype: torch.dtype, N: int, C: int, P: int) -> GeneralPasses:
    """The passes for a shape; ``chunks`` 0 where there are no batch statistics."""
    return GeneralPasses(config, chunks, dtype, tiling(N, C, P, chunks, config.block, LIMITS))


def _bits(x: Tensor) -> np.ndarray:
    return array(x).reshape(-1).view(INTEGERS[x.dtype])
