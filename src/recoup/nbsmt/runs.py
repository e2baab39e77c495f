"""Sums in a register that saturates, run by run, where slots hold one unsigned product: see `recoup.nbsmt.emit_runs`.

One thread of the multiplier has a slot for each product, and adding slot by slot leaves three quarters of the
instruction that multiplies four bytes unused. Products of one sign in a row share it. Besides, before the sum can
have left the register whatever the values are, signs do not matter.

Legend: O output channels, K = C L slots' taps in their order (C channels, L taps), B blocks of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from recoup.kernels.llvm import Target
from recoup.kernels.threads import over_rows
from recoup.nbsmt import emit_runs
from recoup.nbsmt.emit_runs import EVERY, LANES, VECTOR, WINDOW
from recoup.nbsmt.emit_saturating import started
from recoup.nbsmt.ports import UNSIGNED, reach

GROUPS = 8
"""The most groups of pixels of a tile: more would cut the slots into smaller blocks."""

BLOCK = 24 << 10
"""Bytes of windows that stay in a first-level cache while all output channels pass."""

PIXELS, OUTPUTS = 4 * LANES, 2 * LANES
"""Output pixels, and output channels, from which this pays: lanes are filled, and what is laid out is used often."""

WORK = 1 << 16
"""Products that pay for one more thread."""

AT_ONCE = 1 << 20
"""Weights that are cut at once: each takes some 100 bytes while they are."""

NEEDED = frozenset({"avx512vnni", "avx512bw"})
"""What a processor must have."""


class Steps(NamedTuple):
    """What every output channel adds, block after block.

    Attributes:
        steps: int32 [steps, 2]: the first byte of a window in a block of tiles of one group, and four weights.
        ends: int64 [B, O + 1], where an output channel's steps of a block begin, and where they end.
        size: slots of a block, the last of which may have fewer.
    """

    steps: Tensor
    ends: Tensor
    size: int


def steps(w_OK: Tensor, highest: int, size: int) -> Steps:
    """Cut the products of every output channel into runs of one sign that fit a window.

    Args:
        w_OK: int8.
        highest: of the register.
        size: slots of a block, a multiple of `EVERY`.
    """
    parts = [_steps(rows, highest, size) for rows in w_OK.split(max(1, AT_ONCE // max(1, w_OK.shape[1])))]
    each_BO = torch.cat([ends.diff(dim=1) for _, ends in parts], 1)
    ends = torch.zeros(len(each_BO), each_BO.shape[1] + 1, dtype=torch.int64)
    ends[:, 1:] = each_BO.flatten().cumsum(0).view_as(each_BO)
    ends[1:, 0] = ends[:-1, -1]
    blocks = range(len(ends))
    own = [found[last[block, 0] : last[block, -1]] for block in blocks for found, last in parts]
    return Steps(torch.cat(own), ends, size)


def _steps(w_OK: Tensor, highest: int, size: int) -> tuple[Tensor, Tensor]:
    """The same of some output channels: steps, and ends."""
    outputs, slots = w_OK.shape
    blocks = max(1, -(-slots // size))
    w_OBk = torch.nn.functional.pad(w_OK, (0, blocks * size - slots)).to(torch.int32).unflatten(1, (blocks, size))
    reached = w_OBk.abs().flatten(1).cumsum(1).view_as(w_OBk) * reach(UNSIGNED)
    sign_kOB = (w_OBk.sign() * (reached > highest)).permute(2, 0, 1)  # 0: the sum cannot have left the register
    present_kOB = (w_OBk != 0).permute(2, 0, 1)
    window, sign = (torch.zeros(outputs, blocks, dtype=torch.int32) for _ in range(2))
    window -= WINDOW
    new_kOB = torch.empty(size, outputs, blocks, dtype=torch.bool)
    window_kOB = torch.empty(size, outputs, blocks, dtype=torch.int32)
    for k in range(size):
        present, own = present_kOB[k], sign_kOB[k]
        new = present & ((k - window >= WINDOW) | (sign * own < 0))
        window = torch.where(new, k - k % EVERY, window)
        sign = torch.where(new, own, torch.where(present & (own != 0), own, sign))
        new_kOB[k], window_kOB[k] = new, window
    new_BOk, window_BOk, w_BOk = new_kOB.permute(2, 1, 0), window_kOB.permute(2, 1, 0), w_OBk.transpose(0, 1)
    number = new_BOk.flatten().cumsum(0).view_as(new_BOk)
    count = int(number.flatten()[-1]) if number.numel() else 0
    weights = torch.zeros(count + 1, dtype=torch.int64)  # what comes before the first step, zeros, is counted at 0
    shift = 8 * (torch.arange(size) - window_BOk).clamp(0, WINDOW - 1)
    weights.index_add_(0, number.flatten(), ((w_BOk & 255).to(torch.int64) << shift).flatten())
    found = torch.empty(count, 2, dtype=torch.int32)
    found[:, 0] = window_BOk[new_BOk] // EVERY * VECTOR
    found[:, 1] = (weights[1:] + (1 << 31)).remainder(1 << 32) - (1 << 31)
    each_BO = new_BOk.sum(2)
    ends = torch.zeros(blocks, outputs + 1, dtype=torch.int64)
    ends[:, 1:] = each_BO.flatten().cumsum(0).view(blocks, outputs)
    ends[1:, 0] = ends[:-1, -1]
    return found, ends


def fits(w_OSLV: Tensor, groups: int, zero: int, pixels: int, target: Target) -> bool:
    """Whether a convolution is computed so: one unsigned product a slot, output channels and pixels that pay."""
    return zero == UNSIGNED and single(w_OSLV, groups, pixels, target)


def single(w_OSLV: Tensor, groups: int, pixels: int, target: Target) -> bool:
    """Whether slots have one product, on a processor that multiplies quads, and channels and pixels pay."""
    outputs, slots, _, products = w_OSLV.shape
    able = products == 1 and target.features >= NEEDED
    return able and slots > 0 and outputs // groups >= OUTPUTS and pixels >= PIXELS


class Tiles:
    """The registers of output pixels, a tile of them and of slots after the other, for one weight.

    Args:
        w_OSLV: int8, V = 1.
        bits: of the register.
        parts: groups of the convolution.

    Attributes:
        pays: always, as the same is done for any values.
    """

    pays = True

    def __init__(self, w_OSLV: Tensor, bits: int, parts: int) -> None:
        outputs, self.channels, self.taps, _ = w_OSLV.shape
        self.outputs, self._register = outputs // parts, started(bits, "upper")
        highest, size = (1 << (bits - 1)) - 1, BLOCK // (VECTOR * GROUPS) * EVERY
        self._parts = [steps(w_OK, highest, size) for w_OK in w_OSLV.flatten(1).chunk(parts)]

    def __call__(self, pixels: int, *, x: int, out: int, row: int, floats: bool, target: Target, **near: int) -> None:
        """Of so many output pixels, at least one.

        Args:
            pixels: how many.
            x, near: where values lie: ``x``, ``base`` and ``near`` of `recoup.nbsmt.emit_runs.tiles`.
            out: of float32 (``floats``) or int32 results: of a pixel whole vectors of output channels, part after part.
            row: bytes from a pixel's results to the next one's.
            floats: whether they are float32.
            target: the processor.
        """
        vectors, size = -(-pixels // LANES), self._parts[0].size
        # What a tile takes: its vectors, and one more, of weights.
        groups = min(range(1, GROUPS + 1), key=lambda groups: -(-vectors // groups) * (groups + 1))
        lanes, wide = self.outputs + -self.outputs % LANES, groups * LANES
        kernel = emit_runs.tiles(groups, floats, target).bind(
            pixels=pixels, **near, channels=self.channels, taps=self.taps, outputs=self.outputs,
            vectors=lanes // LANES, size=size, row=row, start=self._register["start"], low=self._register["low"],
        )  # fmt: skip

        def tiles(first: int, last: int) -> None:
            planes = torch.empty(self.channels * self.taps + WINDOW, wide, dtype=torch.uint8)
            windows = torch.empty(size // EVERY, groups, VECTOR, dtype=torch.uint8)
            sums = torch.empty(lanes, wide, dtype=torch.int32)
            memory = {"planes": planes.data_ptr(), "windows": windows.data_ptr(), "sums": sums.data_ptr()}
            for number, part in enumerate(self._parts):
                own = {"steps": part.steps.data_ptr(), "ends": part.ends.data_ptr(), "blocks": len(part.ends)}
                places = {"x": x + number * self.channels, "out": out + 4 * number * lanes}
                kernel(first=first, last=last, **own, **places, **memory)

        work = wide * len(self._parts) * self.channels * self.taps * self.outputs
        over_rows(tiles, -(-vectors // groups), work, WORK)
