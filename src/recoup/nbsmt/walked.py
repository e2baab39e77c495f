"""Sums in a register that saturates all the time where slots hold one signed product: see `recoup.nbsmt.emit_walked`.

Legend: O output channels, K = C L slots' taps in their order (C channels, L taps), B blocks of them.
"""

from math import ceil

import torch
from torch import Tensor

from recoup.kernels.llvm import Target
from recoup.kernels.threads import over_rows
from recoup.nbsmt import emit_walked
from recoup.nbsmt.emit_runs import LANES, VECTOR
from recoup.nbsmt.emit_walked import AT_ONCE, COLUMN, Form
from recoup.nbsmt.ports import SIGNED, reach

COLUMNS = 8
"""The most columns of a tile: their registers on two paths, and their products, are in a processor's registers."""

BLOCK = 14 << 10
"""Bytes of values that stay in a first-level cache while all output channels pass: half of it, as more did not."""

TAIL, OPEN = 0.25, 0.125
"""The share of the slots that is tried to settle output channels at first, and of those that it may leave."""

WORK = 1 << 16
"""Products that pay for one more thread."""

WORD = 16
"""Bits of lanes. A register has fewer."""


def weights(w_OK: Tensor, shift: int, size: int) -> Tensor:
    """Lay weights out: int32 [B, O, size, 2], two words of a weight times 2^shift each, and two of the weight.

    Args:
        w_OK: int8.
        shift: a power of two.
        size: slots of a block; what lacks weighs 0.
    """
    slots = w_OK.shape[1]
    blocks = max(1, -(-slots // size))
    w_BOk = torch.nn.functional.pad(w_OK, (0, blocks * size - slots)).unflatten(1, (blocks, size)).transpose(0, 1)
    words = w_BOk.to(torch.int16)
    return torch.stack([words << shift, words << shift, words, words], 3).view(torch.int32)


def held(w_OK: Tensor, bits: int, smallest: int = -reach(SIGNED)) -> bool:
    """Whether products times the power of two that makes a register's ends those of words still are words.

    Args:
        w_OK: int8.
        bits: of the register.
        smallest: value, of signed ones that go up to 127.
    """
    largest = int(w_OK.to(torch.int16).abs().max()) if w_OK.numel() else 0
    return (largest * max(-smallest, reach(SIGNED) - 1)) << (WORD - bits) < 1 << (WORD - 1)


LAID = 2
"""Layouts of one weight that are kept: of whole batches and of a ragged last one."""


class Tiles:
    """The registers of output pixels, a tile of them and a block of slots after the other, for one weight.

    Args:
        w_OSLV: int8, V = 1.
        bits: of the register, less than 16.
        parts: groups of the convolution.

    Attributes:
        pays: always: nothing is faster.
        tail: the share of the slots that is added from both ends first, 0 where too few output channels were settled
            by the last ones. It is found call by call, and changes no bit.
        asks: whether the smallest value decides how registers are held.
    """

    pays = True

    def __init__(self, w_OSLV: Tensor, bits: int, parts: int) -> None:
        outputs, self.channels, self.taps, _ = w_OSLV.shape
        self.outputs, self.bits, self.tail = outputs // parts, bits, TAIL
        self._parts, self._shrinks = w_OSLV.flatten(1).chunk(parts), True
        self._held = held(w_OSLV, bits)
        self.asks = not self._held and held(w_OSLV, bits, smallest=1 - reach(SIGNED))
        self._laid: dict[tuple[int, int], list[Tensor]] = {}

    def _weights(self, size: int, shift: int) -> list[Tensor]:
        """All parts in blocks of so many slots, times a power of two; laid out at the first call."""
        if (size, shift) not in self._laid:
            if len(self._laid) == LAID:  # a size goes with a number of pixels, of which a caller may have many
                self._laid.pop(next(iter(self._laid)))
            self._laid[size, shift] = [weights(w_OK, shift, size) for w_OK in self._parts]
        return self._laid[size, shift]

    def _form(self, pixels: int, held: bool, floats: bool) -> Form:
        """Tiles that as many pixels fill best, on as many threads as torch uses."""
        columns, threads = -(-pixels // COLUMN), torch.get_num_threads()
        n = min(range(2, COLUMNS + 1), key=lambda n: ceil(ceil(columns / n) / threads) * (n + 0.5))
        # Of what multiplies, and adds with an end, as much as of the rest.
        return Form(n, ceil(n / 2) if held else ceil(2 * n / 3), held, floats)

    def __call__(
        self,
        pixels: int,
        *,
        x: int,
        out: int,
        row: int,
        floats: bool,
        target: Target,
        smallest: int = -reach(SIGNED),
        **near: int,
    ) -> None:
        """Of so many output pixels, at least one.

        Args:
            pixels: how many.
            x, near: where codes lie: ``x``, ``base`` and ``near`` of `recoup.nbsmt.emit_walked.tiles`.
            out: of float32 (``floats``) or int32 results: of a pixel whole vectors of output channels, part after part.
            row: bytes from a pixel's results to the next one's.
            floats: whether they are float32.
            target: the processor.
            smallest: no value is smaller; what is not known costs time where ``asks``.
        """
        held = self._held or (self.asks and smallest > -reach(SIGNED))
        shift = WORD - self.bits if held else 0
        form, slots = self._form(pixels, held, floats), self.channels * self.taps
        lanes = self.outputs + -self.outputs % LANES
        least = -(-slots // -(-slots // max(AT_ONCE, BLOCK // (form.columns * VECTOR))))
        size, wide = least + -least % AT_ONCE, form.columns * COLUMN
        parts, count, high = self._weights(size, shift), -(-pixels // wide), (1 << (self.bits - 1)) - 1
        blocks, tail = len(parts[0]), self.tail
        kernel = emit_walked.tiles(form, target).bind(
            pixels=pixels, **near, channels=self.channels, taps=self.taps, outputs=self.outputs,
            vectors=lanes // LANES, blocks=blocks, size=size, tail=ceil(tail * blocks), row=row, start=0,
            low=-high - 1, high=high, up=0 if held else (1 << (WORD - 1)) - 1 - high, shift=shift,
        )  # fmt: skip
        counts: list[Tensor] = []

        def tiles(first: int, last: int) -> None:
            planes = torch.full((blocks * size, wide), SIGNED, dtype=torch.uint8)
            words, sums = torch.empty(size, wide, dtype=torch.int16), torch.empty(lanes, wide, dtype=torch.int32)
            opened = torch.empty(lanes, dtype=torch.uint8)
            counts.append(left := torch.zeros(1, dtype=torch.int64))
            memory = {"planes": planes, "words": words, "sums": sums, "open": opened, "left": left}
            memory = {name: part.data_ptr() for name, part in memory.items()}
            for number, part in enumerate(parts):
                places = {"x": x + number * self.channels, "out": out + 4 * number * lanes}
                kernel(first=first, last=last, weights=part.data_ptr(), **places, **memory)

        each = len(parts) * self.outputs
        over_rows(tiles, count, wide * each * slots, WORK)
        self._learn(tail, sum(map(int, counts)) / (count * each), blocks)

    def _learn(self, tail: float, opened: float, blocks: int) -> None:
        """After a call with a tail: a shorter one as long as it settles almost all, then the last that did, or none."""
        if opened > OPEN:  # another thread's call may have had the same tail, and found the same
            self.tail, self._shrinks = 0 if tail in (0, TAIL) else 2 * tail, False
        elif self._shrinks and tail * blocks > 1:
            self.tail = tail / 2
