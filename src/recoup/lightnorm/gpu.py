"""LightNorm's passes on CUDA: the Triton kernels of gpu_kernels.py; the same bits as the CPU.

Legend: x [N, C, P] contiguous; K chunks. With TRITON_INTERPRET=1 before triton is imported they take CPU tensors.
"""

# Triton's arguments are typed as its own compiler sees them:
# pyright: reportArgumentType=false, reportCallIssue=false

import contextlib
from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor

from recoup.errors import RecoupError
from recoup.formats import Float
from recoup.formats.constants import LAYOUTS
from recoup.kernels.operators import check_capability
from recoup.lightnorm.cpu_rounding import rounding_of
from recoup.lightnorm.gpu_kernels import (
    extrema_kernel,
    finite_kernel,
    gradient_kernel,
    join_kernel,
    moments_kernel,
    normalize_kernel,
    products_kernel,
)
from recoup.lightnorm.scale import sizes

__all__ = ["finite", "gradient", "moments", "normalize", "products"]

INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
LANES, STEPS = 512, 16  # of a piece's sum; a piece has their product of elements
TILE = 1024  # elements of a program of `normalize` and `gradient`
FLAT = 4096  # of `finite`
PAIRS = 128  # of extrema
MAX_ELEMENTS, MAX_PIECES = 1 << 30, 1 << 16
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite; waits for the device once."""
    found, size = torch.zeros(1, dtype=torch.int32, device=x.device), x.numel()
    if size == 0:
        return True
    _check(x)
    fraction = LAYOUTS[x.dtype].fraction
    absolute = torch.iinfo(INTEGERS[x.dtype]).max
    infinite = absolute >> fraction << fraction
    with _device_of(x):
        keys = x.contiguous().view(INTEGERS[x.dtype])
        finite_kernel[(triton.cdiv(size, FLAT),)](keys, found, size, infinite, absolute, FLAT, **OPTIONS)
    return not bool(found.item())


def moments(x: Tensor, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums as pairs float64 [C, 2]; the chunks' maxima and minima, float64 [C, K, 2], and indices, int64 [C, K, 2].

    Raises:
        RecoupError: a channel of 2^30 elements or more, or of 2^16 pieces; a GPU that is too old.
    """
    N, C, P = x.shape
    parts = sizes(N * P, chunks)
    short, longest = parts[-1], parts[0]
    pieces, steps = _pieces(longest)
    _check(x, chunks * pieces)
    options = {"dtype": torch.float64, "device": x.device}
    sums, ends = torch.empty(C, chunks, pieces, 2, **options), torch.empty(C, chunks, pieces, 2, **options)
    indices = torch.empty(C, chunks, pieces, 2, dtype=torch.int64, device=x.device)
    longer = sum(part > short for part in parts)
    with _device_of(x):
        moments_kernel[(C, chunks * pieces)](
            x, sums, ends, indices, C, P, pieces, chunks, short, longer, steps, LANES, **OPTIONS
        )
        return _joined(sums, ends, indices, min(P, longest) - 1)


def _joined(sums: Tensor, ends: Tensor, indices: Tensor, nowhere: int) -> tuple[Tensor, Tensor, Tensor]:
    """[C, K, pieces, 2] to [C, 2] and twice [C, K, 2]."""
    C, K, pieces, _ = sums.shape
    out = sums.new_empty(C, 2), ends.new_empty(C, K, 2), indices.new_empty(C, K, 2)
    size = triton.next_power_of_2(pieces)
    join_kernel[(C,)](sums, ends, indices, *out, pieces, K, nowhere, ends is not sums, size, **OPTIONS)
    return out


