"""LightNorm's fused passes for every format, by numba: two over x and two over the gradient.

Legend: x [N, C, P]; K chunks. Every function gives None where an input is NaN or infinite: `passes` then takes the
separate passes of cpu.py, which find the channels.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recoup.formats import BlockFloat, Float
from recoup.formats.constants import block_constants, float_constants, nearest_constants
from recoup.kernels.threads import over_rows
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.cpu import INTEGERS, _segments, rounding
from recoup.lightnorm.cpu_kernels import LANES
from recoup.lightnorm.fused.general_kernels import gradient_pass, moments_pass, normalize_pass, products_pass
from recoup.lightnorm.fused.general_tiles import ANY, GENERAL, MASK, NEAREST, NONE, WHOLE
from recoup.lightnorm.fused.statistics import batch_statistics, gradient_statistics, parameters, running_statistics
from recoup.lightnorm.scale import factors

TILE, SHORTEST = 4096, 64  # elements of a tile: 16 KiB of float32; places of it at least
PANEL = 4096  # contiguous elements that a pass with sums reads before it goes to the next sample
SPAN = 100  # exponents between a format's ends for which the blocks' powers of two stay normal float32
FRACTION, BIAS = 23, 127


class Plan(NamedTuple):
    """What a shape and a configuration fix.

    Attributes:
        shape: C, P, channels of a panel, channels of a block, pitch of the scratch rows: of passes with sums.
        rows: panels; how many elements each has.
        linear: C, P, channels of a block, blocks, pitch: of passes without.
        linear_rows: samples' blocks; how many elements each has.
        tiles: sample, first place, end, chunk; int64 [T, 4]. ``offsets``: where every sample's begin.
        forward, backward: see `constants`, for ordinary factors and for others.
        constants: C(m_k), float64 [K].
    """

    shape: tuple[int, int, int, int, int]
    rows: tuple[int, int]
    linear: tuple[int, int, int, int, int]
    linear_rows: tuple[int, int]
    tiles: np.ndarray
    offsets: np.ndarray
    forward: tuple[np.ndarray, np.ndarray]
    backward: tuple[np.ndarray, np.ndarray]
    constants: np.ndarray
    roundings: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=256)
def plan(config: LightNorm, chunks: int, dtype: torch.dtype, N: int, C: int, P: int) -> Plan:
    """The plan of a call; ``chunks`` 0 where there are no batch statistics."""
    block = min(config.block or 1, C)
    longest = max(SHORTEST, TILE // block // LANES * LANES)
    tiles = tiles_of(_segments(N, P, max(chunks, 1)), longest)
    pitch = (-(-int((tiles[:, 2] - tiles[:, 1]).max()) // LANES) + 1) * LANES  # rows never a page apart
    panel, blocks = min(C, -(-PANEL // (block * P)) * block), -(-C // block)
    form, back = config.forward, config.backward
    return Plan(
        shape=(C, P, panel, block, pitch),
        rows=(-(-C // panel), N * panel * P),
        linear=(C, P, block, blocks, pitch),
        linear_rows=(N * blocks, block * P),
        tiles=tiles,
        offsets=np.searchsorted(tiles[:, 0], np.arange(N + 1)),
        forward=_pair(form, config.forward_blocks, dtype),
        backward=_pair(back, config.backward_blocks, dtype),
        constants=factors(N * P, chunks, config.scale) if chunks else np.empty(0),
        roundings=(rounding(form), rounding(config.statistics), rounding(config.gradient_statistics)),
    )


def tiles_of(segments: np.ndarray, longest: int) -> np.ndarray:
    """Segments cut to a length, in order of the samples' places."""
    out = [
        (sample, start, min(start + longest, end), chunk)
        for sample, begin, end, chunk in segments.tolist()
        for start in range(begin, end, longest)
    ]
    return np.array(out, np.int64)


