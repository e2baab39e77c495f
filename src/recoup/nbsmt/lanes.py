"""Weights in lanes, for registers that saturate: which output channels a vector holds, and where their values lie.

Lanes are output channels, which share a pixel's values. Where a group of the convolution has fewer of them than a
vector, as in depthwise ones, lanes are of several groups, each with the values of its own.

Legend: S slots, L the kernel's taps, V products of a slot, Q quads of them, O output channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.errors import RecoupError
from recoup.kernels.llvm import Target
from recoup.nbsmt.emit_saturating import LANES, NEAR, VECTOR, Form, Sharing, choice, scaled

MANY = 16
"""Slots from which lanes choose their values: of fewer, laying these side by side takes longer than it saves."""


@dataclass(frozen=True, slots=True)
class Block:
    """The weights of a few vectors of output channels.

    Attributes:
        weight: [S, L, Q, vectors, 16, 64 / 16 bytes], words or bytes; where lanes choose their values
            [S, L, Q, vectors, 2, 16, 4], weights and places of what they meet.
        correction: int32 [S, L, vectors, 16], what bytes of signed codes add beyond their values; else empty.
        choice: which of the values from ``near`` on every lane takes, where few share one.
        near: bytes from the first value of a pixel's slot to the block's.
        lane: the first one's place among all.
    """

    weight: Tensor
    correction: Tensor
    choice: Tensor
    near: int
    lane: int

    def after(self, slot: int) -> tuple[int, int]:
        """The addresses of weights and corrections from a slot on."""
        sizes = (part[0].nbytes if part.numel() else 0 for part in (self.weight, self.correction))
        weight, correction = (slot * size for size in sizes)
        return self.weight.data_ptr() + weight, self.correction.data_ptr() + correction


@dataclass(frozen=True, slots=True)
class Layout:
    """How one kind of convolution is computed.

    Attributes:
        form: of the kernel, but for ``blocks`` and ``floats``.
        shifts: powers of two that values and weights are taken times.
        blocks: all weights.
        parts: groups of the convolution whose lanes begin a vector: 1, or all.
        lanes: of a part, whole vectors.
        slot_step: bytes from a slot's values to the next one's.
        values: bytes of a value.
    """

    form: Form
    shifts: tuple[int, int]
    blocks: tuple[Block, ...]
    parts: int
    lanes: int
    slot_step: int
    values: int

    @property
    def by_slot(self) -> bool:
        """Whether a pixel's values lie slot by slot, those of all groups of the convolution side by side."""
        return self.form.sharing != "all"

    @property
    def all_lanes(self) -> int:
        """Of all parts."""
        return self.parts * self.lanes


