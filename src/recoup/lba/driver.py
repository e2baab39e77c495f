"""What a product does around its kernel, on any device: checks, plan, scaling, im2col, blocks.

Legend: B matrices of a batch, M rows, N columns, K terms; a convolution is a product with M output channels and one
column per output pixel, read straight from the padded image.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.formats import Int, quantize
from recoup.kernels.threads import over_rows
from recoup.lba.checks import (
    Faults,
    check_finite,
    check_products_fit,
    check_range,
    mark_convolution,
    mark_convolution_gradients,
    mark_gradients,
    mark_product,
)
from recoup.lba.config import LBA
from recoup.lba.plan import Extent, Plan, chunk_bound, plan
from recoup.lba.reference import mix
from recoup.network.convolution import Geometry

IMAGE_BYTES = 1 << 26  # of a padded block of images
LANES = 16  # columns computed together, roughly, on any machine
FLOAT32 = 4  # bytes of an operand's element
MINIMUM_WORK = 1 << 18  # multiply-adds that pay for one more thread
PLACES_KEPT = 1 << 18  # of a geometry's pixels, 8 bytes each
GRADIENT_BYTES = 1 << 26  # of the columns' gradients


@dataclass(frozen=True, slots=True)
class Columns:
    """Where the elements of B [K, N] lie in a buffer: at ``terms[k] + columns[n]``; int64 on the buffer's device.

    Attributes:
        matrix: elements from one matrix of the batch to the next.
        regular: shape and strides [K, N] of which terms and columns are the multiples; None: they are none.
        known: what a machine has found out about them, for those that lie alike; None: each finds out for itself.
    """

    source: Tensor
    terms: Tensor
    columns: Tensor
    matrix: int
    regular: tuple[int, int, int, int] | None = None
    known: dict[Hashable, Any] | None = None


@dataclass(frozen=True, slots=True)
class Index:
    """What random bits depend on: the seed and an output's index ``first + batch * matrix + row * i + j``."""

    seed: int
    first: int
    matrix: int
    row: int

    @property
    def base(self) -> int:
        """The seed, mixed once, as the kernels take it."""
        return int(mix(torch.tensor(self.seed))) if self.seed else 0


class Machine(Protocol):
    """A device's kernels."""

    @property
    def fma(self) -> bool:
        """Whether multiply-add is one instruction."""
        ...

    @property
    def resident(self) -> int | None:
        """Bytes of a large operand to look at and to multiply before the next ones; None: all at once."""
        ...

    def extent(self, x: Tensor) -> Extent:
        """What float32 numbers reach."""
        ...

    def product(
        self, x: Tensor, columns: Columns, chosen: Plan, config: LBA, index: Index, images: Tensor | None = None
    ) -> Any:
        """x [B, M, K] times the columns: float32 [B, M, N], `finished`.

        Columns that are the pixels of ``images``, float32 [N, M, ...], may go there instead; it then gives None.
        """
        ...

    def gradients(
        self, x: Tensor, columns: Columns, grad: Tensor, chosen: Plan, config: LBA, index: Index
    ) -> tuple[Tensor, Tensor]:
        """x [B, M, K], not scaled, and grad [B, M, N] -> gradients [B, M, K] and [B, K, N]."""
        ...


def matmul(
    machine: Machine, a: Tensor, b: Tensor, config: LBA, seed: int = 0, names: tuple[str, str] = ("a", "b")
) -> Tensor:
    """a [B, M, K] b [B, K, N] -> [B, M, N]; see `recoup.lba.matmul`. ``names``: what errors call a and b."""
    B, M, K = a.shape
    N = b.shape[2]
    if 0 in (B, M, N, K):
        return a.new_zeros(B, M, N)
    y = in_blocks(machine, a, b, config, seed)
    if y is not None:
        return y
    reach = machine.extent(a), machine.extent(b)
    a, b, faults = check_finite(a, b, (reach[0].finite, reach[1].finite), config, names)
    if faults:
        return mark_product(matmul(machine, a, b, config, seed), faults)
    check_products_fit(a, b, config)
    whole = isinstance(config.accumulator, Int) and is_whole(a) and is_whole(b)
    if whole and wraps(config, K * reach[0].largest * reach[1].largest):
        return wrapped(a.double() @ b.double(), config)
    if not config.stochastic and turned((a.shape[1], b.shape[2]), b.stride(1) == 1):
        return _product(machine, b.mT, a.mT, (reach[1], reach[0]), config, seed, whole).mT.contiguous()
    return _product(machine, a, b, reach, config, seed, whole)


