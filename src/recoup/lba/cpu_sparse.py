"""Products whose columns hold many zeros: runs the kernels of `emit_sparse` over the thread pool.

Legend: M rows, N columns, K terms.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.kernels.memory import address
from recoup.kernels.threads import over_rows
from recoup.lba.config import LBA
from recoup.lba.driver import MINIMUM_WORK, Columns, Index, finished
from recoup.lba.emit_narrow import Narrow
from recoup.lba.emit_sparse import LANES, SHAPE, build, scratch, takes
from recoup.lba.plan import Plan
from recoup.lba.tiles import current_target, padded, shared_arguments

SAMPLE = 1 << 16
"""Elements whose zeros are counted, roughly: what they say decides the speed alone."""

VECTORS = 4
"""The most vectors of a block, which share a column's words."""

FILLED = {1: 0.7, 2: 0.8, 3: 0.75, 4: 0.8}
"""The fraction of elements that are not zero up to which this pays, by vectors of a block."""


def pays(x: Tensor, columns: Columns, chosen: Plan, config: LBA) -> bool:
    """Whether `product` does x [B, M, K] times the columns, and is the faster way."""
    B, M, K = x.shape
    if B != 1 or M == 0 or not takes(chosen.form, current_target(), K, min(config.chunk or K, K)):
        return False
    lanes = -(-M // LANES) * LANES
    if lanes * 3 // 4 > M or len(columns.columns) < 2 * LANES * torch.get_num_threads():
        return False
    few = _few(columns.source)
    return int(few.count_nonzero()) <= FILLED[_vectors(M)] * few.numel()


def _few(source: Tensor) -> Tensor:
    """Some images or matrices; of a large one every so many channels or rows."""
    few = source[: max(1, SAMPLE // max(1, source[0].numel()))]
    return few[:, :: -(-few.numel() // SAMPLE)] if few.numel() > SAMPLE else few


def _vectors(M: int) -> int:
    """Of a block: as few blocks as can be, of rows as equal as can be."""
    vectors = -(-M // LANES)
    return -(-vectors // -(-vectors // VECTORS))


def product(
    x: Tensor, columns: Columns, chosen: Plan, config: LBA, index: Index, images: Tensor | None = None
) -> Tensor | None:
    """x [M, K] times the columns: float32 [M, N], `driver.finished`; None: they are in the images (`driver.Machine`),
    whose rows and pixels must fill the kernel's blocks and panels."""
    (M, K), N = x.shape, len(columns.columns)
    assert isinstance(chosen.form, Narrow)  # as `takes` says
    vectors = _vectors(M)
    rows = vectors * LANES
    blocks = -(-M // rows)
    places, straight = padded(columns, SHAPE)
    weights_KM = F.pad((x * 2.0**chosen.a_scale).t(), [0, blocks * rows - M, 0, 1]).contiguous()
    y, lies = _room(blocks * rows, len(places), images if blocks * rows == M and chosen.finished else None)
    shared = shared_arguments(columns, places, straight, chosen, index)
    kernel = build(chosen.form, vectors, current_target()).bind(
        blocks=blocks,
        K=K,
        chunk=min(config.chunk or K, K),
        weights=weights_KM.data_ptr(),
        c=y.data_ptr(),
        **lies,
        unscale=2.0**chosen.unscale if chosen.finished else 1.0,
        b=columns.source.data_ptr(),
        **{name: value for name, value in shared.items() if name not in ("seed_base", "index_row", "index_column")},
    )
    room = scratch(K, vectors)

    def run(first: int, last: int) -> None:
        arrays = {name: np.zeros(size, np.uint8) for name, size in room.items()}
        kernel(first=first, last=last, **{name: address(array) for name, array in arrays.items()})

    over_rows(run, len(places) // LANES, M * LANES * K, MINIMUM_WORK)
    if y is images:
        return None
    y = y if y.shape == (M, N) else y[:M, :N].contiguous()
    return y if chosen.finished else finished(y, chosen)


def _room(rows: int, columns: int, images: Tensor | None) -> tuple[Tensor, dict[str, int]]:
    """Where the sums go, and how they lie there: in the images [N, M, ...], where a panel is one image's."""
    pixels = 0 if images is None else images[0, 0].numel()
    if images is None or not pixels or pixels % LANES or not images.is_contiguous():
        return torch.empty(rows, columns, dtype=torch.float32), {
            "c_stride": columns,
            "c_columns": columns,
            "c_image": 0,
        }
    return images, {"c_stride": pixels, "c_columns": pixels, "c_image": rows * pixels}
