"""What a unit for rows computes: a run's elements are a row's features in their order, those of a block side by side.

Legend: G lanes, the features of a block.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from recoup.gates.module import Expected, Inputs
from recoup.lightnorm.row_unit.gates import RowGates
from recoup.lightnorm.rtl_letter import Letter, Settled

__all__ = ["RowLetter"]


@dataclass(frozen=True)
class RowLetter(RowGates, Letter):
    """What its ports and registers show."""

    @cached_property
    def chunks(self) -> tuple[int, int]:
        """How many chunks a run takes, and blocks of each."""
        count = min(self.config.chunks, 2)
        return count, min(3, self.elements // (count * self.lanes))

    @property
    def totals(self) -> dict[str, int]:
        """What is summed up of a row, and in how many bits."""
        return super().totals if self.centred else {"range": self.range_bits}

    @property
    def folds(self) -> list[dict[str, int]]:
        """The cycles after a chunk."""
        return super().folds if self.centred else [{"fold": 1}]

    @property
    def extrema(self) -> dict[str, int]:
        """What of a chunk is told."""
        return super().extrema if self.centred else {"largest": 1}

    def _terms(self, units: np.ndarray) -> dict[str, np.ndarray]:
        """What a run adds to `totals`, of elements [steps, runs, G]; object [runs, 1]."""
        (count, m), (_, runs, G) = self.chunks, units.shape
        chunks = units.reshape(count, m, runs, G).transpose(0, 2, 1, 3).reshape(count, runs, m * G)
        if not self.centred:
            return {"range": np.abs(chunks).max(-1).sum(0)[:, None]}
        spread = (chunks.max(-1) - chunks.min(-1)).sum(0)
        return {"sum": chunks.sum((0, 2))[:, None], "range": spread[:, None]}

    def _settled_values(self, inputs: Inputs, sums: dict[str, np.ndarray]) -> Settled:
        """mu, of an RMS norm 0, and r of every run's row."""
        if self.centred:
            return super()._settled_values(inputs, sums)
        nothing = {"sum": sums["range"] * 0}
        return super()._settled_values({**inputs, "count": np.ones_like(inputs["constant"])}, sums | nothing)

    def _divider(self, inputs: Inputs, settled: Settled, steps: int) -> dict[str, Expected]:
        """As of the forward unit; without a mean nothing is divided by n."""
        found = super()._divider(inputs, settled, steps)
        if not self.centred:
            rest = found["dividend"]
            found["dividend"] = Expected(rest.at[1:], rest.values[1:])
            del found["mean"]
        return found

    def _new(self, x: Tensor, sign: int) -> Tensor:
        """Whether an element is its chunk's largest so far (sign 1) or smallest, in the features' order."""
        (count, m), (_, runs, G) = self.chunks, x.shape
        keys = x * sign if self.centred else x.abs()
        chunks = keys.reshape(count, m, runs, G).permute(0, 2, 1, 3).reshape(count, runs, m * G)
        found = torch.ones_like(chunks, dtype=torch.bool)
        found[..., 1:] = chunks[..., 1:] > chunks.cummax(-1).values[..., :-1]
        return found.reshape(count, runs, m, G).permute(0, 2, 1, 3).reshape(x.shape)
