"""The statistics of a batch that is spread over the processes of a group: rank after rank, as one process would count.

Sums travel as pairs that are exact together, so that the joined sums are those of one process, bit for bit.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recoup.errors import RecoupError
from recoup.lightnorm.config import LightNorm

EVERYONE = "all processes"  # not the group itself: a layer that outlives destroy_process_group would keep it alive


def members(group: Any) -> Any:
    """The process group of a layer's ``group``: itself, or for EVERYONE the one of all processes now."""
    return dist.group.WORLD if isinstance(group, str) and group == EVERYONE else group


def joined_moments(device: Any, x: Tensor, config: LightNorm, group: Any) -> tuple[Tensor, Tensor, Tensor, int]:
    """Exact sums [C, 2], ends of all chunks [C, K, 2], indices of this process's chunks, elements of all processes."""
    size, local = dist.get_world_size(group), x.shape[0] * x.shape[2]
    counts = _gathered(torch.tensor([local], device=x.device), group)
    if config.chunks % size or len({int(count) for count in counts}) != 1 or local % (config.chunks // size):
        raise RecoupError(
            f"LightNorm over {size} processes: chunks={config.chunks} must be a multiple of {size}, and every process "
            f"must have as many elements as the others, a multiple of its chunks; got {[int(c) for c in counts]}"
        )
    sums, ends, indices = device.moments(x, config.chunks // size)
    all_ends = torch.cat(_gathered(ends, group), 1)
    return added(_gathered(sums, group)), all_ends, indices, local * size


def joined_products(plain: Tensor, cross: Tensor, elements: int, group: Any) -> tuple[Tensor, Tensor, int]:
    """The sums over all processes, as pairs, and their number of elements."""
    pairs = _gathered(torch.stack([plain, cross]), group)
    total = added(pairs)
    return total[0], total[1], elements * len(pairs)


def counted(found: int, device: torch.device, group: Any) -> int:
    """The sum of a count over all processes."""
    return sum(int(count) for count in _gathered(torch.tensor([found], device=device), group))


def added(pairs: list[Tensor]) -> Tensor:
    """The sum of pairs [..., 2] as a pair."""
    total, error = pairs[0].unbind(-1)
    for pair in pairs[1:]:
        v, more = pair.unbind(-1)
        t = total + v
        z = t - total
        error = error + ((total - (t - z)) + (v - z)) + more
        total = t
    return torch.stack([total, error], -1)


def _gathered(x: Tensor, group: Any) -> list[Tensor]:
    out = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(out, x.contiguous(), group=group)
    return out
