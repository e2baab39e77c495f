"""The narrow accumulator on the CPU: plans, scales, pads and runs the kernels over the thread pool.

Legend: B matrices of a batch, M rows, N columns, K terms; a convolution is a product with M output channels and one
column per output pixel, packed from the image straight into the kernels' panels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.errors import RecoupError
from recoup.formats import Int, quantize
from recoup.lba.checks import check_finite, check_products_fit, check_range, mark_convolution, mark_product
from recoup.lba.config import LBA
from recoup.lba.cpu_plan import Extent, Plan, chunk_bound, plan, shape
from recoup.lba.emit import Shape, build
from recoup.lba.geometry import Geometry
from recoup.lba.reference import mix
from recoup.llvm import Target, host
from recoup.threads import over_rows

_target: ContextVar[Target | None] = ContextVar("recoup_lba_target", default=None)
BLOCK_BYTES = 1 << 26  # of a padded image block
MINIMUM_WORK = 1 << 18  # multiply-adds that pay for one more thread


@contextmanager
def target(level: str | None) -> Iterator[None]:
    """Emulate with the instructions of ``x86-64`` (SSE2), ``haswell`` (AVX2, FMA) or ``skylake-avx512``; None: all.

    The processor must have them. The bits are the same.
    """
    wanted = None if level is None else Target.named(level)
    if wanted is not None and not wanted.features <= host().features:
        missing = ", ".join(sorted(wanted.features - host().features))
        raise RecoupError(f"lba.cpu.target({level!r}): this processor lacks {missing}")
    token = _target.set(wanted)
    try:
        yield
    finally:
        _target.reset(token)


def current_target() -> Target:
    """The processor that kernels are built for."""
    return _target.get() or host()


@dataclass(frozen=True, slots=True)
class Columns:
    """Where the elements of B [K, N] lie in a buffer: at ``terms[k] + columns[n]``."""

    source: Tensor
    terms: np.ndarray
    columns: np.ndarray
    matrix: int  # elements from one matrix of the batch to the next

    def padded(self, lanes: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Columns up to a multiple of ``width`` (the last repeated); which vectors of ``lanes`` lie side by side."""
        short = -len(self.columns) % width
        columns = np.concatenate([self.columns, np.repeat(self.columns[-1:], short)]) if short else self.columns
        steps = np.diff(columns.reshape(-1, lanes), axis=1)
        return columns, np.ascontiguousarray((steps == 1).all(1), dtype=np.uint8)


def matmul(a: Tensor, b: Tensor, config: LBA, seed: int = 0) -> Tensor:
    """a [B, M, K] b [B, K, N] -> [B, M, N]; see `recoup.lba.matmul`."""
    B, M, K = a.shape
    N = b.shape[2]
    if 0 in (B, M, N, K):
        return a.new_zeros(B, M, N)
    reach = Extent.of(a), Extent.of(b)
    a, b, faults = check_finite(a, b, (reach[0].finite, reach[1].finite), config)
    if faults:
        return mark_product(matmul(a, b, config, seed), faults)
    check_products_fit(a, b, config)
    whole = isinstance(config.accumulator, Int) and is_whole(a) and is_whole(b)
    if whole and wraps(config, K * reach[0].largest * reach[1].largest):
        return wrapped(a.double() @ b.double(), config)
    # Few columns would leave lanes idle. Random bits go by rows, so stochastic rounding stays as it is.
    if not config.stochastic and _padded(N, M) < _padded(M, N):
        return _product(b.mT, a.mT, (reach[1], reach[0]), config, seed, whole).mT.contiguous()
    return _product(a, b, reach, config, seed, whole)


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


