"""The narrow accumulator on the CPU: runs the kernels of `emit` over the thread pool.

Legend: B matrices of a batch, M rows, N columns, K terms.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.errors import RecoupError
from recoup.kernels.llvm import Target, host
from recoup.kernels.magnitudes import magnitudes
from recoup.kernels.threads import over_rows
from recoup.lba.config import LBA
from recoup.lba.driver import Columns, Index
from recoup.lba.emit import Form, Shape, build
from recoup.lba.plan import Extent, Plan

_target: ContextVar[Target | None] = ContextVar("recoup_lba_target", default=None)
MINIMUM_WORK = 1 << 18  # multiply-adds that pay for one more thread


@contextmanager
def target(level: str | None) -> Iterator[None]:
    """Emulate with the instructions of ``x86-64`` (SSE2), ``haswell`` (AVX2, FMA) or ``skylake-avx512``; None: all.

    The processor must have them. The bits are the same.
    """
    wanted = None if level is None else Target.named(level)
    if wanted is not None and not wanted.features <= host().features:
        missing = ", ".join(sorted(wanted.features - host().features))
        raise RecoupError(f"lba.cpu.target({level!r}): this processor lacks {missing}")
    token = _target.set(wanted)
    try:
        yield
    finally:
        _target.reset(token)


def current_target() -> Target:
    """The processor that kernels are built for."""
    return _target.get() or host()


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
        from recoup.lba.cpu_gradient import gradients

        return gradients(x, columns, grad, chosen, config, index)


def padded(columns: Columns, tile: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Columns up to a multiple of the tile's (the last repeated); which vectors of them lie side by side."""
    places = columns.columns.numpy()
    short = -len(places) % tile.columns
    places = np.concatenate([places, np.repeat(places[-1:], short)]) if short else places
    steps = np.diff(places.reshape(-1, tile.lanes), axis=1)
    return places, np.ascontiguousarray((steps == 1).all(1), dtype=np.uint8)


def shape(form: Form, target: Target) -> Shape:
    """Lanes, rows and vectors of a tile: what the registers hold."""
    if "avx512f" in target.features:
        return Shape(8, 4, 2) if form.wide else Shape(16, 8, 2)
    if "avx2" in target.features:
        return Shape(4, 2, 2) if form.wide else Shape(8, 3, 2)
    return Shape(2, 2, 2) if form.wide else Shape(4, 2, 2)


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


def fitted(whole: Shape, M: int, N: int) -> Shape:
    """A smaller tile where rows or columns are few."""
    tiles = -(-M // whole.rows)
    return Shape(whole.lanes, -(-M // tiles), 1 if whole.lanes >= N else whole.vectors)
