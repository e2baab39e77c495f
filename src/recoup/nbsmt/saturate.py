"""Sums in a register that saturates, slot by slot.

Where a sum saturates depends on the order of its parts, so no matrix product gives it. A slot's products are those of
`recoup.nbsmt.groups`: T threads times G groups. `recoup.nbsmt.emit_saturating` adds them, in the layout that
`recoup.nbsmt.emit_slots` makes of an operand.

Lanes are output channels, which share a pixel's values. Where a group of the convolution has fewer than a vector of
them, as in depthwise ones, lanes are of several groups, each with the values of its own.

Legend: S slots, L the kernel's taps, V = G * T products of a slot, M output pixels, O output channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.kernels import llvm
from recoup.kernels.threads import over_rows
from recoup.nbsmt import emit_saturating, emit_slots, reference
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.emit_saturating import LANES, NEAR, VECTOR
from recoup.nbsmt.ports import UNSIGNED
from recoup.network.convolution import Geometry

SLACK = 64
"""Bytes behind the values that whole vectors may read."""

SEGMENT = 1 << 17
"""Bytes of weights that stay in a second-level cache while all pixels pass."""

WORK = 1 << 16
"""Products that pay for one more thread."""

COPIED = 1 << 18
"""Bytes that do."""


@dataclass(frozen=True, slots=True)
class _Block:
    """The weights of a few vectors of output channels.

    Attributes:
        weight: [S, L, Q, vectors, 64] bytes.
        correction: int32 [S, L, vectors, 16] where values are bytes of signed codes, else empty.
        lanes: which of the values from ``near`` on every lane takes, where few share one: `emit_saturating.choice`.
        near: bytes from a slot's first value to these.
        place: the first lane's, among all.
    """

    weight: Tensor
    correction: Tensor
    lanes: Tensor
    near: int
    place: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one kind of convolution is computed.

    Attributes:
        form: of the kernel, but for `blocks`.
        shifts: powers of two that values and weights are taken times.
        blocks: all weights.
        lanes: of all, and of one of the convolution's groups.
        order: how a pixel's values lie: ``group`` after group, or ``slot`` after slot.
    """

    form: emit_saturating.Form
    shifts: tuple[int, int]
    blocks: tuple[_Block, ...]
    lanes: tuple[int, int]
    by_slot: bool


