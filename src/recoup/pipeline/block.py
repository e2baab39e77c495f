"""One parameter of all runs of a batched pipeline, and what a run has of its own.

Legend: R runs; a parameter is one block w_Rn of all runs, and what differs between runs is a column c_R1 that
broadcasts over it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.pipeline.arguments import rate_of
from recoup.pipeline.mitigation import Mitigation
from recoup.pipeline.optimizers import SGDM, spike
from recoup.pipeline.update import Update

Rate = float | Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Run:
    """What one run has of its own.

    Attributes:
        delays: D_s of every stage.
        mitigation: a `Mitigation` or its name.
        lr: the learning rate, or a function of the step.
        momentum, weight_decay: as of `Simulator`.

    Raises:
        RecoupError: a mitigation or rate that is none, a momentum or weight decay that is not a number from 0.
    """

    delays: Sequence[int]
    mitigation: Mitigation | str = "none"
    lr: Rate = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        mitigation_of(self)
        rate_of(self.lr, "pipeline.Run")
        for name in ("momentum", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise RecoupError(f"pipeline.Run({name}={value!r}): {name} must be a number from 0")


def mitigation_of(run: Run) -> Mitigation:
    """A run's mitigation, parsed."""
    return Mitigation.of(run.mitigation, "pipeline.Run")


class _Some:
    """Some runs, and a column of values of theirs, or two; ``rows`` None: all runs."""

    def __init__(self, rows: Tensor | None, first: Tensor, second: Tensor | None = None) -> None:
        self.rows, self.first, self.second = rows, first, first if second is None else second

    def of(self, x: Tensor) -> Tensor:
        """Their rows."""
        return x if self.rows is None else x.index_select(0, self.rows)

    def put(self, part: Tensor, into: Tensor) -> None:
        """Write their rows."""
        into.copy_(part) if self.rows is None else into.index_copy_(0, self.rows, part)