def normalize(
    x: Tensor,
    mean: Tensor,
    reciprocal: Tensor,
    scale: Tensor,
    shift: Tensor,
    format: Float | None,  # noqa: A002
    difference: Float | None = None,
) -> tuple[Tensor, Tensor]:
    """y = F(gamma xhat + beta) and xhat = F(D(x - mu) r), in x's dtype; the vectors are float64 [C]."""
    _check(x)
    y, xhat, (grid, shape, tile) = torch.empty_like(x), torch.empty_like(x), _tiles(x)
    vectors = [v.contiguous() for v in (mean, reciprocal, scale, shift)]
    numbers, constants = _rounding(format)
    numbers_D, constants_D = _rounding(difference)
    with _device_of(x):
        normalize_kernel[grid](
            x, xhat, y, *vectors, *shape, *numbers, *numbers_D, *constants, *constants_D, *tile, **OPTIONS
        )
    return y, xhat


def products(g: Tensor, xhat: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of g and of g xhat, as pairs float64 [C, 2]."""
    N, C, P = g.shape
    pieces, steps = _pieces(N * P)
    _check(g, pieces)
    plain, cross = (torch.empty(C, 1, pieces, 2, dtype=torch.float64, device=g.device) for _ in range(2))
    with _device_of(g):
        products_kernel[(C, pieces)](g, xhat, plain, cross, C, P, pieces, N * P, steps, LANES, **OPTIONS)
        none = torch.empty(0, dtype=torch.int64, device=g.device)
        return _joined(plain, plain, none, 0)[0], _joined(cross, cross, none, 0)[0]


def gradient(
    g: Tensor,
    mean: Tensor,
    slope: Tensor,
    amounts: Tensor,
    indices: Tensor,
    format: Float | None,  # noqa: A002
) -> Tensor:
    """dx = F'((g - m) slope, less the amount at a chunk's first maximum, plus it at its first minimum)."""
    _check(g)
    dx, (grid, shape, tile), (C, K) = torch.empty_like(g), _tiles(g), amounts.shape
    mean, slope, amounts, indices = (v.contiguous() for v in (mean, slope, amounts, indices))
    numbers, constants = _rounding(format)
    with _device_of(g):
        gradient_kernel[grid](g, dx, mean, slope, *shape, *numbers, *constants, *tile, **OPTIONS)
        if K > 0:
            arrays, size = (g, dx, mean, slope, amounts, indices), (C * K, C, g.shape[2], K)
            extrema_kernel[(triton.cdiv(C * K, PAIRS),)](*arrays, *size, *numbers, *constants, PAIRS, **OPTIONS)
    return dx


def _tiles(x: Tensor) -> tuple[tuple[int], tuple[int, int, int, int], tuple[int, int]]:
    """Grid; rows, channels, places and tiles of a row; rows and columns of a tile."""
    N, C, P = x.shape
    columns = min(TILE, triton.next_power_of_2(max(1, P)))
    rows, tiles = TILE // columns, triton.cdiv(P, columns)
    return (triton.cdiv(N * C, rows) * tiles,), (N * C, C, P, tiles), (rows, columns)


def _rounding(format: Float | None) -> tuple[tuple[int, ...], tuple[int, bool, bool]]:  # noqa: A002
    """The kernels' numbers and constants."""
    r = rounding_of(format)
    return (r.mask, r.low, r.top, r.spread, r.depth), (r.mode, bool(r.nearest), bool(r.flush))


def _pieces(elements: int) -> tuple[int, int]:
    """How many programs share a sum, and the steps of each; an empty sum has one too."""
    steps = triton.next_power_of_2(max(1, triton.cdiv(elements, LANES)))
    return max(1, triton.cdiv(elements, LANES * STEPS)), min(STEPS, steps)


def _device_of(x: Tensor) -> AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _check(x: Tensor, pieces: int = 1) -> None:
    elements = x.numel() // max(x.shape[1], 1)
    if elements >= MAX_ELEMENTS or pieces >= MAX_PIECES:
        raise RecoupError(
            f"LightNorm on CUDA: a channel has fewer than 2^30 elements, in fewer than 2^16 pieces (a chunk is one, "
            f"or several of {LANES * STEPS} elements); got {elements} elements and {pieces} pieces of "
            f"{list(x.shape)}: use smaller batches or fewer chunks"
        )
    check_capability(x, "LightNorm's")
