"""Groups whose weights are mostly zero, summed by lists of the quads that hold one: see `recoup.nbsmt.emit_lists`.

A group of the convolution costs the same whatever its weights are. With four threads two groups hold nearly all of
them, and up to ten others those that have a partner of weight zero: these are summed here, and added to the sums of the
rest. Sums are whole numbers, so that their order does not matter.

Legend: N images, O output channels, C channels, G groups of the multiplier, J channels of one, kk the kernel's taps.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.errors import RecoupError
from recoup.kernels.llvm import Target, host
from recoup.kernels.threads import over_rows
from recoup.nbsmt.combine import Recipe
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.emit_lists import LANES, QUAD, VECTOR, Form, images
from recoup.nbsmt.groups import Activation
from recoup.nbsmt.operand import alike, operands
from recoup.nbsmt.ports import UNSIGNED
from recoup.nbsmt.runs import NEEDED
from recoup.nbsmt.weights import WeightOperand
from recoup.network.convolution import Geometry

SPARSE = 2.0
"""What a quad costs here, in what one costs oneDNN, which multiplies zeros too."""

FIXED = 2.0
"""What the planes and adding the sums cost, in what one group costs oneDNN."""

VECTORS = 8
"""The most vectors of a tile: sums at work, in a register each."""

BLOCK = 1 << 19
"""Bytes of operands that stay in a second-level cache until they have become planes."""

PLANES = 1 << 22
"""Bytes of an image's planes up to which they stay in caches of one processor's own or of few."""

WORK = 1 << 18
"""Products that pay for one more thread."""


class Division(NamedTuple):
    """A weight operand's groups: those that oneDNN sums, and those that lists do."""

    dense: WeightOperand
    sparse: WeightOperand


def divided(operand: WeightOperand, config: NBSMT, zero: int, target: Target) -> Division | None:
    """Which groups lists sum; None where it does not pay, or cannot be done.

    Args:
        operand: of a convolution in one group.
        config: of the unit.
        zero: of the activation codes.
        target: the processor.
    """
    count = len(operand.activations)
    partners_apart = config.threads if config.pairing == "halves" else 1
    whole = operand.weight_OGJkk.shape[1] // count % (QUAD * partners_apart) == 0
    plain = zero == UNSIGNED and operand.bound < 2**24 and operand.weight_OGJkk.numel() > 0
    if count < 3 or not (whole and plain and target.features >= NEEDED):
        return None
    costs = [SPARSE * float(_quads(w).any(2).float().mean()) for w in parts(operand)]
    sparse = tuple(g for g, cost in enumerate(costs) if cost < 1)
    if len(sparse) - sum(costs[g] for g in sparse) < FIXED or len(sparse) == count:
        return None
    return Division(*(_chosen(operand, some) for some in (set(range(count)) - set(sparse), sparse)))


def parts(operand: WeightOperand) -> Sequence[Tensor]:
    """The weights of every group: int8 [O, J, kk]."""
    return operand.weight_OGJkk.chunk(len(operand.activations), 1)


def _chosen(operand: WeightOperand, groups: Iterable[int]) -> WeightOperand:
    """Some of the groups, in their order."""
    weights, kept = parts(operand), sorted(groups)
    activations = tuple(operand.activations[g] for g in kept)
    return WeightOperand(activations, torch.cat([weights[g] for g in kept], 1), operand.bound)


def _quads(w_OJkk: Tensor) -> Tensor:
    """Channels by fours: [O, Q, 4, kk]."""
    return w_OJkk.unflatten(1, (-1, QUAD))


