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


def product(x: Tensor, columns: Columns, chosen: Plan, config: LBA, index: Index) -> Tensor:
    """x [M, K] times the columns: float32 [M, N], `driver.finished`."""
    (M, K), N = x.shape, len(columns.columns)
    assert isinstance(chosen.form, Narrow)  # as `takes` says
    vectors = _vectors(M)
    rows = vectors * LANES
    blocks = -(-M // rows)
    places, straight = padded(columns, SHAPE)
    weights_KM = F.pad((x * 2.0**chosen.a_scale).t(), [0, blocks * rows - M, 0, 1]).contiguous()
    y = torch.empty(blocks * rows, len(places), dtype=torch.float32)
    shared = shared_arguments(columns, places, straight, chosen, index)
    kernel = build(chosen.form, vectors, current_target()).bind(
        blocks=blocks,
        K=K,
        chunk=min(config.chunk or K, K),
        weights=weights_KM.data_ptr(),
        c=y.data_ptr(),
        c_stride=len(places),
        unscale=2.0**chosen.unscale if chosen.finished else 1.0,
        b=columns.source.data_ptr(),
        **{name: value for name, value in shared.items() if name not in ("seed_base", "index_row", "index_column")},
    )
    room = scratch(K, vectors)

    def run(first: int, last: int) -> None:
        arrays = {name: np.zeros(size, np.uint8) for name, size in room.items()}
        kernel(first=first, last=last, **{name: address(array) for name, array in arrays.items()})

    over_rows(run, len(places) // LANES, M * LANES * K, MINIMUM_WORK)
    y = y if y.shape == (M, N) else y[:M, :N].contiguous()
    return y if chosen.finished else finished(y, chosen)
