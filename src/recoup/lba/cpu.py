"""The narrow accumulator on the CPU: runs the kernels of `emit` over the thread pool.

Legend: B matrices of a batch, M rows, N columns, K terms.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.kernels.magnitudes import magnitudes
from recoup.kernels.memory import address
from recoup.kernels.threads import over_rows
from recoup.lba.config import LBA
from recoup.lba.cpu_gradient import gradients
from recoup.lba.driver import Columns, Index
from recoup.lba.emit import build
from recoup.lba.plan import Extent, Plan
from recoup.lba.tiles import FLOAT32, current_target, fitted, padded, shape, shared_arguments, target

__all__ = ["Cpu", "target"]

MINIMUM_WORK = 1 << 18  # multiply-adds that pay for one more thread


class Cpu:
    """The processor, as `driver` speaks to it."""

    lanes = 16

    @property
    def fma(self) -> bool:
        """Whether the instructions that kernels are built for have it."""
        return current_target().fma

    def extent(self, x: Tensor) -> Extent:
        """In one pass over the numbers' bits."""
        return Extent.of(*magnitudes(x))

    def product(self, x: Tensor, columns: Columns, chosen: Plan, config: LBA, index: Index) -> Tensor:
        """See `driver.Machine`."""
        return _product(x, columns, chosen, config, index)

    def gradients(
        self, x: Tensor, columns: Columns, grad: Tensor, chosen: Plan, config: LBA, index: Index
    ) -> tuple[Tensor, Tensor]:
        """See `driver.Machine`."""
        return gradients(x, columns, grad, chosen, config, index)


def _product(x: Tensor, columns: Columns, chosen: Plan, config: LBA, index: Index) -> Tensor:
    """The kernel over all matrices: x [B, M, K] scaled -> [B, M, N] in the kernel's element type and scale."""
    B, M, K = x.shape
    processor = current_target()
    tile = fitted(shape(chosen.form, processor), M, len(columns.columns))
    tiles = -(-M // tile.rows)
    rows = F.pad(x, [0, 0, 0, tiles * tile.rows - M]) if M % tile.rows else x
    places, straight = padded(columns, tile)
    width, panels = len(places), len(places) // tile.columns
    y = torch.empty(B, tiles * tile.rows, width, dtype=torch.float64 if chosen.form.wide else torch.float32)
    scratch_type = np.float64 if chosen.form.wide else np.float32
    kernel = build(chosen.form, tile, processor).bind(
        K=K,
        chunk=min(config.chunk or K, K),
        a_stride=K,
        c_stride=width,
        **shared_arguments(columns, places, straight, chosen, index),
    )

    def call(batch: int, panel: tuple[int, int], row_tile: tuple[int, int], scratch: np.ndarray) -> None:
        row = row_tile[0] * tile.rows
        place = batch * tiles * tile.rows + row
        kernel(
            first=panel[0],
            last=panel[1],
            tiles=row_tile[1] - row_tile[0],
            a=rows.data_ptr() + FLOAT32 * K * place,
            b=columns.source.data_ptr() + FLOAT32 * columns.matrix * batch,
            c=y.data_ptr() + y.element_size() * width * place,
            panel=address(scratch),
            index=index.first + batch * index.matrix + row * index.row,
        )

    def over_panels(first: int, last: int) -> None:
        scratch = np.empty(K * tile.columns, scratch_type)
        for batch in range(first // panels, (last - 1) // panels + 1):
            begin, end = max(first - batch * panels, 0), min(last - batch * panels, panels)
            call(batch, (begin, end), (0, tiles), scratch)

    def over_tiles(first: int, last: int) -> None:
        scratch = np.empty(K * tile.columns, scratch_type)
        for batch in range(B):
            call(batch, (0, panels), (first, last), scratch)

    work = tile.rows * tile.columns * K
    if B * panels < 2 * torch.get_num_threads() and tiles > B * panels:
        over_rows(over_tiles, tiles, work * B * panels, MINIMUM_WORK)
    else:
        over_rows(over_panels, B * panels, work * tiles, MINIMUM_WORK)
    return y[:, :M, : len(columns.columns)]
