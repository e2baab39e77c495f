"""Sums in a register that saturates where slots hold one signed product: see `recoup.nbsmt.emit_bounded`.

What a piece of 16 slots adds on its way is bounded by the lengths of its values and of its weights, and most pieces
cannot leave the register from where it is.

Legend: O output channels, K = C L slots' taps in their order (C channels, L taps), B blocks of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from recoup.kernels.llvm import Target
from recoup.kernels.threads import over_rows
from recoup.nbsmt import emit_bounded
from recoup.nbsmt.emit_bounded import ALL, PIECE, PIECES, QUAD, SPAN, UP, Form
from recoup.nbsmt.emit_runs import LANES, VECTOR
from recoup.nbsmt.ports import SIGNED

GROUPS = 8
"""The most groups of pixels of a tile, even: of more the nearest to an end would be nearer."""

BLOCK = 96
"""The most slots of a block, whose windows stay in a first-level cache while all output channels pass."""

PIXELS, OUTPUTS = 4 * LANES, 2 * LANES
"""Output pixels, and output channels, from which this pays: lanes are filled, and what is laid out is used often."""

WORK = 1 << 16
"""Products that pay for one more thread."""

WALKED = 0.5
"""The share of pieces that may be walked: with more of them, `recoup.nbsmt.emit_saturating` takes less time."""

NEEDED = frozenset({"avx512vnni", "avx512bw"})
"""What a processor must have."""


class Weights(NamedTuple):
    """Weights, block by block, as `recoup.nbsmt.emit_bounded.tiles` takes them.

    Attributes:
        quads: int8 [B, O, size].
        singles: int32 [B, O, size], two words each: twice the weight where the register is narrow; else a weight of the
            first word of a pair, or of the second, times a power of two.
        lengths: float32 [B, O, size / 16], square roots of the sums of a piece's squares, or a little more.
        zeros: int32 [B, O, size / 16], -128 times a piece's weights.
    """

    quads: Tensor
    singles: Tensor
    lengths: Tensor
    zeros: Tensor


def weights(w_OK: Tensor, form: Form, size: int) -> Weights:
    """Lay weights out.

    Args:
        w_OK: int8.
        form: of the kernel.
        size: slots of a block, whole pieces; what lacks weighs 0.
    """
    outputs, slots = w_OK.shape
    blocks = max(1, -(-slots // size))
    padded = torch.nn.functional.pad(w_OK, (0, blocks * size - slots))
    w_BOk = padded.unflatten(1, (blocks, size)).transpose(0, 1).contiguous()
    words = w_BOk.to(torch.int16) << form.shifts[1]
    pairs = torch.zeros(*words.shape, 2, dtype=torch.int16)
    if form.narrow:
        pairs[:] = words.unsqueeze(-1)
    else:
        pairs[:, :, 0::2, 0], pairs[:, :, 1::2, 1] = words[:, :, 0::2], words[:, :, 1::2]
    of_piece = w_BOk.to(torch.int32).unflatten(2, (-1, PIECES, PIECE))
    squares, sums = of_piece.square().sum(4, dtype=torch.int32), of_piece.sum(4, dtype=torch.int32)
    lengths, zeros = (torch.cat([part.sum(3, keepdim=True, dtype=torch.int32), part], 3) for part in (squares, sums))
    return Weights(w_BOk, pairs.view(torch.int32).squeeze(-1), lengths.float().sqrt() * UP, -SIGNED * zeros)


def fits(w_OSLV: Tensor, groups: int, zero: int, pixels: int, target: Target) -> bool:
    """Whether a convolution is computed so: one signed product a slot, output channels and pixels that pay."""
    outputs, slots, _, products = w_OSLV.shape
    plain = products == 1 and zero == SIGNED and target.features >= NEEDED
    return plain and slots > 0 and outputs // groups >= OUTPUTS and pixels >= PIXELS


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
        form = Form(bits, GROUPS, floats=False)
        self._walked = 0.0
        self._parts = [weights(w_OK, form, self.size) for w_OK in w_OSLV.flatten(1).chunk(parts)]

    @property
    def pays(self) -> bool:
        """Whether few enough of the last call's pieces were walked."""
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
        # What a tile takes: its vectors, and one more, of weights.
        groups = min(range(2, GROUPS + 1, 2), key=lambda groups: -(-vectors // groups) * (groups + 1))
        wide = groups * LANES
        blocks = len(self._parts[0].quads)
        kernel = emit_bounded.tiles(Form(self.bits, groups, floats), target).bind(
            pixels=pixels, **near, channels=self.channels, taps=self.taps, outputs=self.outputs,
            vectors=lanes // LANES, blocks=blocks, size=size, row=row, start=0,
        )  # fmt: skip

        all_walked: list[Tensor] = []

        def tiles(first: int, last: int) -> None:
            planes = torch.full((blocks * size, wide), SIGNED, dtype=torch.uint8)
            windows = torch.empty(size // QUAD, groups, VECTOR, dtype=torch.uint8)
            words = torch.empty(size // 2, groups, VECTOR, dtype=torch.uint8)
            reach, sums = torch.empty(size // SPAN, ALL), torch.empty(lanes, wide, dtype=torch.int32)
            walked = torch.zeros(1, dtype=torch.int64)
            all_walked.append(walked)
            memory = {"planes": planes, "windows": windows, "words": words, "reach": reach, "sums": sums, "walked": walked}
            memory = {name: part.data_ptr() for name, part in memory.items()}
            for number, part in enumerate(self._parts):
                own = {name: value.data_ptr() for name, value in part._asdict().items()}
                places = {"x": x + number * self.channels, "out": out + 4 * number * lanes}
                kernel(first=first, last=last, **own, **places, **memory)

        work = wide * len(self._parts) * self.channels * self.taps * self.outputs
        count = -(-pixels // wide)
        over_rows(tiles, count, work, WORK)
        pieces = count * len(self._parts) * blocks * size // PIECE * self.outputs
        self._walked = sum(int(walked) for walked in all_walked) / pieces