def turned(size: tuple[int, int], in_columns: bool) -> bool:
    """Whether the columns of a product [M, N] become its rows: few columns would leave lanes idle.

    As many rows as columns' vectors either way: where b lies ``in_columns`` and is the larger one, because rows are
    read where they lie. Random bits go by rows, so stochastic rounding stays as it is.
    """
    M, N = size
    as_is, other = M * -(-N // LANES), N * -(-M // LANES)  # outputs computed, roughly: whole vectors
    return other < as_is or (other == as_is and N > M and in_columns)


def in_blocks(machine: Machine, a: Tensor, b: Tensor, config: LBA, seed: int) -> Tensor | None:
    """`matmul` of one large and one small operand, block by block of the large one, each planned for its own numbers.

    A block is still in the caches when it is multiplied, so memory is read once, where the look at all numbers and the
    product would each take a pass. None: the operands are not such, or not finite.
    """
    if machine.resident is None or a.shape[0] != 1 or isinstance(config.accumulator, Int):
        return None
    if not config.stochastic and turned((a.shape[1], b.shape[2]), b.stride(1) == 1):
        y = _in_blocks(machine, b.mT, a.mT, config, seed)
        return None if y is None else y.mT.contiguous()
    return _in_blocks(machine, a, b, config, seed)


def _in_blocks(machine: Machine, a: Tensor, b: Tensor, config: LBA, seed: int) -> Tensor | None:
    assert machine.resident is not None
    K, limit = a.shape[2], machine.resident // FLOAT32
    by_rows = a.numel() >= b.numel()
    small, large = (b, a[0]) if by_rows else (a, b[0].mT)
    if small.numel() > limit or large.numel() < 2 * limit or large.stride() != (K, 1):
        return None
    partner, N, step = machine.extent(small), b.shape[2], max(1, limit // K)
    parts: list[Tensor | None] = [None] * -(-len(large) // step)

    def work(first: int, last: int) -> None:
        for i in range(first, last):
            start = i * step
            some = large[start : start + step]
            extent = machine.extent(some)
            if not extent.finite:
                return
            reach, uses = (extent, partner), small.numel() // K
            x, w, index = some[None], small, Index(seed, start * N, 0, N)
            if not by_rows:
                reach, x, w, index = (partner, extent), small, some.mT[None], Index(seed, start, 0, N)
            chosen = _plan(machine, x, reach, uses if by_rows else len(some), config, False)
            parts[i] = machine.product(x, matrix_columns(w), chosen, config, index)

    if partner.finite:
        over_rows(work, len(parts), step * small.numel(), MINIMUM_WORK)
    done = [part for part in parts if part is not None]
    return torch.cat(done, 1 if by_rows else 2) if len(done) == len(parts) else None


def is_whole(x: Tensor) -> bool:
    """Whether every element is a whole number."""
    x = x.detach()
    return torch.equal(x, x.trunc())


def wraps(config: LBA, bound: float) -> bool:
    """Whether the sum is exact arithmetic modulo a power of two, in any order, and float64 holds it."""
    modular = isinstance(config.accumulator, Int) and config.accumulator.overflow == "wrap"
    return modular and config.scale == 1 and config.product is None and config.promotion is None and bound < 2**53


def wrapped(sums: Tensor, config: LBA) -> Tensor:
    """Whole sums, wrapped once: wrapping at every step is the same."""
    return quantize(sums, config.accumulator).float()


def _product(
    machine: Machine, x: Tensor, w: Tensor, reach: tuple[Extent, Extent], config: LBA, seed: int, whole: bool
) -> Tensor:
    M, N = x.shape[1], w.shape[2]
    chosen = _plan(machine, x, reach, N, config, whole)
    return machine.product(x, matrix_columns(w), chosen, config, Index(seed, 0, M * N, N))


def _plan(machine: Machine, x: Tensor, reach: tuple[Extent, Extent], uses: int, config: LBA, whole: bool) -> Plan:
    bound = chunk_bound(x, reach[0].largest, reach[1].largest, uses, config)
    return plan(*reach, bound, config, machine.fma, whole)


def matrix_columns(w: Tensor) -> Columns:
    """The columns of matrices [B, K, N] with any strides."""
    w = w.detach()
    if min(w.stride()[1:]) < 0 or (w.stride(2) != 1 and w.stride(1) != 1):
        w = w.contiguous()
    (matrix, down, across), (K, N) = w.stride(), w.shape[1:]
    return Columns(w, _multiples(K, down, w.device), _multiples(N, across, w.device), matrix, (K, N, down, across))


@lru_cache(maxsize=64)
def _multiples(count: int, step: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device) * step


def scaled(x: Tensor, chosen: Plan) -> Tensor:
    """The rows' operand as the kernel takes it: contiguous and scaled, with zeros for what is zero to the unit."""
    x = x.detach()
    if chosen.a_least > 0:
        x = torch.where(x.abs() < chosen.a_least, 0.0, x)
    return (x * 2.0**chosen.a_scale).contiguous() if chosen.a_scale else x.contiguous()


def finished(y: Tensor, chosen: Plan) -> Tensor:
    """Sums at their own scale, as float32, which saturates beyond its range; zeros positive."""
    y = y * 2.0**chosen.unscale if chosen.unscale else y
    if y.dtype == torch.float64 or chosen.unscale > 0:  # an accumulator may reach further than float32
        top = torch.finfo(torch.float32).max
        y = y.clamp(-top, top).float()
    return y + 0.0


def convolution(machine: Machine, x: Tensor, weight: Tensor, geometry: Geometry, config: LBA, seed: int = 0) -> Tensor:
    """x [N, C, H, W] and weight [O, C / groups, kh, kw] -> [N, O, h, w]."""
    N, outputs, G = x.shape[0], weight.shape[0], geometry.groups
    size = geometry.size(x)
    if 0 in (weight.numel(), x.numel()):
        return x.new_zeros(N, outputs, *size)
    reach = machine.extent(weight), machine.extent(x)
    weight, x, faults = check_finite(weight, x, (reach[0].finite, reach[1].finite), config, ("weight", "input"))
    if faults:
        return mark_convolution(convolution(machine, x, weight, geometry, config, seed), faults, geometry)
    check_range(weight, x, G, config)
    rows = weight.reshape(G, outputs // G, -1)
    whole = isinstance(config.accumulator, Int) and is_whole(weight) and is_whole(x)
    if whole and wraps(config, rows.shape[2] * reach[0].largest * reach[1].largest):
        sums = F.conv2d(
            x.double(), weight.double(), None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        )
        return wrapped(sums, config)
    chosen = _plan(machine, rows, reach, N * size[0] * size[1], config, whole)
    y = x.new_empty(N, outputs, *size)
    P = size[0] * size[1]
    for start, block in _blocks(x):
        columns = pixels(pad_image(block, geometry), geometry, size)
        index = Index(seed, start * P, outputs // G * N * P, N * P)
        images = y[start : start + len(block)]
        sums = machine.product(rows, columns, chosen, config, index, images)
        if sums is not None:
            images.copy_(sums.reshape(outputs, len(block), *size).transpose(0, 1))
    return y


def pad_image(x: Tensor, geometry: Geometry) -> Tensor:
    """Images with their zero padding, contiguous."""
    high, wide = geometry.padding
    return F.pad(x.detach(), [wide, wide, high, high]).contiguous()


def _blocks(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Images by so many that a block and its sums stay small."""
    images = max(1, IMAGE_BYTES // (4 * max(1, x[0].numel())))
    for start in range(0, x.shape[0], images):
        yield start, x[start : start + images]


def pixels(source: Tensor, geometry: Geometry, size: tuple[int, int]) -> Columns:
    """The columns of im2col within padded images [N, C, H, W]."""
    N, channels, H, W = source.shape
    few = N * size[0] * size[1] <= PLACES_KEPT
    terms, places, known = (_lie if few else _lie.__wrapped__)(source.shape, geometry, size, source.device)
    return Columns(source, terms, places, channels // geometry.groups * H * W, None, known if few else None)


@lru_cache(maxsize=8)
def _lie(
    shape: torch.Size, geometry: Geometry, size: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor, dict[Hashable, Any]]:
    """Terms and places of `pixels`, and what is known about them: layers of one geometry share them."""
    N, channels, H, W = shape
    C = channels // geometry.groups
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel, geometry.stride, geometry.dilation
    terms = _outer((C, H * W), (kh, dh * W), (kw, dw), device=device)
    return terms, _outer((N, channels * H * W), (size[0], sh * W), (size[1], sw), device=device), {}


def _outer(*counts: tuple[int, int], device: torch.device) -> Tensor:
    """All sums of one multiple of each (count, step), the last varying fastest."""
    total = torch.zeros(1, dtype=torch.int64, device=device)
    for count, step in counts:
        total = (total[:, None] + torch.arange(count, device=device) * step).reshape(-1)
    return total


def gradients(
    machine: Machine, a: Tensor, b: Tensor, grad: Tensor, config: LBA, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Gradients of a [B, M, K] and b [B, K, N] for grad [B, M, N]; see `reference.gradients`.

    Rows of a and columns of b that reach a NaN output of operands that were not finite get NaN.
    """
    B, M, K = a.shape
    N = b.shape[2]
    if 0 in (B, M, N, K):
        return torch.zeros_like(a), torch.zeros_like(b)
    chosen, a, b, faults = _gradient_plan(machine, a, b, config)
    if faults:
        return mark_gradients(*gradients(machine, a, b, grad, config, seed), faults)
    return machine.gradients(a.detach(), matrix_columns(b), grad.detach(), chosen, config, Index(seed, 0, M * N, N))


def convolution_gradients(
    machine: Machine, grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, config: LBA, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, C, H, W] and weight [O, C / groups, kh, kw] for grad [N, O, h, w]."""
    N, outputs, G = x.shape[0], weight.shape[0], geometry.groups
    size = geometry.size(x)
    P, K = size[0] * size[1], weight[0].numel()
    grad_x, grad_w = torch.zeros_like(x), weight.new_zeros(G, outputs // G, K)
    if 0 in (grad.numel(), weight.numel()):
        return grad_x, grad_w.view(weight.shape)
    chosen, weight, x, faults = _gradient_plan(machine, weight, x, config)
    if faults:
        found = convolution_gradients(machine, grad, x, weight, geometry, config, seed)
        return mark_convolution_gradients(*found, grad, faults, geometry)
    rows = weight.detach().reshape(G, outputs // G, K)
    images = max(1, GRADIENT_BYTES // (4 * G * K * P))
    for start in range(0, N, images):
        block = x[start : start + images]
        columns = pixels(pad_image(block, geometry), geometry, size)
        g = grad[start : start + images].reshape(len(block), G, outputs // G, P).permute(1, 2, 0, 3)
        index = Index(seed, start * P, outputs // G * N * P, N * P)
        g = g.reshape(G, outputs // G, -1).detach()
        part, spread = machine.gradients(rows, columns, g, chosen, config, index)
        grad_w += part
        grad_x[start : start + images] = geometry.image(spread.contiguous(), block.shape)
    return grad_x, grad_w.view(weight.shape)


def _gradient_plan(machine: Machine, a: Tensor, b: Tensor, config: LBA) -> tuple[Plan, Tensor, Tensor, Faults]:
    """How to compute, with the operands as `check_finite` leaves them."""
    reach = machine.extent(a), machine.extent(b)
    a, b, faults = check_finite(a, b, (reach[0].finite, reach[1].finite), config)
    return plan(*reach, float("inf"), config, machine.fma), a, b, faults
