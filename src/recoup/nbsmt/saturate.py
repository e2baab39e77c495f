"""Sums in a register that saturates, slot by slot.

Where a sum saturates depends on the order of its parts, so no matrix product gives it. A slot's products are those of
`recoup.nbsmt.groups`: T threads times G groups, one to 64 of them, which are added exactly before the register is.

A few images at a time are dealt out so that a slot's values lie side by side (`recoup.nbsmt.emit_slots`), inside zeros
where the convolution pads, and stay in the cache while `recoup.nbsmt.emit_saturating` adds them up. Slots of one
product are added run by run where it is unsigned (`recoup.nbsmt.runs`), and where it is signed many at once, if the
register is far enough from its ends (`recoup.nbsmt.bounded`), or by lanes of pixels (`recoup.nbsmt.walked`).

Legend: S slots, L the kernel's taps, V = G * T products of a slot, M output pixels, O output channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from recoup.kernels import llvm
from recoup.kernels.signature import Bound
from recoup.kernels.threads import over_rows
from recoup.nbsmt import bounded, emit_slots, reference, runs, walked
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.emit_saturating import Form, saturating, started
from recoup.nbsmt.lanes import Layout, in_bytes, laid_out
from recoup.nbsmt.ports import UNSIGNED
from recoup.network.convolution import Geometry

SLACK = 64
"""Bytes behind the values that whole vectors may read."""

SEGMENT, CHUNK = 1 << 17, 1 << 19
"""Bytes of weights that stay in a second-level cache while pixels pass, and of values."""

FEW = 4
"""Output pixels from which a whole tile is computed, whatever of it is needed."""

WAYS = (runs, bounded)
"""How slots of one product are added several at once, unsigned ones and signed ones."""

Tiles = runs.Tiles | bounded.Tiles | walked.Tiles

WORK, COPIED = 1 << 16, 1 << 18
"""Products, and bytes to deal out, that pay for one more thread."""


class Saturating:
    """A weight operand laid out for registers that saturate.

    Args:
        weight_OGJkk: int8 [O, G * J, kh, kw], see `recoup.nbsmt.weights.WeightOperand`.
        config: threads and pairing say which channels a slot holds; its accumulator saturates.
        groups: G, the operands side by side.
    """

    def __init__(self, weight_OGJkk: Tensor, config: NBSMT, groups: int) -> None:
        self.config, self.groups = config, groups
        w_OGTSkk = reference.split_threads(weight_OGJkk.unflatten(1, (groups, -1)), config, 2)
        self._weight_OSLV = w_OGTSkk.flatten(4).permute(0, 3, 4, 1, 2).flatten(3)
        self.outputs, self.slots, self.taps, self.products = self._weight_OSLV.shape
        self._layouts: dict[tuple, Layout] = {}
        self._segments: dict[tuple, list[Segment]] = {}
        self._tiles: dict[tuple[int, int], Tiles] = {}

    def layout(self, groups: int, zero: int, target: llvm.Target) -> Layout:
        """The weights for a convolution of so many groups; laid out at the first call."""
        key, register = (groups, zero, target), self.config.accumulator
        assert register is not None
        if key not in self._layouts:
            self._layouts[key] = laid_out(self._weight_OSLV, register.bits, *key)
        return self._layouts[key]

    def _by_tiles(self, groups: int, zero: int, pixels: int, target: llvm.Target) -> Tiles | None:
        """The weights tile by tile, where that pays: in runs or pieces added at once, or slot by slot."""
        register, key = self.config.accumulator, (groups, zero)
        assert register is not None
        way = next((way for way in WAYS if way.fits(self._weight_OSLV, *key, pixels, target)), None)
        if way is None:
            return None
        if key not in self._tiles:
            self._tiles[key] = way.Tiles(self._weight_OSLV, register.bits, groups)
        fits = walked.fits(register.bits, self.outputs // groups, target)
        if way is bounded and not self._tiles[key].pays and fits:
            self._tiles[key] = walked.Tiles(self._weight_OSLV, register.bits, groups)
        return self._tiles[key] if self._tiles[key].pays else None

    def __call__(
        self,
        operand: Tensor,
        geometry: Geometry,
        zero: int = UNSIGNED,
        *,
        floats: bool = False,
        target: llvm.Target | None = None,
    ) -> Tensor:
        """The registers after all slots: int32, or float32, [N, O, h, w], channels_last.

        Args:
            operand: uint8 [N, H, W, groups * G * Cp], as `recoup.nbsmt.operand.operands` lays it out.
            geometry: of the convolution.
            zero: the byte of value 0.
            floats: the results rounded to float32.
            target: another processor to generate code for, to test its form of the kernels.
        """
        target = target or llvm.host()
        size = geometry.outputs(operand.shape[1:3])
        tiles = self._by_tiles(geometry.groups, zero, len(operand) * prod(size), target)
        layout = in_bytes(self._weight_OSLV, geometry.groups) if tiles else self.layout(geometry.groups, zero, target)
        out_NML = torch.empty(
            len(operand), prod(size), layout.all_lanes, dtype=torch.float32 if floats else torch.int32
        )
        if out_NML.numel():
            work = out_NML[0].numel() * self.slots * self.taps * self.products
            kind = _Run if tiles is None else partial(_RunByTiles, tiles)
            run = kind(self, operand.contiguous(), out_NML, layout, geometry, zero, target)
            over_rows(run.images, len(operand), work, WORK)
        each = self.outputs // layout.parts
        if each != layout.lanes:
            out_NML = out_NML.unflatten(2, (layout.parts, -1))[..., :each].flatten(2)
        return out_NML.view(len(operand), *size, self.outputs).permute(0, 3, 1, 2)

    def segments(self, layout: Layout, pixels: int, floats: bool, target: llvm.Target) -> list["Segment"]:
        """Block by block, as many slots at a time as the cache holds weights of, for so many output pixels."""
        if not layout.blocks:  # added tile by tile: the layout is made for one call, so its id must not become a key
            return []
        form = replace(layout.form, floats=floats)
        form = replace(form, pixels=1) if pixels < FEW else form
        key = (id(layout), form)
        if key not in self._segments:  # binding arguments takes longer than the smallest products
            self._segments[key] = list(self._cut(layout, form, target))
        return self._segments[key]

    def _cut(self, layout: Layout, form: Form, target: llvm.Target) -> Iterator["Segment"]:
        register, quads = self.config.accumulator, form.chosen or max(1, self.products // 4)
        assert register is not None
        for block in layout.blocks:
            vectors = block.weight.shape[3]
            kernel = saturating(replace(form, blocks=vectors), target)
            most = max(1, SEGMENT * max(1, self.slots) // max(1, block.weight.nbytes))
            for first in range(0, max(self.slots, 1), most):
                count = min(most, self.slots - first)
                weight, correction = block.after(first)
                call = kernel.bind(
                    steps=count * self.taps, quads=quads, quad_step=4 * self.slots, row=4 * layout.all_lanes,
                    weight=weight, correction=correction, lanes=block.choice.data_ptr(),
                    begin=int(first == 0), end=int(first + count == self.slots),
                    shift=sum(layout.shifts), **started(register.bits, form.ends),
                )  # fmt: skip
                yield Segment(first * self.taps, block.near, block.lane, call)

    def dealing(self, width: int, groups: int, layout: Layout) -> tuple[emit_slots.Form, dict[str, int]]:
        """How values come to lie slot by slot, of an operand of so many bytes a pixel: the kernel's form and sizes."""
        T, G, S, words = self.config.threads, self.groups, self.slots, layout.form.words
        halves = self.config.pairing == "halves"
        plain = {"parts": 1, "x_part": 0, "to_part": 0, "stream": 0}
        if words and layout.by_slot and S > 1:
            sizes = {"parts": groups, "x_part": S, "to_part": 2, "units": S, "stream": 2 * groups}
            return emit_slots.Form(0, 1, words), sizes
        if words:
            streams = T if halves else 1  # adjacent threads lie slot by slot already
            return emit_slots.Form(streams, 1, words), plain | {"units": width // streams, "stream": S}
        if layout.form.chosen:
            size = 1 if halves else T
            parts = G * T // size
            sizes = {"parts": parts, "x_part": size * S, "to_part": size, "units": S, "stream": G * T}
            return emit_slots.Form(0, size), sizes
        if T == 1:
            return emit_slots.Form(1, 1), plain | {"units": width}
        if T == 2:  # a quad of two groups
            streams = 4 if halves else 2
            return emit_slots.Form(streams, 4 // streams), plain | {"units": S, "stream": width // streams}
        if halves:
            return emit_slots.Form(4, 1), {"parts": G, "x_part": 4 * S, "to_part": 4 * S, "units": S, "stream": S}
        return emit_slots.Form(1, 4), plain | {"units": G * S}


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the sums: some lanes, some slots.

    Attributes:
        step: the first one of `_Run.near`.
        values: bytes from a pixel's first value to the first of these lanes.
        lane: the first.
        call: the kernel.
    """

    step: int
    values: int
    lane: int
    call: Bound


class _Run:
    """One convolution: operand [N, H, W, J], out [N, h w, lanes]."""

    def __init__(
        self,
        sums: Saturating,
        operand: Tensor,
        out: Tensor,
        layout: Layout,
        geometry: Geometry,
        zero: int,
        target: llvm.Target,
    ) -> None:
        _, H, W, J = operand.shape
        (top, left), self.operand, self.out = geometry.padding, operand, out
        self.padding, self.zero, self.form = geometry.padding, zero, layout.form
        self.tall, self.wide, self.pixel = H + 2 * top, W + 2 * left, J * layout.values
        image = self.tall * self.wide * self.pixel
        self.most = min(len(operand), max(1, CHUNK // max(1, image)))
        self.base, self.near = self._places(geometry, sums.slots, layout.slot_step)
        self.work = layout.all_lanes * sums.slots * sums.taps * sums.products
        self.segments = sums.segments(layout, len(out) * out.shape[1], out.dtype == torch.float32, target)
        form, sizes = sums.dealing(J, geometry.groups, layout)
        # Adjacent threads' quads lie side by side as they are; runs are read in whole vectors, beyond the last byte.
        as_is = form == emit_slots.Form(1, 4) or (form == emit_slots.Form(1, 1) and sums.slots % runs.LANES == 0)
        self.kept = as_is and not top and not left
        self.deal = emit_slots.deal(form, target).bind(
            height=H, width=W, x_pixel=J, zero=zero, shift=layout.shifts[0], to_image=image,
            to_row=self.wide * self.pixel, to_pixel=self.pixel, **sizes,
        )  # fmt: skip

    def _places(self, geometry: Geometry, slots: int, slot_step: int) -> tuple[Tensor, Tensor]:
        """Where, in padded images, output pixels' first values lie, int64 [M], and how far the others, int64 [S, L]."""
        (down, across), height = geometry.stride, geometry.outputs(self.operand.shape[1:3])
        row, pixel = self.wide * self.pixel, self.pixel
        image_N = torch.arange(self.most)[:, None, None] * (self.tall * row)
        line_h = torch.arange(height[0])[:, None] * (down * row)
        base_Nhw = image_N + line_h + torch.arange(height[1]) * (across * pixel)
        tap_k = torch.arange(geometry.kernel[0])[:, None] * (geometry.dilation[0] * row)
        tap_kk = tap_k + torch.arange(geometry.kernel[1]) * (geometry.dilation[1] * pixel)
        return base_Nhw.flatten(), torch.arange(slots)[:, None] * slot_step + tap_kk.flatten()

    def images(self, first: int, last: int) -> None:
        """Images ``first .. last``, a few at a time."""
        memory = None if self.kept else self._bordered(min(self.most, last - first))
        for at in range(first, last, self.most):
            count = min(self.most, last - at)
            x = self.operand[at] if memory is None else memory
            if memory is not None:
                self._dealt(at, count, memory)
            self._added(x.data_ptr(), self.out[at].data_ptr(), count * self.out.shape[1])

    def _bordered(self, count: int) -> Tensor:
        """Memory for padded images, with their borders."""
        size = count * self.tall * self.wide * self.pixel
        memory, (top, left) = torch.empty(size + SLACK, dtype=torch.uint8), self.padding
        x = memory[:size].view(count, self.tall, self.wide, self.pixel)
        for border in (x[:, :top], x[:, self.tall - top :], x[:, :, :left], x[:, :, self.wide - left :]):
            border.fill_(0 if self.form.words else self.zero)
        return memory

    def _dealt(self, at: int, count: int, memory: Tensor) -> None:
        """Images from ``at`` on, inside the borders."""
        (top, left), source = self.padding, self.operand[at].data_ptr()
        to = memory.data_ptr() + (top * self.wide + left) * self.pixel
        _, H, W, _ = self.operand.shape

        def rows(first: int, last: int) -> None:
            self.deal(first=first, last=last, x=source, to=to)

        over_rows(rows, count * H, W * self.pixel, COPIED)

    def _added(self, x: int, out: int, pixels: int) -> None:
        """The registers of so many output pixels: of values from the address ``x`` on, kept from ``out`` on."""
        base, near = self.base.data_ptr(), self.near.data_ptr()

        def rows(first: int, last: int) -> None:
            for part in self.segments:
                places = {"near": near + 8 * part.step, "x": x + part.values, "out": out + 4 * part.lane}
                part.call(first=first, last=last, base=base, **places)

        over_rows(rows, pixels, self.work, WORK)


class _RunByTiles(_Run):
    """The same of slots of one product, tile by tile."""

    def __init__(self, tiles: Tiles, sums: Saturating, *settings: Any) -> None:
        super().__init__(sums, *settings)
        self.target, self.tiles = settings[-1], tiles

    def _added(self, x: int, out: int, pixels: int) -> None:
        near = {"base": self.base.data_ptr(), "near": self.near.data_ptr()}
        row, floats = self.out.shape[2] * self.out.element_size(), self.out.dtype == torch.float32
        self.tiles(pixels, x=x, out=out, row=row, floats=floats, target=self.target, **near)