class Block:
    """One parameter of all runs: newest weights, velocity, ring and the live weights that the graph refers to.

    The same arithmetic as `update.Update`, element by element. A coefficient of all runs is a number.
    """

    def __init__(self, weights: Tensor, stage: int, delays: Sequence[int], runs: Sequence[Run]) -> None:
        self.shape, self.stage, self.delays = weights.shape, stage, list(delays)
        self.w = weights.detach().reshape(len(runs), -1).clone()
        self.velocity, self.scratch = torch.zeros_like(self.w), torch.empty_like(self.w)
        self.live = self.w.clone()
        self.leaf = nn.Parameter(torch.empty(0, dtype=self.w.dtype, device=self.w.device))
        self.leaf.data = self.live.view(self.shape)  # its version counter is its own, and we write through `live`
        hows = [mitigation_of(run) for run in runs]
        self.momentum = self._column([run.momentum for run in runs])
        self.decay = self._column([run.weight_decay for run in runs])
        pairs = [spike(run.momentum, how.compensation * D) for run, how, D in zip(runs, hows, delays, strict=True)]
        self.spikes = self._some([how.compensation for how in hows], *zip(*pairs, strict=True))
        shrinks = [how.shrink**D for how, D in zip(hows, delays, strict=True)]
        self.shrink = self._column(shrinks) if min(shrinks) < 1 else None
        self.annealing = [(max(D, 1), how.annealing) for how, D in zip(hows, delays, strict=True)]
        updates = [
            Update(SGDM(float(run.momentum), float(run.weight_decay)), how, [D], stage)
            for run, how, D in zip(runs, hows, delays, strict=True)
        ]
        ahead = [update.forward[0] for update in updates]
        by_weight = [T if how.prediction == "weight" else 0.0 for T, how in zip(ahead, hows, strict=True)]
        by_velocity = [0.0 if how.prediction == "weight" else T for T, how in zip(ahead, hows, strict=True)]
        back = [update.backward[0] for update in updates]
        self.by_velocity, self.by_weight, self.back = (self._some(v, v) for v in (by_velocity, by_weight, back))
        self.before = self.w.clone() if self.by_weight is not None else None
        stashing = [run for run, how in enumerate(hows) if how.stash]
        self.all_stash = len(stashing) == len(hows)
        self.stashing = torch.tensor(stashing, device=self.w.device) if stashing else None
        self.depth = max(delays) + 1
        self.ring = self.w.expand(self.depth, *self.w.shape).clone()
        self.same = len(set(delays)) == 1
        self._rows = torch.arange(len(runs))

    def _column(self, values: Sequence[float]) -> Tensor | float | None:
        """Values [R, 1] of the weights' dtype; a number if all are the same; None if that is 0."""
        if len(set(values)) == 1:
            return values[0] or None
        return torch.tensor(values, dtype=torch.float64).to(self.w)[:, None]

    def _some(self, which: Sequence[float], *values: Sequence[float]) -> "_Some | None":
        """The runs whose entry of ``which`` is not 0, with their values; None if there are none."""
        rows = [run for run, flag in enumerate(which) if flag]
        if not rows:
            return None
        columns = [torch.tensor([v[run] for run in rows], dtype=torch.float64).to(self.w)[:, None] for v in values]
        return _Some(None if len(rows) == len(which) else torch.tensor(rows, device=self.w.device), *columns)

    @torch.no_grad()
    def show(self, step: int, rates: Sequence[float]) -> None:
        """Predict, keep the prediction, and make live what this step's forward pass sees: version max(0, step - D)."""
        now = self.ring[step % self.depth]
        now.copy_(self.w)
        if self.by_velocity is not None:
            self._predict(now, self.by_velocity, rates)
        if self.by_weight is not None and self.before is not None:
            w = self.by_weight.of(self.w)
            self.by_weight.put(torch.sub(w, self.by_weight.of(self.before)).mul_(self.by_weight.first).add_(w), now)
        if self.same:
            self.live.copy_(self.ring[max(0, step - self.delays[0]) % self.depth])
        else:
            rows = torch.tensor([max(0, step - D) % self.depth for D in self.delays])
            torch.index_select(self.ring.flatten(0, 1), 0, rows * len(self.delays) + self._rows, out=self.live)

    @torch.no_grad()
    def turn(self, rates: Sequence[float]) -> None:
        """Make live what the backward pass sees: the newest weights, those ahead, or with stashing the same."""
        if self.all_stash:
            return
        kept = None if self.stashing is None else self.live.index_select(0, self.stashing)
        self.live.copy_(self.w)
        if self.back is not None:
            self._predict(self.live, self.back, rates)
        if kept is not None and self.stashing is not None:
            self.live.index_copy_(0, self.stashing, kept)

    def _predict(self, into: Tensor, some: "_Some", rates: Sequence[float]) -> None:
        """w - eta T v of some runs."""
        rate = self._negative(rates)
        part = some.of(self.velocity) * some.first
        some.put(part.mul_(some.of(rate) if isinstance(rate, Tensor) else rate).add_(some.of(self.w)), into)

    @torch.no_grad()
    def update(self, gradient: Tensor, rates: Sequence[float], step: int) -> None:
        """One update; ``gradient`` is overwritten."""
        if self.shrink is not None:
            gradient.mul_(self.shrink)
        if isinstance(self.decay, Tensor):
            gradient.add_(self.w * self.decay)
        elif self.decay:
            gradient.add_(self.w, alpha=self.decay)
        self.velocity.mul_(0.0 if self.momentum is None else self.momentum).add_(gradient)
        if self.before is not None:
            self.before.copy_(self.w)
        change = self.velocity
        if self.spikes is not None:
            part = self.spikes.of(self.velocity) * self.spikes.first
            change = self.scratch if self.spikes.rows is None else self.scratch.copy_(self.velocity)
            self.spikes.put(part.add_(self.spikes.of(gradient) * self.spikes.second), change)
        if any(K for _, K in self.annealing):
            late = [D ** (1 - min(step / K, 1)) if K else 1.0 for D, K in self.annealing]
            change = torch.div(change, torch.tensor(late, dtype=torch.float64).to(self.w)[:, None], out=self.scratch)
        rate = self._negative(rates)
        if isinstance(rate, Tensor):
            self.w.add_(torch.mul(change, rate, out=self.scratch))
        else:
            self.w.add_(change, alpha=rate)

    def state(self) -> dict[str, Tensor]:
        """Copies of everything that changes from step to step."""
        kept = {"w": self.w, "velocity": self.velocity, "ring": self.ring}
        if self.before is not None:
            kept["before"] = self.before
        return {name: value.clone() for name, value in kept.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name, value in state.items():
            getattr(self, name).copy_(value)

    def _negative(self, rates: Sequence[float]) -> Tensor | float:
        if len(set(rates)) == 1:
            return -rates[0]
        return torch.tensor(rates, dtype=torch.float64).neg().to(self.w)[:, None]
