"""Sums in a register that saturates, slot by slot.

Where a sum saturates depends on the order of its parts, so no matrix product gives it. A slot's products are those of
`recoup.nbsmt.groups`: T threads times G groups. `recoup.nbsmt.emit_saturating` adds them, in the layout that
`recoup.nbsmt.emit_slots` makes of an operand.

Lanes are output channels, which share a pixel's values. Where a group of the convolution has fewer than a vector of
them, as in depthwise ones, lanes are of several groups, each with the values of its own.

Legend: S slots, L the kernel's taps, V = G * T products of a slot, M output pixels, O output channels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.kernels import llvm
from recoup.kernels.signature import Bound
from recoup.kernels.threads import over_rows
from recoup.nbsmt import emit_saturating, emit_slots, reference
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.emit_saturating import LANES, NEAR, VECTOR
from recoup.nbsmt.ports import UNSIGNED
from recoup.network.convolution import Geometry

SLACK = 64
"""Bytes behind the values that whole vectors may read."""

SEGMENT, CHUNK = 1 << 17, 1 << 19
"""Bytes of weights that stay in a second-level cache while pixels pass, and of values."""

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
        plan, (N, H, W, _) = self._plans[key], operand.shape
        down, across = geometry.outputs((H, W))
        out = torch.empty(N, down * across, plan.lanes[0], dtype=torch.float32 if floats else torch.int32)
        run = self._run(operand.contiguous(), out, plan, geometry, zero, key[2])
        if out.numel():
            over_rows(run, N, down * across * plan.lanes[0] * self.slots * self.taps * self.products, WORK)
        parts, each = plan.lanes[0] // plan.lanes[1], self.outputs // (plan.lanes[0] // plan.lanes[1])
        if each != plan.lanes[1]:
            out = out.unflatten(2, (parts, -1))[..., :each].flatten(2)
        return out.view(N, down, across, self.outputs).permute(0, 3, 1, 2)

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

    # the values and their sums

    def _run(
        self,
        operand: Tensor,
        out: Tensor,
        plan: _Plan,
        geometry: Geometry,
        zero: int,
        target: llvm.Target,
    ) -> Callable[[int, int], None]:
        """What computes images ``first .. last``: a few at a time are dealt into memory that stays in the cache."""
        (_, H, W, J), floats = operand.shape, out.dtype == torch.float32
        form, sizes = self._dealing(J, geometry.groups, plan)
        kept = form == emit_slots.Form(1, 4) and not any(geometry.padding)
        pixel = J * (2 if plan.form.words else 1)
        (top, left), pixels = geometry.padding, out.shape[1]
        tall, wide = H + 2 * top, W + 2 * left
        most = max(1, CHUNK // max(1, tall * wide * pixel))
        base_M, near_SL = self._places(min(most, len(operand)), H, W, pixel, plan, geometry)
        calls = self._calls(plan, floats, target)
        deal = emit_slots.deal(form, target).bind(
            height=H,
            width=W,
            x_pixel=J,
            to_image=tall * wide * pixel,
            to_row=wide * pixel,
            to_pixel=pixel,
            zero=zero,
            shift=plan.shifts[0],
            **sizes,
        )

        def images(first: int, last: int) -> None:
            x, address = None, operand.data_ptr()
            if not kept:
                x, address = _bordered((min(most, last - first), tall, wide, pixel), geometry, zero, plan)
            for at in range(first, last, most):
                count = min(most, last - at)
                source = operand[at].data_ptr()
                if kept:
                    address = source
                else:
                    inside = address + (top * wide + left) * pixel
                    over_rows(
                        lambda a, z, source=source, to=inside: deal(first=a, last=z, x=source, to=to),
                        count * H, W * pixel, COPIED,
                    )  # fmt: skip
                to = out[at].data_ptr()

                def rows(a: int, z: int, address: int = address, to: int = to) -> None:
                    base, near = base_M.data_ptr(), near_SL.data_ptr()
                    for step, value, lane, call in calls:
                        places = {"base": base, "near": near + 8 * step, "x": address + value, "out": to + 4 * lane}
                        call(first=a, last=z, **places)

                over_rows(rows, count * pixels, plan.lanes[0] * self.slots * self.taps * self.products, WORK)
            del x  # which lies at the address

        return images

    def _dealing(self, J: int, groups: int, plan: _Plan) -> tuple[emit_slots.Form, dict[str, int]]:
        """How values lie in an operand of J bytes a pixel: the kernel's form, and its sizes."""
        T, G, S = self.config.threads, self.groups, self.slots
        words = {"words": True} if plan.form.words else {}
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

    def _calls(self, plan: _Plan, floats: bool, target: llvm.Target) -> list[tuple[int, int, int, Bound]]:
        """Block by block, as many slots at a time as the cache holds weights of: the first step, where the block's
        values begin, its lanes, and the kernel."""
        register = self.config.accumulator
        assert register is not None
        low, high = -(1 << (register.bits - 1)), (1 << (register.bits - 1)) - 1
        calls = []
        for block in plan.blocks:
            vectors = block.weight.shape[3]
            kernel = emit_saturating.saturating(replace(plan.form, blocks=vectors, floats=floats), target)
            slot = self.taps * max(1, self.products // 4) * vectors * VECTOR
            most = max(1, SEGMENT // max(slot, 1))
            for first in range(0, max(self.slots, 1), most):
                count = min(most, self.slots - first)
                bound = kernel.bind(
                    steps=count * self.taps, quads=max(1, self.products // 4), quad_step=4 * self.slots,
                    lanes=block.lanes.data_ptr(), weight=block.weight.data_ptr() + first * slot,
                    correction=block.correction.data_ptr() + first * self.taps * vectors * VECTOR,
                    row=4 * plan.lanes[0], begin=int(first == 0), end=int(first + count == self.slots),
                    low=low, high=high, shift=sum(plan.shifts),
                )  # fmt: skip
                calls.append((first * self.taps, block.near, block.place, bound))
        return calls

    def _places(self, N: int, H: int, W: int, pixel: int, plan: _Plan, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Where, in padded images, output pixels' first values lie, int64 [M], and how far the others, int64 [S, L]."""
        (top, left), (down, across) = geometry.padding, geometry.outputs((H, W))
        width = W + 2 * left
        image = torch.arange(N)[:, None, None] * ((H + 2 * top) * width)
        row = torch.arange(down)[:, None] * (geometry.stride[0] * width)
        base_M = ((image + row + torch.arange(across) * geometry.stride[1]) * pixel).flatten()
        kernel_row = torch.arange(geometry.kernel[0])[:, None] * (geometry.dilation[0] * width)
        near_L = ((kernel_row + torch.arange(geometry.kernel[1]) * geometry.dilation[1]) * pixel).flatten()
        step = (2 if plan.form.words else 1) * (geometry.groups if plan.by_slot else min(self.products, 4))
        return base_M, torch.arange(self.slots)[:, None] * step + near_L


def _bordered(shape: tuple[int, ...], geometry: Geometry, zero: int, plan: _Plan) -> tuple[Tensor, int]:
    """Memory for padded images [N, H', W', pixel] of bytes, with their borders, and its address."""
    size = prod(shape)
    flat = torch.empty(size + SLACK, dtype=torch.uint8)
    x, (top, left) = flat[:size].view(shape), geometry.padding
    for border in (x[:, :top], x[:, shape[1] - top :], x[:, :, :left], x[:, :, shape[2] - left :]):
        border.fill_(0 if plan.form.words else zero)
    return flat, flat.data_ptr()


def _cut(rows: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Rows in pieces of a size, and the rest in vectors."""
    first = 0
    while first < len(rows):
        step = size if len(rows) - first > size - LANES else LANES
        yield first, rows[first : first + step]
        first += step
