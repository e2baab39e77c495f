"""The smallest products on the CPU, whose arithmetic takes less time than Python's to find out how to do it.

What does not depend on where the operands lie is found once for every unit, shape and exponents of the operands, and
kept: plan, kernel and all arguments but the addresses. What it gives are the bits of `driver.matmul`.

Legend: M rows, N columns, K terms.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from recoup.formats import Int
from recoup.kernels.llvm import Target
from recoup.kernels.magnitudes import both
from recoup.kernels.memory import address
from recoup.lba.config import LBA
from recoup.lba.driver import MINIMUM_WORK, Columns, Index, finished, turned
from recoup.lba.emit import build, row_scratch
from recoup.lba.plan import FRACTION, HIGH, Extent, plan
from recoup.lba.tiles import FLOAT32, current_target, fitted, padded, shape, shared_arguments

MOST = 2 * MINIMUM_WORK  # multiply-adds: more of them pay for threads
NOT_FINITE = 255  # the exponent field of infinities and NaN

Run = Callable[[Tensor, Tensor], Tensor]


def matmul(a: Tensor, b: Tensor, code: str) -> Tensor | None:
    """Float32 a [M, K] b [K, N] on the unit of a ``code``; None: not so small, not finite, or not so simple."""
    (M, K), N, strides = a.shape, b.shape[1], b.stride()
    if not 0 < M * K * N <= MOST or a.stride() != (K, 1) or strides not in ((N, 1), (1, K)):
        return None
    a_high, a_low, b_high, b_low = both(a, b)
    reach = a_high >> FRACTION, a_low >> FRACTION, b_high >> FRACTION, b_low >> FRACTION
    run = _run(code, (M, K, N), strides, reach, current_target())
    return None if run is None else run(a, b)


@lru_cache(maxsize=512)
def _run(
    code: str, size: tuple[int, int, int], strides: tuple[int, int], fields: tuple[int, int, int, int], target: Target
) -> Run | None:
    """What computes products of these operands; None: nothing here.

    Exponents bound the operands less closely than their largest values do, so a limit may be there for nothing.
    """
    config, (M, K, N) = LBA.from_code(code), size
    simple = not isinstance(config.accumulator, Int) and not config.stochastic
    if not simple or 0 in fields or NOT_FINITE in fields or turned((M, N), strides[0] == 1):
        return None
    a_high, a_low, b_high, b_low = (field - HIGH for field in fields)
    reach = Extent(2.0 ** (a_high + 1), a_high, a_low), Extent(2.0 ** (b_high + 1), b_high, b_low)
    chunk = min(config.chunk or K, K)
    chosen = plan(*reach, chunk * reach[0].largest * reach[1].largest, config, target.fma)
    tile = fitted(shape(chosen.form, target), M, N)
    columns = Columns(
        torch.empty(0, dtype=torch.float32), torch.arange(K) * strides[0], torch.arange(N) * strides[1], 0
    )
    places, straight = padded(columns, tile)
    tiles, width = -(-M // tile.rows), len(places)
    kernel = build(chosen.form, tile, target).prepare(
        first=0,
        last=width // tile.columns,
        tiles=tiles,
        K=K,
        chunk=chunk,
        a_stride=K,
        a_rows=M,
        a_scale=2.0**chosen.a_scale,
        c_stride=width,
        unscale=2.0**chosen.unscale if chosen.finished else 1.0,
        index=0,
        **shared_arguments(columns, places, straight, chosen, Index(0, 0, 0, 0)),
    )
    pointed_to = columns, places, straight, chosen
    panel, rows = K * tile.columns * (2 if chosen.form.wide else 1), row_scratch(tile, K)
    dtype, whole = torch.float64 if chosen.form.wide else torch.float32, tiles * tile.rows == M and width == N

    def run(a: Tensor, b: Tensor) -> Tensor:
        y = torch.empty(tiles * tile.rows, width, dtype=dtype)
        scratch = np.empty(panel + rows, np.float32)
        at = address(scratch)
        kernel(a.data_ptr(), b.data_ptr(), y.data_ptr(), at + FLOAT32 * panel, at)
        y = y if whole else y[:M, :N]
        return y.contiguous() if chosen.finished else finished(y, chosen)

    run.pointed_to = pointed_to  # type: ignore[attr-defined]
    return run
