"""LightNorm's fused passes on the CPU: `passes` in two passes over x and two over the gradient, bit for bit the same.

Float32 without formats, and formats that truncate and have no subnormals (FP10 among them), with or without blocks,
take emitted kernels; all else, and a tensor with a value beyond its format's largest, those of general.py.
Every function gives None where an input is NaN or infinite: `passes` then takes the separate passes of cpu.py, which
find the channels.

Legend: x [N, C, P]; K chunks.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recoup.kernels.memory import fresh
from recoup.kernels.threads import over_rows
from recoup.kernels.vector import FOUND
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.cpu import _segments, rounding
from recoup.lightnorm.fused import general
from recoup.lightnorm.fused.build import Recipe, kernel, recipe, small_products
from recoup.lightnorm.fused.statistics import batch_statistics, gradient_statistics, parameters, running_statistics
from recoup.lightnorm.fused.tile_ir import LANES
from recoup.lightnorm.scale import factors

TILE, SHORTEST, LONGEST = 8192, 64, 1024  # elements of a tile; places of it, at least and at most
PANEL = 4096  # contiguous elements that a pass with sums reads before it goes to the next sample
STREAM = 1 << 25  # bytes of a result that the caches would not keep for its reader
DEPTH = 4  # vectors of float64 that a channel's sums take


class Plan(NamedTuple):
    """What a shape and a configuration fix.

    Attributes:
        sums: arguments of passes with sums before the range: tiles, their number, C, P, channels of a panel and of a
            block, pitch of scratch rows.
        rows: panels; how many elements each has.
        results: of passes with results: tiles, offsets, C, P, channels of a block, blocks, pitch.
        result_rows: samples' blocks; how many elements each has.
        scratch: float32 elements of scratch; lanes: float64 elements.
        forward, backward: how to build.
        products: ways to add up gradients, and the largest magnitude as bits up to which each holds.
        constants: C(m_k), float64 [K].
        roundings: of parameters, statistics and the gradient's statistics.
        held: arrays whose addresses are in ``sums`` and ``results``.
    """

    sums: tuple[int, ...]
    rows: tuple[int, int]
    results: tuple[int, ...]
    result_rows: tuple[int, int]
    scratch: int
    lanes: int
    forward: Recipe | None
    backward: Recipe | None
    products: tuple[tuple[Recipe, int], ...]
    constants: np.ndarray
    roundings: tuple[tuple[int, ...], ...]
    held: tuple[np.ndarray, ...]


@lru_cache(maxsize=256)
def plan(config: LightNorm, chunks: int, dtype: torch.dtype, N: int, C: int, P: int) -> Plan:
    """The plan of a call; ``chunks`` 0 where there are no batch statistics."""
    block = min(config.block or 1, C)
    longest = min(LONGEST, max(SHORTEST, TILE // block // LANES * LANES))
    tiles = general.tiles_of(_segments(N, P, max(chunks, 1)), longest)
    offsets = np.searchsorted(tiles[:, 0], np.arange(N + 1)).astype(np.int64)
    aligned = not P % LANES and not (tiles[:, 1:3] % LANES).any()
    stream = aligned and N * C * P * dtype.itemsize >= STREAM
    pitch = (-(-int((tiles[:, 2] - tiles[:, 1]).max()) // LANES) + 1) * LANES  # rows never a page apart
    panel, blocks = min(C, -(-PANEL // (block * P)) * block), -(-C // block)
    fore = recipe(config.forward, config.forward_blocks, dtype, C, N * P, stream)
    back = recipe(config.backward, config.backward_blocks, dtype, C, N * P, stream)
    return Plan(
        sums=(tiles.ctypes.data, len(tiles), C, P, panel, block, pitch),
        rows=(-(-C // panel), N * panel * P),
        results=(tiles.ctypes.data, offsets.ctypes.data, C, P, block, blocks, pitch),
        result_rows=(N * blocks, block * P),
        scratch=(block + 2) * pitch + FOUND,
        lanes=panel * DEPTH * LANES,
        forward=fore,
        backward=back,
        products=_products(config, fore, back, N * P),
        constants=factors(N * P, chunks, config.scale) if chunks else np.empty(0),
        roundings=(rounding(config.forward), rounding(config.statistics), rounding(config.gradient_statistics)),
        held=(tiles, offsets),
    )


def _products(
    config: LightNorm, forward: Recipe | None, backward: Recipe | None, elements: int
) -> tuple[tuple[Recipe, int], ...]:
    """The ways to add up gradients, the fastest first."""
    if backward is None:
        return ()
    small = None
    if forward is not None and config.forward is not None and config.backward is not None:
        small = small_products(backward, config.backward, config.forward, elements)
    exact = backward, backward.top
    return (exact,) if small is None else (small, exact)


def _doubles(*shape: int) -> Tensor:
    """Not filled; on the CPU in this dtype, whatever torch's defaults are."""
    return torch.empty(shape, dtype=torch.float64, device="cpu")


def _scratch(p: Plan) -> Tensor:
    return torch.empty(p.scratch, dtype=torch.float32, device="cpu")


