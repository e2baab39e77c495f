"""Sums in a register that saturates where slots hold one signed product: see `recoup.nbsmt.emit_bounded`.

How far a few slots can move a register is bounded by the lengths of their values and of their weights, and from most
places no end is that near. Where most are, as in a register that saturates all the time, nothing is won; that shows
in the first call's values, and the next ones are left to `recoup.nbsmt.walked`, or `recoup.nbsmt.emit_saturating`.

Legend: O output channels, K = C L slots' taps in their order (C channels, L taps), B blocks of them. A block has
spans of 32 slots, a span two pieces of 16.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from recoup.kernels.llvm import Target
from recoup.kernels.threads import over_rows
from recoup.nbsmt import emit_bounded
from recoup.nbsmt.emit_bounded import ALL, PIECE, PIECES, QUAD, SPAN, UP, WORD, Form, Register
from recoup.nbsmt.emit_runs import LANES, VECTOR
from recoup.nbsmt.ports import SIGNED
from recoup.nbsmt.runs import single

GROUPS = 8
"""The most groups of pixels of a tile, even: of more the nearest to an end would be nearer."""

BLOCK = 96
"""The most slots of a block, whose windows stay in a first-level cache while all output channels pass."""

WORK = 1 << 16
"""Products that pay for one more thread."""

WALKED = 0.5
"""The share of pieces that may be walked: with more of them, adding slot by slot takes less time."""


class Weights(NamedTuple):
    """Weights, block by block, as `recoup.nbsmt.emit_bounded.tiles` takes them.

    Attributes:
        quads: int8 [B, O, size].
        singles: int32 [B, O, size], two words each: twice the weight where the register is narrow; else the weight of
            one word of a pair of slots, times a power of two, and 0.
        lengths: float32 [B, O, size / 32, 3], a span's and its pieces': square roots of the sums of squares, or more.
        zeros: int32 [B, O, size / 32, 3], -128 times the sums of their weights.
    """

    quads: Tensor
    singles: Tensor
    lengths: Tensor
    zeros: Tensor


def weights(w_OK: Tensor, bits: int, size: int) -> Weights:
    """Lay weights out.

    Args:
        w_OK: int8.
        bits: of the register.
        size: slots of a block, whole spans; what lacks weighs 0.
    """
    slots = w_OK.shape[1]
    blocks = max(1, -(-slots // size))
    padded = torch.nn.functional.pad(w_OK, (0, blocks * size - slots))
    w_BOk = padded.unflatten(1, (blocks, size)).transpose(0, 1).contiguous()
    words = w_BOk.to(torch.int16) << Register.of(bits).shift_of_weights
    pairs = torch.zeros(*words.shape, 2, dtype=torch.int16)
    if bits < WORD:
        pairs[:] = words.unsqueeze(-1)
    else:
        pairs[:, :, 0::2, 0], pairs[:, :, 1::2, 1] = words[:, :, 0::2], words[:, :, 1::2]
    of_piece = w_BOk.to(torch.int32).unflatten(2, (-1, PIECES, PIECE))
    squares, sums = of_piece.square().sum(4, dtype=torch.int32), of_piece.sum(4, dtype=torch.int32)
    lengths, zeros = (torch.cat([part.sum(3, keepdim=True, dtype=torch.int32), part], 3) for part in (squares, sums))
    return Weights(w_BOk, pairs.view(torch.int32).squeeze(-1), lengths.float().sqrt() * UP, -SIGNED * zeros)


def fits(w_OSLV: Tensor, groups: int, zero: int, pixels: int, target: Target) -> bool:
    """Whether a convolution is computed so: one signed product a slot, output channels and pixels that pay."""
    return zero == SIGNED and single(w_OSLV, groups, pixels, target)


class Tiles:
    """The registers of output pixels, a tile of them and a block of slots after the other, for one weight.

    Args:
        w_OSLV: int8, V = 1.
        bits: of the register.
        parts: groups of the convolution.
    """

    def __init__(self, w_OSLV: Tensor, bits: int, parts: int) -> None:
        outputs, self.channels, self.taps, _ = w_OSLV.shape
        self.outputs, self.bits = outputs // parts, bits
        slots = self.channels * self.taps
        each = -(-slots // -(-slots // BLOCK))
        self.size = each + -each % SPAN
        self._walked = 0.0
        self._parts = [weights(w_OK, bits, self.size) for w_OK in w_OSLV.flatten(1).chunk(parts)]

    @property
    def pays(self) -> bool:
        """Whether few enough pieces were walked in every call; who heeds it makes no more calls."""
        return self._walked <= WALKED

    def __call__(self, pixels: int, *, x: int, out: int, row: int, floats: bool, target: Target, **near: int) -> None:
        """Of so many output pixels, at least one.

        Args:
            pixels: how many.
            x, near: where codes lie: ``x``, ``base`` and ``near`` of `recoup.nbsmt.emit_bounded.tiles`.
            out: of float32 (``floats``) or int32 results: of a pixel whole vectors of output channels, part after part.
            row: bytes from a pixel's results to the next one's.
            floats: whether they are float32.
            target: the processor.
        """
        vectors, lanes, size = -(-pixels // LANES), self.outputs + -self.outputs % LANES, self.size
        blocks = len(self._parts[0].quads)
        # What a tile takes: its vectors, and one more, of weights.
        groups = min(range(2, GROUPS + 1, 2), key=lambda groups: -(-vectors // groups) * (groups + 1))
        wide, count = groups * LANES, -(-vectors // groups)
        form, register = Form(self.bits < WORD, groups, floats), Register.of(self.bits)
        kernel = emit_bounded.tiles(form, target).bind(
            pixels=pixels, **near, channels=self.channels, taps=self.taps, outputs=self.outputs,
            vectors=lanes // LANES, blocks=blocks, size=size, row=row, start=0,
            low=register.low, high=register.high, shift=register.shift,
            missing=register.shift + register.shift_of_weights,
        )  # fmt: skip
        counts: list[Tensor] = []

        def tiles(first: int, last: int) -> None:
            planes = torch.full((blocks * size, wide), SIGNED, dtype=torch.uint8)
            windows = torch.empty(size // QUAD, groups, VECTOR, dtype=torch.uint8)
            words = torch.empty(size // 2, groups, VECTOR, dtype=torch.uint8)
            reach, sums = (
                torch.empty(size // SPAN, ALL, dtype=torch.float32),
                torch.empty(lanes, wide, dtype=torch.int32),
            )
            counts.append(walked := torch.zeros(1, dtype=torch.int64))
            memory = {"planes": planes, "windows": windows, "words": words, "reach": reach, "sums": sums}
            memory = {name: part.data_ptr() for name, part in (memory | {"walked": walked}).items()}
            for number, part in enumerate(self._parts):
                own = {name: value.data_ptr() for name, value in part._asdict().items()}
                places = {"x": x + number * self.channels, "out": out + 4 * number * lanes}
                kernel(first=first, last=last, **own, **places, **memory)

        each = len(self._parts) * self.outputs
        over_rows(tiles, count, wide * each * self.channels * self.taps, WORK)
        pieces = count * each * blocks * size // PIECE
        self._walked = max(self._walked, sum(map(int, counts)) / pieces)  # a call has a part of the images
