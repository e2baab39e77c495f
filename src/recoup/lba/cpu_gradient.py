"""Fine-grained gradients on the CPU: runs the kernels of `emit_gradient`.

The columns are divided among at most `GROUPS` partial sums of a's gradient (fewer where that is large), added in
order, so that results do not depend on the number of threads.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.kernels.memory import address
from recoup.kernels.threads import over_rows
from recoup.lba.config import LBA
from recoup.lba.driver import Columns, Index, scaled
from recoup.lba.emit_gradient import build
from recoup.lba.plan import Plan
from recoup.lba.tiles import FLOAT32, current_target, fitted, padded, shape, shared_arguments

GROUPS = 8
PARTIAL_BYTES = 1 << 28  # of all partial sums together
MINIMUM_WORK = 1 << 17  # multiply-adds, each with its share of both gradients, that pay for one more thread


def groups(B: int, M: int, K: int, panels: int) -> int:
    """How many partial sums of [B, M, K] there are; large ones two at least, so that two threads have work."""
    return min(GROUPS, panels, max(2, PARTIAL_BYTES // (4 * B * M * K)))


def gradients(
    x: Tensor, columns: Columns, grad: Tensor, chosen: Plan, config: LBA, index: Index
) -> tuple[Tensor, Tensor]:
    """x [B, M, K] and grad [B, M, N] -> gradients [B, M, K] and [B, K, N]; see `reference.gradients`."""
    B, M, K = x.shape
    N, processor = grad.shape[2], current_target()
    tile = fitted(shape(chosen.form, processor), M, N)
    tiles = -(-M // tile.rows)
    places, straight = padded(columns, tile)
    width, panels = len(places), len(places) // tile.columns
    short = tiles * tile.rows - M
    rows, raw = (F.pad(t, [0, 0, 0, short]).contiguous() for t in (scaled(x, chosen), x))
    g = F.pad(grad, [0, width - N, 0, short]).contiguous()
    parts = groups(B, tiles * tile.rows, K, panels)
    grad_a = torch.zeros(parts, B, tiles * tile.rows, K, dtype=torch.float32)
    grad_b = torch.zeros(B, panels, K, tile.columns, dtype=torch.float32)
    overflow, recursive = config.gradient.endswith("_of"), config.gradient.startswith("recursive")
    chunk = min(config.chunk or K, K)
    kernel = build(chosen.form, tile, processor, overflow, recursive).bind(
        tiles=tiles,
        K=K,
        chunk=chunk,
        g_stride=width,
        **shared_arguments(columns, places, straight, chosen, index),
    )

    def work(first: int, last: int) -> None:
        panel = np.empty(K * tile.columns, np.float64 if chosen.form.wide else np.float32)
        panel_raw = np.empty(K * tile.columns, np.float32)
        words = np.empty((2 * K + -(-K // chunk)) * tile.rows * tile.vectors, np.int16)
        for task in range(first, last):
            group, batch = task // B, task % B
            row = batch * tiles * tile.rows
            kernel(
                first=panels * group // parts,
                last=panels * (group + 1) // parts,
                a=rows.data_ptr() + FLOAT32 * K * row,
                a_raw=raw.data_ptr() + FLOAT32 * K * row,
                b=columns.source.data_ptr() + FLOAT32 * columns.matrix * batch,
                g=g.data_ptr() + FLOAT32 * width * row,
                grad_a=grad_a.data_ptr() + FLOAT32 * K * (group * B * tiles * tile.rows + row),
                grad_b=grad_b.data_ptr() + FLOAT32 * K * width * batch,
                panel=address(panel),
                panel_raw=address(panel_raw),
                words=address(words),
                index=index.first + batch * index.matrix,
            )

    over_rows(work, parts * B, tiles * tile.rows * width * K // parts, MINIMUM_WORK)
    return grad_a.sum(0)[:, :M], grad_b.transpose(1, 2).reshape(B, K, width)[:, :, :N]