def _add_up(name: str, how: Recipe, top: int, p: Plan, arrays: tuple[Tensor, ...], *more: int) -> bool:
    """Run a pass with sums; whether no magnitude is above a limit."""
    call, peaks = kernel(name, how), []
    pointers = [v.data_ptr() for v in arrays]

    def part(first: int, last: int) -> None:
        scratch, lanes = _scratch(p), _doubles(p.lanes)
        peak = np.empty(1, np.int32)
        call(*p.sums, first, last, scratch.data_ptr(), lanes.data_ptr(), peak.ctypes.data, *pointers, *more)
        peaks.append(int(peak[0]))

    over_rows(part, *p.rows)
    return max(peaks) <= top


def _write(name: str, how: Recipe, p: Plan, arrays: tuple[Tensor, ...], *more: int) -> bool:
    """Run a pass with results; whether all values are within the format."""
    call, peaks = kernel(name, how), []
    pointers = [v.data_ptr() for v in arrays]

    def part(first: int, last: int) -> None:
        scratch, peak = _scratch(p), np.empty(1, np.int32)
        call(*p.results, first, last, scratch.data_ptr(), peak.ctypes.data, *pointers, *more)
        peaks.append(int(peak[0]))

    over_rows(part, *p.result_rows)
    return max(peaks) <= how.top


def forward(
    x: Tensor, gamma: Tensor, beta: Tensor, config: LightNorm, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Training; see `passes.forward`."""
    (N, C, P), K = x.shape, config.chunks
    p = plan(config, K, x.dtype, N, C, P)
    found = None if p.forward is None else _forward(x, gamma, beta, p, p.forward, K, eps)
    return general.forward(x, gamma, beta, config, eps) if found is None else found


def _forward(
    x: Tensor, gamma: Tensor, beta: Tensor, p: Plan, how: Recipe, K: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    N, C, P = x.shape
    sums, ends = _doubles(C, 2), _doubles(C, K, 2)
    indices = torch.empty(C, K, 2, dtype=torch.int64, device="cpu")
    if not _add_up("moments", how, how.top, p, (x, sums, ends, indices), K):
        return None
    vectors, s = _doubles(4, C), _doubles(C)
    fine = batch_statistics(
        sums.numpy(), ends.numpy(), p.constants, N * P, eps, p.roundings[1], vectors.numpy(), s.numpy()
    )
    found = _normalized(x, gamma, beta, p, how, vectors) if fine else None
    return None if found is None else (*found, vectors[0].clone(), s, vectors[1].clone(), indices)


def infer(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, config: LightNorm, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Evaluation; see `passes.infer`."""
    p = plan(config, 0, x.dtype, *x.shape)
    found = None
    if p.forward is not None:
        vectors = _doubles(4, x.shape[1])
        deviation = (var.detach().double() + eps).sqrt()  # torch's root, which is the reference's, may be an ulp off
        running_statistics(mean.detach().numpy(), deviation.numpy(), p.roundings[1], vectors.numpy())
        results = _normalized(x, gamma, beta, p, p.forward, vectors)
        found = None if results is None else (*results, vectors[1].clone())
    return general.infer(x, gamma, beta, mean, var, config, eps) if found is None else found


def _normalized(
    x: Tensor, gamma: Tensor, beta: Tensor, p: Plan, how: Recipe, vectors: Tensor
) -> tuple[Tensor, Tensor] | None:
    parameters(gamma.detach().numpy(), beta.detach().numpy(), p.roundings[0], vectors.numpy())
    y, xhat = fresh(x), fresh(x)
    return (y, xhat) if _write("normalize", how, p, (x, xhat, y, vectors)) else None


def backward(
    grad: Tensor, xhat: Tensor, r: Tensor, gamma: Tensor, indices: Tensor, config: LightNorm
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients; see `passes.backward`."""
    p = plan(config, indices.shape[1], grad.dtype, *grad.shape)
    found = None if p.backward is None else _backward(grad, xhat, r, gamma, indices, p, p.backward)
    return general.backward(grad, xhat, r, gamma, indices, config) if found is None else found


def _backward(
    grad: Tensor, xhat: Tensor, r: Tensor, gamma: Tensor, indices: Tensor, p: Plan, how: Recipe
) -> tuple[Tensor, Tensor, Tensor] | None:
    (N, C, P), K = grad.shape, indices.shape[1]
    plain, cross = (_doubles(C, 2) for _ in range(2))
    if not any(_add_up("products", way, top, p, (grad, xhat, plain, cross)) for way, top in p.products):
        return None
    vectors, amounts = _doubles(2, C), _doubles(C, K)
    dparameters = torch.empty(2, C, dtype=grad.dtype, device="cpu")
    fine = gradient_statistics(
        plain.numpy(),
        cross.numpy(),
        gamma.detach().numpy(),
        r.numpy(),
        p.constants,
        N * P,
        p.roundings[0],
        p.roundings[2],
        vectors.numpy(),
        amounts.numpy(),
        dparameters.numpy(),
    )
    dx = fresh(grad)
    if not fine or not _write("gradient", how, p, (grad, dx, vectors, amounts, indices), K):
        return None
    return dx, dparameters[0], dparameters[1]
