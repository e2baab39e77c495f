"""Sums in a register that saturates all the time where slots hold one signed product: see `recoup.nbsmt.emit_walked`.

Legend: O output channels, K = C L slots' taps in their order (C channels, L taps), B blocks of steps.
"""

from math import ceil

import torch
from torch import Tensor

from recoup.kernels.llvm import Target
from recoup.kernels.threads import over_rows
from recoup.nbsmt import emit_walked
from recoup.nbsmt.emit_runs import LANES, VECTOR
from recoup.nbsmt.emit_walked import AT_ONCE, COLUMN, SIGNS, WORD, Form
from recoup.nbsmt.ports import SIGNED

COLUMNS = 8
"""The most columns of a tile: their registers on two paths, and their products, are in a processor's registers."""

BLOCK = 24 << 10
"""Bytes of pairs of values that stay in a first-level cache while all output channels pass."""

TAIL, OPEN = 0.5, 0.125
"""The share of the steps that is tried to settle output channels at first, and of those that it may leave."""

SHORTER = 0.75
"""What a tail that settles enough is multiplied by for the next call; of one that settles all, the half is tried."""

MANY = 128
"""Output channels from which a register of 16 bits is added so, on a core that runs vectors in halves."""

WORK = 1 << 16
"""Products that pay for one more thread."""

LAID = 2
"""Layouts of one weight that are kept: of whole batches and of a ragged last one."""


def steps(w_OK: Tensor, columns: int, size: int) -> Tensor:
    """Lay weights out: int32 [B, O, size, 2], a pair of bytes -|w| twice, and bytes from a step's first pair of values.

    Args:
        w_OK: int8.
        columns: of a tile.
        size: steps of a block; slots that lack weigh 0.
    """
    slots = w_OK.shape[1]
    count = max(1, -(-(slots + 1) // size)) * size
    padded = torch.nn.functional.pad(w_OK, (1, count - slots)).to(torch.int32)
    size_of, down = -padded.abs() & 255, torch.arange(count) % 2 == 0
    pair = size_of[:, :-1] | size_of[:, 1:] << 8
    first, second = (((padded[:, i : i + count] < 0) ^ down).to(torch.int32) for i in range(2))  # 1: n, not p
    found = torch.stack([pair | pair << 16, (2 * first + second) * (columns * VECTOR)], 2)
    return found.unflatten(1, (-1, size)).transpose(0, 1).contiguous()


def fits(bits: int, outputs: int, target: Target) -> bool:
    """Whether a register is added so: a narrower one than a word always; one of 16 bits where multiplying takes half of
    the pipes, and what is laid out for a tile is used often, as lanes of 32 bits hold both of its ends too.
    """
    return bits < WORD or (bits == WORD and target.halves and outputs >= MANY)


class Tiles:
    """The registers of output pixels, a tile of them and a block of slots after the other, for one weight.

    Args:
        w_OSLV: int8, V = 1.
        bits: of the register, at most 16.
        parts: groups of the convolution.

    Attributes:
        pays: always: nothing is faster.
        tail: the share of the steps that is added from both ends first, 0 where too few output channels were settled
            by the last ones. It is found call by call, and changes no bit.
    """

    pays = True

    def __init__(self, w_OSLV: Tensor, bits: int, parts: int) -> None:
        outputs, self.channels, self.taps, _ = w_OSLV.shape
        self.outputs, self.bits, self.tail = outputs // parts, bits, TAIL
        self._parts, self._enough, self._shrinks = w_OSLV.flatten(1).chunk(parts), 0.0, True
        self._laid: dict[tuple[int, int], list[Tensor]] = {}

    def _steps(self, columns: int, size: int) -> list[Tensor]:
        """All parts in blocks of so many steps; laid out at the first call."""
        laid = self._laid.get((columns, size))
        if laid is None:
            laid = [steps(w_OK, columns, size) for w_OK in self._parts]
            # A size goes with a number of pixels, of which there may be many.
            kept = list(self._laid.items())[1 - LAID :]
            self._laid = dict(kept) | {(columns, size): laid}  # other threads read the one before
        return laid

    def _form(self, pixels: int, floats: bool, target: Target) -> Form:
        """Tiles that as many pixels fill best, on as many threads as torch uses."""
        columns, threads = -(-pixels // COLUMN), torch.get_num_threads()
        n = min(range(2, COLUMNS + 1), key=lambda n: ceil(ceil(columns / n) / threads) * (n + 0.5))
        whole = self.bits == WORD
        light = 0 if not target.halves else n if whole else ceil(2 * n / 3)
        return Form(n, whole, light, floats)

    def __call__(self, pixels: int, *, x: int, out: int, row: int, floats: bool, target: Target, **near: int) -> None:
        """Of so many output pixels, at least one.

        Args:
            pixels: how many.
            x, near: where codes lie: ``x``, ``base`` and ``near`` of `recoup.nbsmt.emit_walked.tiles`.
            out: of float32 (``floats``) or int32 results: of a pixel whole vectors of output channels, part after part.
            row: bytes from a pixel's results to the next one's.
            floats: whether they are float32.
            target: the processor.
        """
        form, slots = self._form(pixels, floats, target), self.channels * self.taps
        lanes, wide = self.outputs + -self.outputs % LANES, form.columns * COLUMN
        least = -(-(slots + 1) // -(-(slots + 1) // max(AT_ONCE, BLOCK // (SIGNS * form.columns * VECTOR))))
        size = least + -least % AT_ONCE
        parts, count = self._steps(form.columns, size), -(-pixels // wide)
        blocks, tail = len(parts[0]), self.tail
        kernel = emit_walked.tiles(form, target).bind(
            pixels=pixels, **near, channels=self.channels, taps=self.taps, outputs=self.outputs,
            vectors=lanes // LANES, blocks=blocks, size=size, tail=ceil(tail * blocks), row=row, start=0,
            half=1 << (self.bits - 1),
        )  # fmt: skip
        counts: list[Tensor] = []

        def tiles(first: int, last: int) -> None:
            planes = torch.full((1 + blocks * size, wide), SIGNED, dtype=torch.uint8)
            words = torch.empty(size, SIGNS, form.columns, VECTOR, dtype=torch.uint8)
            sums, paths = torch.empty(lanes, wide, dtype=torch.int32), torch.empty(lanes, dtype=torch.uint8)
            counts.append(left := torch.zeros(1, dtype=torch.int64))
            memory = {"planes": planes, "words": words, "sums": sums, "paths": paths, "left": left}
            memory = {name: part.data_ptr() for name, part in memory.items()}
            for number, part in enumerate(parts):
                places = {"x": x + number * self.channels, "out": out + 4 * number * lanes}
                kernel(first=first, last=last, steps=part.data_ptr(), **places, **memory)

        each = len(parts) * self.outputs
        over_rows(tiles, count, wide * each * slots, WORK)
        self._learn(tail, sum(map(int, counts)) / (count * each), blocks)

    def _learn(self, tail: float, opened: float, blocks: int) -> None:
        """After a call with a tail: a shorter one as long as it settles almost all, then the last that did, or none."""
        if opened > OPEN:  # another thread's call may have had the same tail, and found the same
            self.tail, self._shrinks = self._enough, False
        elif self._shrinks:
            self._enough = tail
            if tail * blocks > 1:
                self.tail = tail * (SHORTER if opened else 0.5)
