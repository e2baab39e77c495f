"""How often threads collide and what it costs: exact counts, without visiting the slots.

A slot is one multiplier in one cycle: T (activation, weight) pairs for one output. Legend: see `recoup.nbsmt.tally`;
m, b masks of non-zero activations and weights, K reduction size, M rows, N columns or images.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.nbsmt import reference
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.ops import check_operands
from recoup.nbsmt.ports import zero_of
from recoup.nbsmt.tally import Taps, activation_counts, weight_counts
from recoup.network.checks import instance
from recoup.network.convolution import POINTWISE, Geometry


def statistics(x: Tensor, w: Tensor, config: NBSMT) -> dict[str, int | float]:
    """Count the collisions of X W on the shared multiplier, over its M * N * ceil(K/T) slots.

    A thread is *active* where its activation and its weight are not zero, under every policy.

    Args:
        x: activations [M, K]: uint8 unsigned codes, or int8 signed values.
        w: int8 weights [K, N]. K is split among the threads, zero-padded at its end.
        config: threads, policy, rounding and pairing, and the port of signed activations.

    Returns:
        Exact counts: ``slots``; ``collisions``, slots with two or more active threads; ``lossy``, products of one
        thread that came out changed; ``active``, active threads; and ``utilization``, the share of slots with at
        least one active thread (0 without slots).

    Raises:
        RecoupError: other dtypes, or shapes that do not fit.

    >>> x = torch.tensor([[100, 3], [0, 7]], dtype=torch.uint8)
    >>> w = torch.tensor([[1], [1]], dtype=torch.int8)
    >>> statistics(x, w, NBSMT(threads=2))  # row 0 collides and 100 becomes 96; row 1 has one active thread
    {'slots': 2, 'collisions': 1, 'lossy': 1, 'active': 3, 'utilization': 1.0}
    """
    check_operands(x, w, "nbsmt.statistics")
    instance(config, NBSMT, "nbsmt.statistics", "config", "NBSMT(threads=2)")
    return _count(x[:, :, None, None], w.t()[:, :, None, None], config, POINTWISE)


def layer_statistics(codes: Tensor, weight_codes: Tensor, config: NBSMT, geometry: Geometry) -> dict[str, int | float]:
    """`statistics` of a convolution: the threads split the input channels of a group, every tap is a cycle.

    Zero padding is inactive, but its slots count, as the array spends a cycle on them.

    Args:
        codes: activations [N, C, H, W]: uint8 unsigned codes, or int8 signed values.
        weight_codes: int8 [O, C / groups, kh, kw].
        config: threads, policy, rounding and pairing.
        geometry: of the convolution.

    Returns:
        As `statistics`, over N * h * w * O * ceil(C / groups / T) * kh * kw slots.

    Raises:
        RecoupError: other dtypes, shapes that do not fit, a kernel larger than the padded input.
    """
    if codes.dtype not in (torch.uint8, torch.int8) or weight_codes.dtype != torch.int8:
        got = f"{codes.dtype} and {weight_codes.dtype}"
        raise RecoupError(
            f"nbsmt.layer_statistics: codes must be uint8 and weight_codes int8; got {got} (signed codes are int8)"
        )
    fits = codes.dim() == weight_codes.dim() == 4 and codes.shape[1] == weight_codes.shape[1] * geometry.groups
    if not fits or weight_codes.shape[0] % geometry.groups:
        raise RecoupError(
            "nbsmt.layer_statistics: codes [N, C, H, W] and weight_codes [O, C / groups, kh, kw] expected; got "
            f"{list(codes.shape)} and {list(weight_codes.shape)} with groups {geometry.groups}"
        )
    if codes.device != weight_codes.device:
        raise RecoupError(f"nbsmt.layer_statistics: codes lie on {codes.device}, weight_codes on {weight_codes.device}")
    return _count(codes, weight_codes, config, geometry)


@dataclass(frozen=True, slots=True)
class _Classes:
    """Codes that always fare alike, and which meetings of their classes change the product.

    Attributes:
        activation, weight: int64 [256], the class of a value (of v at v + zero, of weight w at w + 128); 0 has its own.
        changed: float64 [2, classes, classes], 1 where the product changes with one and with more partners active.
    """

    activation: Tensor
    weight: Tensor
    changed: Tensor


@lru_cache
def _classes(config: NBSMT, zero: int) -> _Classes:
    x, w = torch.arange(-zero, 256 - zero)[:, None], torch.arange(-128, 128)[None]
    one, more = (reference.contribution(x, w, torch.tensor(others), config, zero) != x * w for others in (1, 2))
    # Equal rows are equal activations, for these purposes; 3 or 4 distinct ones remain, and as many columns.
    _, activation = torch.cat([one, more, x == 0], 1).unique(dim=0, return_inverse=True)
    _, weight = torch.cat([one, more, w == 0], 0).unique(dim=1, return_inverse=True)
    changed = torch.zeros(2, int(activation.max()) + 1, int(weight.max()) + 1, dtype=torch.float64)
    for layer, table in enumerate((one, more)):
        changed[layer, activation[:, None], weight[None]] = table.double()
    return _Classes(activation, weight, changed)


def _count(code: Tensor, weight: Tensor, config: NBSMT, geometry: Geometry) -> dict[str, int | float]:
    zero = zero_of(code)
    classes = _classes(config, zero)
    device, taps = code.device, math.prod(geometry.kernel)
    pattern, others = _meetings(config)
    total = torch.zeros(4, dtype=torch.int64, device=device)
    slots = 0
    positions = code.shape[0] * Taps.of((code.shape[2], code.shape[3]), geometry).outputs * weight.shape[0]
    for part, x_GTSklmx in activation_counts(code, classes.activation, config, geometry):
        w_GTSklby = weight_counts(weight, classes.weight, config, geometry.groups, part)
        # A unit's count is at most (output positions) x (output channels), far below 2^53: float64 is exact. Their
        # sum is taken in 64-bit integers.
        x_Gp = _patterns(x_GTSklmx[:, 0], int(classes.activation[zero]))
        w_Gp = _patterns(w_GTSklby[:, 0], int(classes.weight[128]))
        for index, meeting in enumerate(pattern.to(device)):
            total[index] += ((x_Gp @ meeting) * w_Gp).sum(-1).long().sum()
        for meeting, changed in zip(others.to(device), classes.changed.to(device), strict=True):
            x_Gbx = torch.einsum("...mx,mb->...bx", x_GTSklmx, meeting)
            w_Gbx = torch.einsum("...by,xy->...bx", w_GTSklby, changed)
            total[3] += (x_Gbx * w_Gbx).sum((-1, -2)).long().sum()
        slots += positions * (part.stop - part.start) * taps
    collisions, active, busy, lossy = total.tolist()
    return {
        "slots": slots,
        "collisions": collisions,
        "lossy": lossy,
        "active": active,
        "utilization": busy / slots if slots else 0.0,
    }


def _patterns(counts: Tensor, zero: int) -> Tensor:
    """Counts by which of all threads are non-zero [..., 2^T], from thread 0's labels [..., masks, classes]."""
    idle = counts[..., zero]
    return torch.stack([idle, counts.sum(-1) - idle], -1).flatten(-2)


@lru_cache
def _meetings(config: NBSMT) -> tuple[Tensor, Tensor]:
    """What follows where a pattern of non-zero activations meets one of non-zero weights.

    Returns:
        float64 [3, 2^T, 2^T]: a collision, the active threads, a busy slot. float64 [2, 2^(T-1), 2^(T-1)]: one
        partner is counted as active, more are.
    """

    def shared(bits: int) -> Tensor:
        index = torch.arange(1 << bits)
        both = index[:, None] & index[None]
        return sum((both >> bit) & 1 for bit in range(bits)) + torch.zeros_like(both)

    active = shared(config.threads)
    others = shared(config.threads - 1)
    if not config.zero_test:
        others = torch.full_like(others, config.threads - 1)
    return torch.stack([active >= 2, active, active >= 1]).double(), torch.stack([others == 1, others >= 2]).double()