class Saturating:
    """A weight operand laid out for registers that saturate.

    Args:
        weight_OGJkk: int8 [O, G * J, kh, kw], see `recoup.nbsmt.weights.WeightOperand`.
        config: threads and pairing say which channels a slot holds; its accumulator saturates.
        groups: G, the operands side by side.
    """

    def __init__(self, weight_OGJkk: Tensor, config: NBSMT, groups: int) -> None:
        self.config, self.groups = config, groups
        self.outputs = weight_OGJkk.shape[0]
        w_OGTSkk = reference.split_threads(weight_OGJkk.unflatten(1, (groups, -1)), config, 2)
        self._weight = w_OGTSkk.flatten(4).permute(0, 3, 4, 1, 2).flatten(3)  # [O, S, L, V]
        self.slots, self.taps, self.products = self._weight.shape[1:]
        self._plans: dict[tuple, _Plan] = {}

    def __call__(
        self,
        operand: Tensor,
        geometry: Geometry,
        zero: int = UNSIGNED,
        *,
        floats: bool = False,
        target: llvm.Target | None = None,
    ) -> Tensor:
        """The registers after all slots: int32, or float32, [N, O, h, w] in channels_last strides.

        Args:
            operand: uint8 [N, H, W, groups * G * Cp], as `recoup.nbsmt.operand.operands` lays it out.
            geometry: of the convolution.
            zero: the byte of value 0.
            floats: the results rounded to float32.
            target: another processor to generate code for, to test its form of the kernels.
        """
        key = (geometry.groups, zero, target or llvm.host())
        if key not in self._plans:
            self._plans[key] = self._plan(*key)
        plan = self._plans[key]
        x, pixel = self._dealt(operand.contiguous(), plan, geometry, zero, key[2])
        out_MO = self._sums(x, pixel, operand.shape, plan, geometry, floats, key[2])
        across, each = plan.lanes[0] // plan.lanes[1], self.outputs // (plan.lanes[0] // plan.lanes[1])
        if each != plan.lanes[1]:
            out_MO = out_MO.unflatten(1, (across, -1))[:, :, :each].flatten(1)
        size = geometry.outputs(operand.shape[1:3])
        return out_MO.view(operand.shape[0], *size, self.outputs).permute(0, 3, 1, 2)

    # the weights

    def _plan(self, groups: int, zero: int, target: llvm.Target) -> _Plan:
        """Lay the weights out for a number of groups of the convolution."""
        register = self.config.accumulator
        assert register is not None
        words, each = self.products <= 2, self.outputs // groups
        shifts = emit_saturating.scaled(register.bits, self.products, target)
        sharing: emit_saturating.Sharing = "all" if groups == 1 or each >= LANES else "none" if each == 1 else "few"
        wide = "avx512bw" in target.features
        form = emit_saturating.Form(
            words=words,
            sharing=sharing,
            pixels=8 if wide else 4,
            blocks=1,
            saturates=shifts is not None,
            many=self.products > 4,
            corrected=zero > 0 and not words,
            floats=False,
        )
        parts = groups if sharing == "all" else 1
        lanes = self.outputs // parts + -(self.outputs // parts) % LANES
        vectors = 2 if wide and sharing == "all" else 1
        blocks = tuple(
            self._block(part * lanes + first, part, rows, each, zero if form.corrected else 0, shifts or (0, 0))
            for part, w_OSLV in enumerate(self._weight.chunk(parts))
            for first, rows in _cut(w_OSLV, vectors * LANES)
        )
        return _Plan(form, shifts or (0, 0), blocks, (parts * lanes, lanes), sharing != "all")

    def _block(self, place: int, part: int, w_OSLV: Tensor, each: int, zero: int, shifts: tuple[int, int]) -> _Block:
        """The weights of some output channels, the first of them at ``place``, in a group of the convolution."""
        by_slot, words = each < LANES and self.outputs > each, self.products <= 2
        w = F.pad(w_OSLV, (0, (2 if words else 4) - w_OSLV.shape[3] if w_OSLV.shape[3] < 4 else 0))
        w = F.pad(w, (0, 0, 0, 0, 0, 0, 0, -len(w) % LANES)).unflatten(0, (-1, LANES))
        w = w.unflatten(4, (-1, w.shape[4] if words else 4)).permute(2, 3, 4, 0, 1, 5)
        weight = w.to(torch.int16) << shifts[1] if words else w
        correction = -zero * w.sum((2, 5), dtype=torch.int32) if zero else torch.empty(0, dtype=torch.int32)
        first = place // each if by_slot else 0
        lanes = emit_saturating.choice(((torch.arange(LANES) + place) // each - first).clamp_max(NEAR - 1))
        near = 2 * (first if by_slot else part * self.slots) if words else 0
        return _Block(weight.contiguous(), correction.contiguous(), lanes, near, place)

    # the values

    def _dealt(
        self, operand: Tensor, plan: _Plan, geometry: Geometry, zero: int, target: llvm.Target
    ) -> tuple[Tensor, int]:
        """The values of slots in padded images, as bytes [N, H', W', pixel] and slack, and the bytes of a pixel."""
        N, H, W, J = operand.shape
        (top, left), size = geometry.padding, 2 if plan.form.words else 1
        pixel = J * size
        form, sizes = self._dealing(J, geometry.groups, plan, zero)
        if form == emit_slots.Form(1, 4) and not top and not left:
            return operand, pixel
        tall, wide = H + 2 * top, W + 2 * left
        flat = torch.empty(N * tall * wide * pixel + SLACK, dtype=torch.uint8)
        x = flat[: len(flat) - SLACK].view(N, tall, wide, pixel)
        empty = 0 if plan.form.words else zero
        for border in (x[:, :top], x[:, tall - top :], x[:, :, :left], x[:, :, wide - left :]):
            border.fill_(empty)
        kernel = emit_slots.deal(form, target).bind(
            height=H, width=W, x=operand.data_ptr(), x_pixel=J, to=x[:, top:, left:].data_ptr() if x.numel() else 0,
            to_image=tall * wide * pixel, to_row=wide * pixel, to_pixel=pixel, **sizes,
        )  # fmt: skip
        if operand.numel():
            over_rows(lambda first, last: kernel(first=first, last=last), N * H, W * pixel, COPIED)
        return flat, pixel

    def _dealing(self, J: int, groups: int, plan: _Plan, zero: int) -> tuple[emit_slots.Form, dict[str, int]]:
        """How values lie in an operand of J bytes a pixel: the kernel's form, and its sizes."""
        T, G, S = self.config.threads, self.groups, self.slots
        words = {"words": True, "zero": zero, "shift": plan.shifts[0]} if plan.form.words else {}
        one = {"parts": 1, "x_part": 0, "to_part": 0, "stream": 0}
        if plan.by_slot and S > 1:
            return emit_slots.Form(0, 1, **words), {
                "parts": groups, "x_part": S, "to_part": 2, "units": S, "stream": 2 * groups,
            }  # fmt: skip
        halves = self.config.pairing == "halves" and T > 1
        if words and not (halves and T == 2):
            return emit_slots.Form(1, 1, **words), one | {"units": J}
        if words:
            return emit_slots.Form(2, 1, **words), one | {"units": S, "stream": S}
        if T == 2:  # two groups: a quad
            streams, stream = (4, S) if halves else (2, 2 * S)
            return emit_slots.Form(streams, 4 // streams), one | {"units": S, "stream": stream}
        if halves:
            return emit_slots.Form(4, 1), {"parts": G, "x_part": 4 * S, "to_part": 4 * S, "units": S, "stream": S}
        return emit_slots.Form(1, 4), one | {"units": G * S}

    # their sums

    def _sums(
        self,
        x: Tensor,
        pixel: int,
        shape: torch.Size,
        plan: _Plan,
        geometry: Geometry,
        floats: bool,
        target: llvm.Target,
    ) -> Tensor:
        """The registers after all slots, [M, lanes]."""
        base_M, near_L = _places(shape, geometry, pixel)
        size = 2 if plan.form.words else 1
        slot_step = size * (geometry.groups if plan.by_slot else min(self.products, 4))
        near_SL = torch.arange(self.slots)[:, None] * slot_step + near_L
        register = self.config.accumulator
        assert register is not None
        out = torch.empty(len(base_M), plan.lanes[0], dtype=torch.float32 if floats else torch.int32)
        each = { "quads": max(1, self.products // 4), "base": base_M.data_ptr(),
 "quad_step": 4 * self.slots, "row": 4 * plan.lanes[0],
            "low": -(1 << (register.bits - 1)), "high": (1 << (register.bits - 1)) - 1, "shift": sum(plan.shifts),
        }  # fmt: skip
        calls = [
            emit_saturating.saturating(replace(plan.form, blocks=part["blocks"], floats=floats), target).bind(
                **each, **{name: value for name, value in part.items() if name != "blocks"},
                out=out.data_ptr() + 4 * place,
            )
            for place, part in self._segments(x, near_SL, plan)
        ]  # fmt: skip

        def rows(first: int, last: int) -> None:
            for call in calls:
                call(first=first, last=last)

        if out.numel():
            over_rows(rows, len(base_M), plan.lanes[0] * self.slots * self.taps * self.products, WORK)
        return out

    def _segments(self, x: Tensor, near_SL: Tensor, plan: _Plan) -> Iterator[tuple[int, dict[str, int]]]:
        """Block by block, as many slots at a time as the cache holds weights of: the kernel's arguments."""
        for block in plan.blocks:
            vectors = block.weight.shape[3]
            slot = block.weight[0].nbytes if self.slots else 1
            most = max(1, SEGMENT // max(slot, 1))
            for first in range(0, max(self.slots, 1), most):
                count = min(most, self.slots - first)
                part = {
                    "blocks": vectors, "x": x.data_ptr() + block.near, "near": near_SL.data_ptr() + 8 * first * self.taps, "steps": count * self.taps,
                    "weight": block.weight.data_ptr() + first * slot, "lanes": block.lanes.data_ptr(),
                    "correction": block.correction.data_ptr() + first * self.taps * vectors * VECTOR,
                    "begin": int(first == 0), "end": int(first + count == self.slots),
                }  # fmt: skip
                yield block.place, part


def _cut(rows: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Rows in pieces of a size, and the rest in vectors."""
    first = 0
    while first < len(rows):
        step = size if len(rows) - first > size - LANES else LANES
        yield first, rows[first : first + step]
        first += step


def _places(shape: torch.Size, geometry: Geometry, pixel: int) -> tuple[Tensor, Tensor]:
    """Where, in padded images, the first taps of all output pixels lie, int64 [M], and how far the others, int64 [L]."""
    N, H, W = shape[:3]
    (top, left), (down, across) = geometry.padding, geometry.outputs((H, W))
    width = W + 2 * left
    image = torch.arange(N)[:, None, None] * ((H + 2 * top) * width)
    row = torch.arange(down)[:, None] * (geometry.stride[0] * width)
    base_M = ((image + row + torch.arange(across) * geometry.stride[1]) * pixel).flatten()
    kernel_row = torch.arange(geometry.kernel[0])[:, None] * (geometry.dilation[0] * width)
    near_L = ((kernel_row + torch.arange(geometry.kernel[1]) * geometry.dilation[1]) * pixel).flatten()
    return base_M, near_L