class _Places:
    """Where the pixels of an image and of its output lie on a plane, phase of the stride by phase."""

    def __init__(self, geometry: Geometry, image: tuple[int, int]) -> None:
        self.size = geometry.outputs(image)
        (down, across), (H, W) = geometry.stride, image
        # So many rows and columns of a phase that every tap of every output lies on it.
        reach = [d * (k - 1) // s for d, k, s in zip(geometry.dilation, geometry.kernel, geometry.stride, strict=True)]
        self.rows, self.row = self.size[0] + reach[0], self.size[1] + reach[1]
        y, x = (torch.arange(n) for n in (self.rows * down, self.row * across))
        inside_y, inside_x = y - geometry.padding[0], x - geometry.padding[1]
        source = inside_y[:, None] * W + inside_x
        there = ((inside_y >= 0) & (inside_y < H))[:, None] & (inside_x >= 0) & (inside_x < W)
        source = torch.where(there, source, -1)
        self.sources = source.view(self.rows, down, self.row, across).permute(1, 3, 0, 2).flatten()
        taps = [[self._tap(geometry, i, j) for j in range(geometry.kernel[1])] for i in range(geometry.kernel[0])]
        self.taps = torch.tensor(taps)
        self.outputs = (self.size[0] - 1) * self.row + self.size[1]
        vectors = -(-self.outputs // LANES)
        # As few vectors as can be, one more a tile for what a step costs besides.
        self.vectors = min(range(1, VECTORS + 1), key=lambda some: -(-vectors // some) * (some + 1))
        self.tiles = -(-vectors // self.vectors)
        needed = int(self.taps.max()) + self.tiles * self.vectors * LANES
        needed = max(needed, len(self.sources))
        needed += -needed % LANES
        self.count = needed + LANES * (needed % 1024 == 0)  # rows of planes must not share the cache's few places
        self.sources = F.pad(self.sources, (0, self.count - len(self.sources)), value=-1)

    def _tap(self, geometry: Geometry, i: int, j: int) -> int:
        """Places from an output's to what a tap of the kernel meets."""
        y, x = geometry.dilation[0] * i, geometry.dilation[1] * j
        (down, across), size = geometry.stride, self.rows * self.row
        phase = y % down * across + x % across
        return phase * size + y // down * self.row + x // across

    def to(self, step: int) -> Tensor:
        """Where the output of every place lies, its pixels ``step`` apart; -1: it has none."""
        place = torch.arange(self.tiles * self.vectors * LANES)
        y, x = place // self.row, place % self.row
        return torch.where((y < self.size[0]) & (x < self.size[1]), (y * self.size[1] + x) * step, -1)


class Lists:
    """Some groups of a layer, for images of one size.

    Args:
        operand: the groups.
        config: of the unit.
        geometry: of a convolution in one group.
        image: height and width.

    Attributes:
        fits: whether the planes of an image stay in a cache near the processor.
    """

    def __init__(self, operand: WeightOperand, config: NBSMT, geometry: Geometry, image: tuple[int, int]) -> None:
        groups, self.places = operand.activations, _Places(geometry, image)
        self.outputs, self.groups = len(operand.weight_OGJkk), len(groups)
        self.channels = operand.weight_OGJkk.shape[1] // self.groups
        self.fits = self.groups * self.channels * self.places.count <= PLANES
        paired = _paired(groups)
        recipe = Recipe(alike(config, UNSIGNED), groups, self.channels if self.channels < VECTOR else 0, False)
        self.form, self.image = Form(recipe, paired, self.places.vectors), image
        planes_OQ4kk = torch.cat(list(_planes(parts(operand), paired)), 1)
        output, plane, i, j = planes_OQ4kk.any(2).nonzero(as_tuple=True)
        self._steps = torch.empty(len(output), 2, dtype=torch.int32)
        self._steps[:, 0] = QUAD * (plane * self.places.count + self.places.taps[i, j])
        self._steps[:, 1] = planes_OQ4kk.movedim(2, -1)[output, plane, i, j].contiguous().view(torch.int32)[:, 0]
        self._ends = F.pad(torch.bincount(output, minlength=self.outputs).cumsum(0), (1, 0))
        self._sources = torch.where(self.places.sources >= 0, self.places.sources * self.channels, -1)
        self._to = self.places.to(4 * self.outputs)

    @property
    def bytes(self) -> int:
        """What it holds."""
        return sum(tensor.nbytes for tensor in (self._steps, self._ends, self._sources, self._to, self.places.sources))

    def add(self, sums_NhwO: Tensor, x_NHWC: Tensor, scale: float, target: Target | None = None) -> None:
        """Add the groups' sums.

        Args:
            sums_NhwO: float32, contiguous, whole numbers that stay below 2^24.
            x_NHWC: float32 activations, contiguous, without faults.
            scale: of their codes.
            target: the processor; None: this one.
        """
        _check(sums_NhwO, (len(x_NHWC), *self.places.size, self.outputs), "sums")
        _check(x_NHWC, (len(x_NHWC), *self.image, self.channels), "x")
        N, H, W, C = x_NHWC.shape
        pixels, places, quads = H * W, self.places, C // QUAD
        image, out_image = pixels * C, 4 * self.outputs * places.size[0] * places.size[1]
        kernel = images(self.form, target or host()).bind(
            image=image, sources=self._sources.data_ptr(), places=places.count, quads=quads, tiles=places.tiles,
            outputs=self.outputs, steps=self._steps.data_ptr(), ends=self._ends.data_ptr(), to=self._to.data_ptr(),
            out_image=out_image,
        )  # fmt: skip
        block, out = max(1, BLOCK // image), sums_NhwO.data_ptr()
        x_BPC = x_NHWC.view(N, pixels, C)

        def run(first: int, last: int) -> None:
            held = torch.empty(min(block, last - first) * image + VECTOR, dtype=torch.uint8)
            memory = {
                "zeros": torch.zeros(C + VECTOR, dtype=torch.uint8),
                "codes": torch.empty(quads + -quads % LANES, places.count, dtype=torch.int32),
                "planes": torch.empty(self.groups * quads, places.count, dtype=torch.int32),
                "sums": torch.zeros(self.outputs + -self.outputs % LANES, places.vectors * LANES, dtype=torch.int32),
            }
            addresses = {name: tensor.data_ptr() for name, tensor in memory.items()}
            for start in range(first, last, block):
                some = x_BPC[start : min(start + block, last)]
                codes = held[: len(some) * image].view(-1, C)
                operands(some.flatten(0, 1), scale, NBSMT(threads=1), (Activation(),), out=codes, zero=UNSIGNED)
                kernel(first=0, last=len(some), x=codes.data_ptr(), out=out + out_image * start, **addresses)

        over_rows(run, N, image + places.outputs * len(self._steps), WORK)


def _check(x: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Refuse what the kernel cannot take, whose arguments are bare addresses."""
    if x.dtype != torch.float32 or tuple(x.shape) != shape or not x.is_contiguous() or not x.is_cpu:
        kind = f"{x.dtype} {list(x.shape)}, strides {list(x.stride())}, on {x.device}"
        raise RecoupError(f"Lists.add: {name} must be float32 {list(shape)}, contiguous, on the CPU; got {kind}")


def _paired(activations: Sequence[Activation]) -> tuple[bool, ...]:
    """Which groups share their quads with the next one: those that count the same partners, of w and q."""
    paired: list[bool] = []
    for g, activation in enumerate(activations):
        free = not (paired and paired[-1])
        alike = g + 1 < len(activations) and activation.partners == activations[g + 1].partners
        paired.append(free and alike)
    return tuple(paired)


def _planes(weights: Sequence[Tensor], paired: tuple[bool, ...]) -> Iterator[Tensor]:
    """The weights that the planes of the groups meet, in their order: int8 [O, Q, 4, kk] each."""
    taken = False
    for g, w_OJkk in enumerate(weights):
        if not taken:
            both = torch.stack([w_OJkk, weights[g + 1]], 2).flatten(1, 2) if paired[g] else w_OJkk
            yield both.unflatten(1, (-1, QUAD))
        taken = paired[g]