def laid_out(w_OSLV: Tensor, bits: int, groups: int, zero: int, target: Target) -> Layout:
    """Lay weights out.

    Args:
        w_OSLV: int8.
        bits: of the register.
        groups: of the convolution; where there are several, V is 1.
        zero: the byte of value 0.
        target: the processor.

    Raises:
        RecoupError: several groups and several products of a slot.
    """
    outputs, slots, _, products = w_OSLV.shape
    if groups > 1 and products > 1:
        raise RecoupError(
            f"registers that saturate: a convolution of {groups} groups, weight {list(w_OSLV.shape)} with {products} "
            "products a slot; grouped convolutions run one thread, which has 1"
        )
    words, each = products <= 2, outputs // groups
    shifts = scaled(bits, products, zero, target)
    sharing: Sharing = "all" if groups == 1 or each >= LANES else "none" if each == 1 else "few"
    wide = "avx512bw" in target.features
    corrected = zero > 0 and not words
    # A correction, or one quad of several, would leave 32 bits before the others come.
    held = "avx512vnni" in target.features and products <= 4 and not corrected
    form = Form(
        words=words,
        sharing=sharing,
        pixels=8 if wide else 4,
        blocks=1,
        ends="both" if shifts else "upper" if held else "none",
        many=products > 4,
        corrected=corrected,
        floats=False,
        chosen=_chosen(w_OSLV, target),
    )
    shifts = shifts or (0, 0)
    parts = groups if sharing == "all" else 1
    lanes = outputs // parts + -(outputs // parts) % LANES
    most = 2 * LANES if wide and sharing == "all" else LANES
    blocks = []
    for part, w in enumerate(w_OSLV.chunk(parts)):
        for first, rows in _cut(w, most):
            group = part if sharing == "all" else first // each
            near = (2 if words else 0) * (group if sharing != "all" else group * slots)
            chosen = ((torch.arange(LANES) + first) // each - first // each).clamp_max(NEAR - 1)
            weight, correction = _vectors(rows, shifts[1], zero if form.corrected else 0)
            weight = _choices(rows, form.chosen) if form.chosen else weight
            blocks.append(Block(weight, correction, choice(chosen), near, part * lanes + first))
    side_by_side = products if form.chosen else min(products, 4)
    slot_step = (2 if words else 1) * (side_by_side if sharing == "all" else groups)
    return Layout(form, shifts, tuple(blocks), parts, lanes, slot_step, 2 if words else 1)


def _chosen(w_OSLV: Tensor, target: Target) -> int:
    """The quads that hold all products of any slot that weigh anything; 0 where leaving out the others does not pay."""
    _, slots, _, products = w_OSLV.shape
    able = {"avx512vnni", "avx512vbmi"} <= target.features and 4 < products <= VECTOR
    if not able or slots < MANY or not w_OSLV.numel():
        return 0
    quads = -(-int((w_OSLV != 0).sum(3, dtype=torch.int32).max()) // 4)
    return quads if 0 < 2 * quads < products // 4 else 0


def in_bytes(w_OSLV: Tensor, groups: int) -> Layout:
    """Values alone, byte by byte as they come, for weights that `recoup.nbsmt.runs` lays out."""
    form = Form(
        words=False, sharing="all", pixels=1, blocks=1, ends="upper", many=False, corrected=False, floats=False
    )  # fmt: skip
    each = len(w_OSLV) // groups
    return Layout(form, (0, 0), (), parts=groups, lanes=each + -each % LANES, slot_step=1, values=1)


def _cut(rows: Tensor, most: int) -> Iterator[tuple[int, Tensor]]:
    """Output channels in pieces of ``most`` lanes, the last of fewer whole vectors, and where they begin."""
    first = 0
    while first < len(rows):
        size = most if len(rows) - first > most - LANES else LANES
        yield first, rows[first : first + size]
        first += size


def _choices(w_OSLV: Tensor, quads: int) -> Tensor:
    """Weights of lanes that choose their values, and which: int8 [S, L, Q, vectors, 2, 16, 4]."""
    place_OSLq = (w_OSLV == 0).to(torch.uint8).argsort(dim=3, stable=True)[..., : 4 * quads]
    both = torch.stack([w_OSLV.gather(3, place_OSLq), place_OSLq.to(torch.int8)])
    both = F.pad(both, (0, 0, 0, 0, 0, 0, 0, -both.shape[1] % LANES))
    return both.unflatten(4, (quads, 4)).unflatten(1, (-1, LANES)).permute(3, 4, 5, 1, 0, 2, 6).contiguous()


def _vectors(w_OSLV: Tensor, shift: int, zero: int) -> tuple[Tensor, Tensor]:
    """A block's weights and corrections: see `Block`."""
    words = w_OSLV.shape[3] <= 2
    unit = 2 if words else 4
    w = F.pad(w_OSLV, (0, -w_OSLV.shape[3] % unit, 0, 0, 0, 0, 0, -len(w_OSLV) % LANES))
    w_SLQvlu = w.unflatten(3, (-1, unit)).unflatten(0, (-1, LANES)).permute(2, 3, 4, 0, 1, 5)
    weight = (w_SLQvlu.to(torch.int16) << shift if words else w_SLQvlu).contiguous()
    correction = -zero * w_SLQvlu.sum((2, 5), dtype=torch.int32) if zero else torch.empty(0, dtype=torch.int32)
    return weight, correction.contiguous()
