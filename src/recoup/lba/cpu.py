"""The narrow accumulator on the CPU: runs the kernels of `emit` over the thread pool.

Legend: B matrices of a batch, M rows, N columns, K terms.
"""

import numpy as np
import torch
from torch import Tensor

from recoup.kernels.magnitudes import magnitudes
from recoup.kernels.memory import address
from recoup.kernels.threads import over_rows
from recoup.lba import cpu_sparse as sparse
from recoup.lba.config import LBA
from recoup.lba.cpu_gradient import gradients
from recoup.lba.driver import MINIMUM_WORK, Columns, Index, finished
from recoup.lba.emit import build, row_scratch
from recoup.lba.plan import Extent, Plan
from recoup.lba.tiles import FLOAT32, current_target, fitted, padded, shape, shared_arguments, target

__all__ = ["Cpu", "target"]


class Cpu:
    """The processor, as `driver` speaks to it."""

    resident = 1 << 21  # a part of the cache that cores share; half as much is slower, for every block costs a call

    @property
    def fma(self) -> bool:
        """Whether the instructions that kernels are built for have it."""
        return current_target().fma

    def extent(self, x: Tensor) -> Extent:
        """In one pass over the numbers' bits."""
        return Extent.of(*magnitudes(x))

    def product(
        self, x: Tensor, columns: Columns, chosen: Plan, config: LBA, index: Index, images: Tensor | None = None
    ) -> Tensor | None:
        """See `driver.Machine`."""
        if sparse.pays(x, columns, chosen, config):
            y = sparse.product(x[0], columns, chosen, config, index, images)
            return None if y is None else y[None]
        return _product(x, columns, chosen, config, index)

    def gradients(
        self, x: Tensor, columns: Columns, grad: Tensor, chosen: Plan, config: LBA, index: Index
    ) -> tuple[Tensor, Tensor]:
        """See `driver.Machine`."""
        return gradients(x, columns, grad, chosen, config, index)


def _product(x: Tensor, columns: Columns, chosen: Plan, config: LBA, index: Index) -> Tensor:
    """The kernel over all matrices: x [B, M, K] -> float32 [B, M, N]."""
    x = x.contiguous()
    B, M, K = x.shape
    N, processor = len(columns.columns), current_target()
    tile = fitted(shape(chosen.form, processor), M, N)
    tiles = -(-M // tile.rows)
    places, straight = padded(columns, tile)
    width, panels = len(places), len(places) // tile.columns
    y = torch.empty(B, tiles * tile.rows, width, dtype=torch.float64 if chosen.form.wide else torch.float32)
    kernel = build(chosen.form, tile, processor).bind(
        K=K,
        chunk=min(config.chunk or K, K),
        a_stride=K,
        a_scale=2.0**chosen.a_scale,
        c_stride=width,
        unscale=2.0**chosen.unscale if chosen.finished else 1.0,
        **shared_arguments(columns, places, straight, chosen, index),
    )
    first_x, first_y, first_b, element = x.data_ptr(), y.data_ptr(), columns.source.data_ptr(), y.element_size()

    def run(batches: range, panel: tuple[int, int], row_tile: tuple[int, int]) -> None:
        """Some tiles of some panels of matrices: ``panel`` counts through all of them."""
        scratch = np.empty(K * tile.columns, np.float64 if chosen.form.wide else np.float32)
        a_tile = np.empty(row_scratch(tile, K), np.float32)
        row = row_tile[0] * tile.rows
        for batch in batches:
            kernel(
                first=max(panel[0] - batch * panels, 0),
                last=min(panel[1] - batch * panels, panels),
                tiles=row_tile[1] - row_tile[0],
                a=first_x + FLOAT32 * K * (batch * M + row),
                a_rows=M - row,
                a_tile=address(a_tile),
                b=first_b + FLOAT32 * columns.matrix * batch,
                c=first_y + element * width * (batch * tiles * tile.rows + row),
                panel=address(scratch),
                index=index.first + batch * index.matrix + row * index.row,
            )

    def over_panels(first: int, last: int) -> None:
        run(range(first // panels, (last - 1) // panels + 1), (first, last), (0, tiles))

    def over_tiles(first: int, last: int) -> None:
        run(range(B), (0, B * panels), (first, last))

    work = tile.rows * tile.columns * K
    if B * panels < 2 * torch.get_num_threads() and tiles > B * panels:
        over_rows(over_tiles, tiles, work * B * panels, MINIMUM_WORK)
    else:
        over_rows(over_panels, B * panels, work * tiles, MINIMUM_WORK)
    y = y if y.shape == (B, M, N) else y[:, :M, :N]
    return y.contiguous() if chosen.finished else finished(y, chosen)