def _pair(form: Float | None, blocks: BlockFloat | None, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The constants for ordinary factors, and for others, whose results may be NaN."""
    fine = constants(form, blocks, dtype)
    other = fine.copy()
    other[36] = NONE if blocks is None else GENERAL
    return fine, other


@lru_cache(maxsize=256)
def constants(form: Float | None, blocks: BlockFloat | None, dtype: torch.dtype) -> np.ndarray:
    """How the kernels round, int64.

    0: how to the format; of `formats.constants`, 1 - 10 ``FloatConstants``, 11 - 17 ``NearestConstants``; 18: how the
    input to blocks, 19 - 24 ``BlockConstants``; 25 - 32 `cpu.rounding`; 33 - 35: the mask, smallest normal and largest
    value of the format; 36: how results to blocks; 37: twice the bias, and one less than the significand, as exponents,
    so that this less an exponent is the quantum's reciprocal; 38: one less than the significand, as an exponent.
    """
    how = np.zeros(40, np.int64)
    how[25:33] = rounding(form)
    if form is not None:
        c, nearest = float_constants(form, dtype), nearest_constants(form, dtype)
        how[0], how[1:11] = ANY, c
        if nearest:
            how[0], how[11:18] = NEAREST, nearest
        if form.rounding == "zero" and not form.subnormals:
            how[0], how[33:36] = MASK, (-1 << (c.fraction - form.mantissa), c.zero_below, c.largest)
    if blocks is not None:
        how[19:25] = block_constants(blocks, dtype)
        how[18] = how[36] = WHOLE if whole(form, blocks, dtype) else GENERAL
        more = blocks.significand - 1
        how[37], how[38] = (2 * BIAS + more) << FRACTION, more << FRACTION
    return how


def whole(form: Float | None, blocks: BlockFloat, dtype: torch.dtype) -> bool:
    """Whether the shorter kernel for blocks holds: see general_tiles.py."""
    if form is None or dtype != torch.float32 or form.rounding != "zero" or form.subnormals:
        return False
    ends = form.min_exponent, form.max_exponent
    fits = blocks.min_exponent <= ends[0] and ends[1] <= blocks.max_exponent and blocks.rounding == "zero"
    more = blocks.significand - 1
    normal = ends[0] - more > -BIAS and more - ends[0] < BIAS and ends[1] - more < BIAS
    return fits and normal and blocks.significand == form.mantissa + 1 and ends[1] - ends[0] + more < SPAN


def _bits(x: Tensor) -> np.ndarray:
    return x.detach().numpy().reshape(-1).view(INTEGERS[x.dtype])


def forward(
    x: Tensor, gamma: Tensor, beta: Tensor, config: LightNorm, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Training; see `passes.forward`."""
    N, C, P = x.shape
    p = plan(config, config.chunks, x.dtype, N, C, P)
    keys, found, K = _bits(x), np.zeros(1, np.int64), config.chunks
    sums, ends, indices = np.empty((C, 2)), np.empty((C, K, 2)), np.empty((C, K, 2), np.int64)
    over_rows(
        lambda a, b: moments_pass(keys, a, b, p.shape, p.tiles, p.forward[0], sums, ends, indices, found), *p.rows
    )
    if found[0]:
        return None
    vectors, s = np.empty((4, C)), np.empty(C)
    fine = batch_statistics(sums, ends, p.constants, N * P, eps, p.roundings[1], vectors, s)
    y, xhat = _normalized(x, keys, gamma, beta, p, vectors, fine, found)
    mean, r = torch.from_numpy(vectors[0]), torch.from_numpy(vectors[1])
    return y, xhat, mean, torch.from_numpy(s), r, torch.from_numpy(indices)


def infer(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, config: LightNorm, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Evaluation; see `passes.infer`."""
    p = plan(config, 0, x.dtype, *x.shape)
    found, vectors = np.zeros(1, np.int64), np.empty((4, x.shape[1]))
    deviation = (
        (var.detach().double() + eps).sqrt().numpy()
    )  # torch's root, which is the reference's, may be an ulp off
    fine = running_statistics(mean.detach().numpy(), deviation, p.roundings[1], vectors)
    y, xhat = _normalized(x, _bits(x), gamma, beta, p, vectors, fine, found)
    return None if found[0] else (y, xhat, torch.from_numpy(vectors[1]))


def _normalized(
    x: Tensor,
    keys: np.ndarray,
    gamma: Tensor,
    beta: Tensor,
    p: Plan,
    vectors: np.ndarray,
    fine: bool,
    found: np.ndarray,
) -> tuple[Tensor, Tensor]:
    fine = parameters(gamma.detach().numpy(), beta.detach().numpy(), p.roundings[0], vectors) and fine
    y, xhat = (torch.empty(x.shape, dtype=x.dtype, device="cpu") for _ in range(2))
    result, normal, how = _bits(y), xhat.numpy().reshape(-1), p.forward[0 if fine else 1]
    arrays = keys, normal, result
    over_rows(
        lambda a, b: normalize_pass(*arrays, a, b, p.linear, p.tiles, p.offsets, how, vectors, found), *p.linear_rows
    )
    return y, xhat


def backward(
    grad: Tensor, xhat: Tensor, r: Tensor, gamma: Tensor, indices: Tensor, config: LightNorm
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients; see `passes.backward`."""
    (N, C, P), K = grad.shape, indices.shape[1]
    p = plan(config, K, grad.dtype, N, C, P)
    keys, others, found = _bits(grad), _bits(xhat), np.zeros(1, np.int64)
    plain, cross = np.empty((C, 2)), np.empty((C, 2))
    over_rows(
        lambda a, b: products_pass(keys, others, a, b, p.shape, p.tiles, p.backward[0], plain, cross, found), *p.rows
    )
    if found[0]:
        return None
    vectors, amounts, dparameters = (
        np.empty((2, C)),
        np.empty((C, K)),
        torch.empty(2, C, dtype=grad.dtype, device="cpu"),
    )
    fine = gradient_statistics(
        plain,
        cross,
        gamma.detach().numpy(),
        r.numpy(),
        p.constants,
        N * P,
        p.roundings[0],
        p.roundings[2],
        vectors,
        amounts,
        dparameters.numpy(),
    )
    dx = torch.empty(grad.shape, dtype=grad.dtype, device="cpu")
    result, spots, how = _bits(dx), indices.numpy(), p.backward[0 if fine else 1]
    arrays = keys, result
    over_rows(
        lambda a, b: gradient_pass(*arrays, a, b, p.linear, p.tiles, p.offsets, how, vectors, amounts, spots, found),
        *p.linear_rows,
    )
    return dx, dparameters[0], dparameters[1]