def _padded(M: int, N: int) -> int:
    """Outputs computed for M x N, roughly: whole vectors of 16."""
    return M * -(-N // 16)


def _product(x: Tensor, w: Tensor, reach: tuple[Extent, Extent], config: LBA, seed: int, whole: bool = False) -> Tensor:
    M, N = x.shape[1], w.shape[2]
    chosen = _plan(x, reach, N, config, whole)
    columns = matrix_columns(w)
    y = _run(scaled(x, chosen), columns, chosen, config, Index(seed, 0, M * N, N))
    return finished(y, chosen)


def _plan(x: Tensor, reach: tuple[Extent, Extent], uses: int, config: LBA, whole: bool) -> Plan:
    bound = chunk_bound(x, reach[0].largest, uses, config) * reach[1].largest
    return plan(*reach, bound, config, current_target(), whole)


def matrix_columns(w: Tensor) -> Columns:
    """The columns of matrices [B, K, N] with any strides."""
    w = w.detach()
    K, N = w.shape[1:]
    if min(w.stride()[1:]) < 0 or (w.stride(2) != 1 and w.stride(1) != 1):
        w = w.contiguous()
    return Columns(w, np.arange(K) * w.stride(1), np.arange(N) * w.stride(2), w.stride(0))


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


def scaled(x: Tensor, chosen: Plan) -> Tensor:
    """The rows' operand as the kernel takes it: contiguous and scaled, with zeros for what is zero to the unit."""
    x = x.detach()
    if chosen.a_least > 0:
        x = torch.where(x.abs() < chosen.a_least, 0.0, x)
    return (x * 2.0**chosen.a_scale).contiguous() if chosen.a_scale else x.contiguous()


def finished(y: Tensor, chosen: Plan) -> Tensor:
    """Sums at their own scale, as float32; zeros positive."""
    y = y * 2.0**chosen.unscale if chosen.unscale else y
    if y.dtype == torch.float64:
        top = torch.finfo(torch.float32).max
        y = y.clamp(-top, top).float()
    return y + 0.0


def _run(x: Tensor, columns: Columns, chosen: Plan, config: LBA, index: Index) -> Tensor:
    """The kernel over all matrices: x [B, M, K] scaled -> [B, M, N] in the kernel's element type and scale."""
    B, M, K = x.shape
    N = len(columns.columns)
    tile = fitted(shape(chosen.form, current_target()), M, N)
    native = build(chosen.form, tile, current_target())
    tiles = -(-M // tile.rows)
    places, straight = columns.padded(tile.lanes, tile.columns)
    panels = len(places) // tile.columns
    rows = F.pad(x, [0, 0, 0, tiles * tile.rows - M]) if M % tile.rows else x
    y = torch.empty(B, tiles * tile.rows, len(places), dtype=torch.float64 if chosen.form.wide else torch.float32)
    terms, scratch_type = np.ascontiguousarray(columns.terms), np.float64 if chosen.form.wide else np.float32
    chunk = min(config.chunk or K, K)
    size = y.element_size()

    def call(batch: int, panel: tuple[int, int], row_tile: tuple[int, int], scratch: np.ndarray) -> None:
        row = row_tile[0] * tile.rows
        native(
            *panel,
            row_tile[1] - row_tile[0],
            K,
            chunk,
            rows.data_ptr() + 4 * K * (batch * tiles * tile.rows + row),
            K,
            columns.source.data_ptr() + 4 * batch * columns.matrix,
            terms.ctypes.data,
            places.ctypes.data,
            straight.ctypes.data,
            2.0**chosen.b_scale,
            chosen.b_least_bits,
            y.data_ptr() + size * len(places) * (batch * tiles * tile.rows + row),
            len(places),
            chosen.floats.ctypes.data,
            chosen.integers.ctypes.data,
            scratch.ctypes.data,
            index.base,
            index.first + batch * index.matrix + row * index.row,
            index.row,
            1,
        )

    def over_panels(first: int, last: int) -> None:
        scratch = np.empty(K * tile.columns, scratch_type)
        for batch in range(first // panels, (last - 1) // panels + 1):
            begin, end = max(first - batch * panels, 0), min(last - batch * panels, panels)
            call(batch, (begin, end), (0, tiles), scratch)

    def over_tiles(first: int, last: int) -> None:
        scratch = np.empty(K * tile.columns, scratch_type)
        for batch in range(B):
            call(batch, (0, panels), (first, last), scratch)

    work = tile.rows * tile.columns * K
    if B * panels < 2 * torch.get_num_threads() and tiles > B * panels:
        over_rows(over_tiles, tiles, work * B * panels, MINIMUM_WORK)
    else:
        over_rows(over_panels, B * panels, work * tiles, MINIMUM_WORK)
    return y[:, :M, :N]


def fitted(whole: Shape, M: int, N: int) -> Shape:
    """A smaller tile where rows or columns are few."""
    tiles = -(-M // whole.rows)
    return Shape(whole.lanes, -(-M // tiles), 1 if whole.lanes >= N else whole.vectors)


def convolution(x: Tensor, weight: Tensor, geometry: Geometry, config: LBA, seed: int = 0) -> Tensor:
    """x [N, C, H, W] and weight [O, C / groups, kh, kw] -> [N, O, h, w]."""
    N, outputs, G = x.shape[0], weight.shape[0], geometry.groups
    size = geometry.size(x)
    if weight.numel() == 0:
        return x.new_zeros(N, outputs, *size)
    reach = Extent.of(weight), Extent.of(x)
    weight, x, faults = check_finite(weight, x, (reach[0].finite, reach[1].finite), config, ("weight", "input"))
    if faults:
        return mark_convolution(convolution(x, weight, geometry, config, seed), faults, geometry)
    check_range(weight, x, config)
    rows = weight.reshape(G, outputs // G, -1)
    whole = isinstance(config.accumulator, Int) and is_whole(weight) and is_whole(x)
    if whole and wraps(config, rows.shape[2] * reach[0].largest * reach[1].largest):
        sums = F.conv2d(
            x.double(), weight.double(), None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        )
        return wrapped(sums, config)
    chosen = _plan(rows, reach, N * size[0] * size[1], config, whole)
    rows = scaled(rows, chosen)
    y = x.new_empty(N, outputs, *size)
    P = size[0] * size[1]
    for start, block in _blocks(x):
        columns = pixels(pad_image(block, geometry), geometry, size)
        index = Index(seed, start * P, outputs // G * N * P, N * P)
        sums = finished(_run(rows, columns, chosen, config, index), chosen)
        y[start : start + len(block)] = sums.reshape(outputs, len(block), *size).transpose(0, 1)
    return y


def pad_image(x: Tensor, geometry: Geometry) -> Tensor:
    """Images with their zero padding, contiguous."""
    high, wide = geometry.padding
    return F.pad(x.detach(), [wide, wide, high, high]).contiguous()


def _blocks(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Images by so many that a block and its sums stay small."""
    images = max(1, BLOCK_BYTES // (4 * max(1, x[0].numel())))
    for start in range(0, x.shape[0], images):
        yield start, x[start : start + images]


def pixels(source: Tensor, geometry: Geometry, size: tuple[int, int]) -> Columns:
    """The columns of im2col within padded images [N, C, H, W]."""
    N, channels, H, W = source.shape
    C = channels // geometry.groups
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel, geometry.stride, geometry.dilation
    terms = _outer(np.arange(C) * H * W, np.arange(kh) * dh * W, np.arange(kw) * dw)
    places = _outer(np.arange(N) * channels * H * W, np.arange(size[0]) * sh * W, np.arange(size[1]) * sw)
    return Columns(source, terms, places, C * H * W)


def _outer(*offsets: np.ndarray) -> np.ndarray:
    """All sums of one offset of each, the last varying fastest."""
    total = offsets[0]
    for more in offsets[1:]:
        total = (total[:, None] + more).reshape(-1)
    return total
