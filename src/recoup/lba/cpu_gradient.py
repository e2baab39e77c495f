"""Fine-grained gradients on the CPU: runs the kernels of `emit_gradient`.

The columns are divided among at most `GROUPS` partial sums of a's gradient, added in order, so that results do not
depend on the number of threads.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.lba.checks import check_finite
from recoup.lba.config import LBA
from recoup.lba.cpu import Columns, Index, current_target, fitted, matrix_columns, pad_image, pixels, scaled
from recoup.lba.cpu_plan import Extent, Plan, plan, shape
from recoup.lba.emit_gradient import build
from recoup.lba.geometry import Geometry
from recoup.threads import over_rows

GROUPS = 8
BLOCK_BYTES = 1 << 26  # of the columns' gradients
MINIMUM_WORK = 1 << 17


def gradients(a: Tensor, b: Tensor, grad: Tensor, config: LBA, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gradients of a [B, M, K] and b [B, K, N] for grad [B, M, N]; see `reference.gradients`."""
    B, M, K = a.shape
    N = b.shape[2]
    if 0 in (B, M, N, K):
        return torch.zeros_like(a), torch.zeros_like(b)
    chosen = _plan(a, b, config)
    columns = matrix_columns(b)
    grad_a, panels = _run(a, columns, grad, chosen, config, Index(seed, 0, M * N, N))
    return grad_a, panels[:, :, :N]


def convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, config: LBA, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, C, H, W] and weight [O, C / groups, kh, kw] for grad [N, O, h, w]."""
    N, outputs, G = x.shape[0], weight.shape[0], geometry.groups
    size = geometry.size(x)
    P, K = size[0] * size[1], weight[0].numel()
    grad_x, grad_w = torch.zeros_like(x), torch.zeros(G, outputs // G, K)
    if 0 in (grad.numel(), weight.numel()):
        return grad_x, grad_w.view(weight.shape)
    rows = weight.detach().reshape(G, outputs // G, K)
    chosen = _plan(weight, x, config)
    images = max(1, BLOCK_BYTES // (4 * G * K * P))
    for start in range(0, N, images):
        block = x[start : start + images]
        columns = pixels(pad_image(block, geometry), geometry, size)
        g = grad[start : start + images].reshape(len(block), G, outputs // G, P).permute(1, 2, 0, 3)
        index = Index(seed, start * P, outputs // G * N * P, N * P)
        part, panels = _run(rows, columns, g.reshape(G, outputs // G, -1), chosen, config, index)
        grad_w += part
        grad_x[start : start + images] = geometry.image(panels[:, :, : len(block) * P].contiguous(), block.shape)
    return grad_x, grad_w.view(weight.shape)


def _plan(a: Tensor, b: Tensor, config: LBA) -> Plan:
    reach = Extent.of(a), Extent.of(b)
    check_finite(a, b, (reach[0].finite, reach[1].finite), config.replace(nonfinite="error"))
    return plan(*reach, float("inf"), config, current_target())


def _run(x: Tensor, columns: Columns, grad: Tensor, chosen: Plan, config: LBA, index: Index) -> tuple[Tensor, Tensor]:
    """Over all matrices: x [B, M, K], grad [B, M, N] -> gradients [B, M, K] and [B, K, columns with padding]."""
    B, M, K = x.shape
    tile = fitted(shape(chosen.form, current_target()), M, grad.shape[2])
    native = build(
        chosen.form, tile, current_target(), config.gradient.endswith("_of"), config.gradient.startswith("recursive")
    )
    tiles = -(-M // tile.rows)
    places, straight = columns.padded(tile.lanes, tile.columns)
    width, panels = len(places), len(places) // tile.columns
    short = tiles * tile.rows - M
    rows, raw = (F.pad(t, [0, 0, 0, short]).contiguous() for t in (scaled(x, chosen), x.detach()))
    g = F.pad(grad.detach(), [0, width - grad.shape[2], 0, short]).contiguous()
    groups = min(GROUPS, panels)
    grad_a = torch.zeros(groups, B, tiles * tile.rows, K)
    grad_b = torch.zeros(B, panels, K, tile.columns)
    terms, chunk = np.ascontiguousarray(columns.terms), min(config.chunk or K, K)

    def work(first: int, last: int) -> None:
        panel = np.empty(K * tile.columns, np.float64 if chosen.form.wide else np.float32)
        panel_raw = np.empty(K * tile.columns, np.float32)
        words = np.empty((2 * K + -(-K // chunk)) * tile.rows * tile.vectors, np.int16)
        for task in range(first, last):
            group, batch = task // B, task % B
            row = batch * tiles * tile.rows
            native(
                panels * group // groups,
                panels * (group + 1) // groups,
                tiles,
                K,
                chunk,
                rows.data_ptr() + 4 * K * row,
                raw.data_ptr() + 4 * K * row,
                columns.source.data_ptr() + 4 * batch * columns.matrix,
                terms.ctypes.data,
                places.ctypes.data,
                straight.ctypes.data,
                2.0**chosen.b_scale,
                chosen.b_least_bits,
                g.data_ptr() + 4 * width * row,
                width,
                grad_a.data_ptr() + 4 * K * (group * B * tiles * tile.rows + row),
                grad_b.data_ptr() + 4 * batch * K * width,
                chosen.floats.ctypes.data,
                chosen.integers.ctypes.data,
                panel.ctypes.data,
                panel_raw.ctypes.data,
                words.ctypes.data,
                index.base,
                index.first + batch * index.matrix,
                index.row,
                1,
            )

    over_rows(work, groups * B, tiles * tile.rows * width * K // groups, MINIMUM_WORK)
    return grad_a.sum(0)[:, :M], grad_b.transpose(1, 2).reshape(B, K, width)
