"""LightNorm's passes over a batch that is spread over the processes of a group: rank after rank, as one process would
count.

Sums travel as pairs that are exact together, so that the joined sums are those of one process, bit for bit.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recoup.errors import RecoupError
from recoup.lightnorm.separate import SeparatePasses

EVERYONE = "all processes"  # not the group itself: a layer that outlives destroy_process_group would keep it alive


def members(group: Any) -> Any:
    """The process group of a layer's ``group``: itself, or for EVERYONE the one of all processes now."""
    return dist.group.WORLD if isinstance(group, str) and group == EVERYONE else group


@dataclass(frozen=True, slots=True)
class JoinedPasses(SeparatePasses):
    """The passes of one process of a group; chunks are its share of the joined batch's.

    Attributes:
        group: a process group.
    """

    group: Any

    def refuse(self, found: int, what: str, device: torch.device) -> None:
        """An error on all processes, or the others would wait forever."""
        everywhere = sum(int(count) for count in self._gathered(torch.tensor([found], device=device)))
        SeparatePasses.refuse(self, found, what, device)
        if everywhere:
            raise RecoupError(f"{what} of another process of the group holds {everywhere} NaN or infinite values")

    def moments(self, x_q: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Of the joined batch, with the indices of this process's chunks."""
        chunks, size, local = self.config.chunks, dist.get_world_size(self.group), x_q.shape[0] * x_q.shape[2]
        counts = self._gathered(torch.tensor([local], device=x_q.device))
        if chunks % size or len({int(count) for count in counts}) != 1 or local % (chunks // size):
            raise RecoupError(
                f"LightNorm over {size} processes: chunks={chunks} must be a multiple of {size}, and every process "
                f"must have as many elements as the others, a multiple of its chunks; got {[int(c) for c in counts]}"
            )
        sums, ends, indices = self.device.moments(x_q, chunks // size)
        all_ends = torch.cat(self._gathered(ends), 1)
        return added(self._gathered(sums)), all_ends, indices, local * size

    def totals(self, plain: Tensor, cross: Tensor, elements: int) -> tuple[Tensor, Tensor, int]:
        """Over all processes."""
        pairs = self._gathered(torch.stack([plain, cross]))
        plain, cross = added(pairs)
        return plain, cross, elements * len(pairs)

    def share(self, constants: Tensor, chunks: int) -> Tensor:
        """Those of the rank's chunks."""
        rank = dist.get_rank(self.group)
        return constants[rank * chunks : (rank + 1) * chunks]

    def _gathered(self, x: Tensor) -> list[Tensor]:
        out = [torch.empty_like(x) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(out, x.contiguous(), group=self.group)
        return out


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
