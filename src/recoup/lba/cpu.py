"""The narrow accumulator on the CPU: runs the kernels of `emit` over the thread pool.

Legend: B matrices of a batch, M rows, N columns, K terms.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.kernels.magnitudes import magnitudes
from recoup.kernels.threads import over_rows
from recoup.lba.config import LBA
from recoup.lba.cpu_gradient import gradients
from recoup.lba.driver import Columns, Index
from recoup.lba.emit import build
from recoup.lba.plan import Extent, Plan
from recoup.lba.tiles import current_target, fitted, padded, shape, target

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
    N = len(columns.columns)
    tile = fitted(shape(chosen.form, current_target()), M, N)
    native = build(chosen.form, tile, current_target())
    tiles = -(-M // tile.rows)
    places, straight = padded(columns, tile)
    panels = len(places) // tile.columns
    rows = F.pad(x, [0, 0, 0, tiles * tile.rows - M]) if M % tile.rows else x
    y = torch.empty(B, tiles * tile.rows, len(places), dtype=torch.float64 if chosen.form.wide else torch.float32)
    terms, scratch_type = columns.terms.numpy(), np.float64 if chosen.form.wide else np.float32
    chunk = min(config.chunk or K, K)
    size = y.element_size()

    def call(batch: int, panel: tuple[int, int], row_tile: tuple[int, int], scratch: np.ndarray) -> None:
        row = row_tile[0] * tile.rows
        native(
            *panel,
            row_tile[1] - row_tile[0],
            K,
            chunk,
            rows.data_ptr() + 4 * K * (batch * tiles * tile.rows + row),
            K,
            columns.source.data_ptr() + 4 * batch * columns.matrix,
            terms.ctypes.data,
            places.ctypes.data,
            straight.ctypes.data,
            2.0**chosen.b_scale,
            chosen.b_least_bits,
            y.data_ptr() + size * len(places) * (batch * tiles * tile.rows + row),
            len(places),
            chosen.floats.ctypes.data,
            chosen.integers.ctypes.data,
            scratch.ctypes.data,
            index.base,
            index.first + batch * index.matrix + row * index.row,
            index.row,
            1,
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
    return y[:, :M, :N]
