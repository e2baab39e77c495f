"""The updates of some neighbouring pipeline stages: the same object in the simulator and in every process.

All stages lie in one flat vector, so that an update is a handful of vector operations however many stages there are;
what differs between stages is a vector of coefficients. Every operation is element by element: the bits do not depend
on how many stages lie together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recoup.pipeline.mitigation import Mitigation


def spike(momentum: float, delay: float) -> tuple[float, float]:
    """The coefficients of Spike Compensation in float64: a = m^D, b = (1 - m^D) / (1 - m); for m = 1: 1 and D.

    Every gradient's total contribution is right from D updates on; D = 0 is SGD with momentum, D = 1 Nesterov's.
    """
    a = momentum**delay
    return a, delay if momentum == 1 else (1 - a) / (1 - momentum)


class StageOptimizer:
    """SGD with momentum for stages whose gradients are D updates late, and the weights that their passes see.

        g' = beta^D g + wd w,   v' = m v + g',   w' = w - eta (a v' + b g')   or   w - eta v'

    Args:
        weights: the newest weights of all stages, flat; updated in place.
        sizes: elements of each stage.
        delays: D of each stage.
        first: index of the first stage in the pipeline, for SpecTrain.
        momentum, weight_decay: m and wd; the decay acts on the newest weights and is not shrunk.
        mitigation: see `Mitigation`.
    """

    def __init__(
        self,
        weights: Tensor,
        sizes: Sequence[int],
        delays: Sequence[int],
        first: int,
        momentum: float,
        weight_decay: float,
        mitigation: Mitigation,
    ) -> None:
        self.weights, self.momentum, self.weight_decay, self.mitigation = weights, momentum, weight_decay, mitigation
        self.velocity = torch.zeros_like(weights)
        self.before = weights.clone() if mitigation.prediction == "weight" else None
        self.updates = 0
        self._sizes, self._scratch = list(sizes), torch.empty_like(weights)
        positions = range(first, first + len(delays))
        spikes = [spike(momentum, mitigation.compensation * D) for D in delays]
        self._a, self._b = (self._spread([pair[i] for pair in spikes]) for i in range(2))
        self._shrink = self._spread([mitigation.shrink**D for D in delays]) if mitigation.shrink != 1 else None
        self._late = self._spread([float(max(D, 1)) for D in delays], torch.float64) if mitigation.annealing else None
        ahead = [mitigation.horizon * D for D in delays]
        self._back = None
        if mitigation.prediction == "spectrain":
            ahead = [mitigation.horizon * (D + s) for D, s in zip(delays, positions, strict=True)]
            self._back = self._spread([mitigation.horizon * s for s in positions])
        self._ahead = self._spread(ahead)

    def _spread(self, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
        """A coefficient a stage, in the weights' dtype unless another is given, for every element of the stage."""
        each = torch.tensor(values, dtype=torch.float64).to(self.weights.device, dtype or self.weights.dtype)
        return each.repeat_interleave(torch.tensor(self._sizes, device=each.device))

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: float) -> None:
        """One update; ``gradient`` is overwritten."""
        if self._shrink is not None:
            gradient.mul_(self._shrink)
        if self.weight_decay:
            gradient.add_(self.weights, alpha=self.weight_decay)
        self.velocity.mul_(self.momentum).add_(gradient)
        if self.before is not None:
            self.before.copy_(self.weights)
        change = self.velocity
        if self.mitigation.compensation:
            change = torch.mul(self.velocity, self._a, out=self._scratch)
            change.add_(gradient.mul_(self._b))
        if self._late is not None:
            share = min(self.updates / self.mitigation.annealing, 1)
            change = torch.div(change, (self._late ** (1 - share)).to(change.dtype), out=self._scratch)
        self.weights.add_(change, alpha=-rate)
        self.updates += 1

    @torch.no_grad()
    def ahead(self, rate: float) -> Tensor:
        """The weights that a forward pass begun now will use; they may share memory with the newest."""
        if self.mitigation.prediction in ("velocity", "spectrain"):
            return self._by_velocity(rate, self._ahead)
        if self.before is not None:
            torch.sub(self.weights, self.before, out=self._scratch)
            return self._scratch.mul_(self._ahead).add_(self.weights)
        return self.weights

    @torch.no_grad()
    def returning(self, rate: float) -> Tensor:
        """The weights of a backward pass now: the newest; with SpecTrain those of s updates ahead."""
        return self.weights if self._back is None else self._by_velocity(rate, self._back)

    def _by_velocity(self, rate: float, horizon: Tensor) -> Tensor:
        torch.mul(self.velocity, horizon, out=self._scratch)
        return self._scratch.mul_(-rate).add_(self.weights)

    def state(self) -> dict[str, Any]:
        """Everything but the configuration."""
        kept = {"weights": self.weights, "velocity": self.velocity}
        if self.before is not None:
            kept["before"] = self.before
        return {**{name: value.clone() for name, value in kept.items()}, "updates": self.updates}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.weights.copy_(state["weights"])
        self.velocity.copy_(state["velocity"])
        if self.before is not None:
            self.before.copy_(state["before"])
        self.updates = int(state["updates"])


class Ring:
    """Per stage, the weights that forward passes are still to use: of the last D + 1 versions.

    Args:
        weights: version 0, flat.
        sizes, delays: of each stage.
    """

    def __init__(self, weights: Tensor, sizes: Sequence[int], delays: Sequence[int]) -> None:
        self._delays, self._sizes = list(delays), list(sizes)
        self.rows = [
            part.detach().expand(delay + 1, -1).clone()
            for part, delay in zip(weights.split(self._sizes), delays, strict=True)
        ]
        self._views = [list(rows.unbind(0)) for rows in self.rows]

    @torch.no_grad()
    def write(self, version: int, weights: Tensor) -> None:
        """Keep a version of all stages."""
        torch._foreach_copy_(  # type: ignore[attr-defined]
            [views[version % len(views)] for views in self._views], list(weights.split(self._sizes))
        )

    @torch.no_grad()
    def read(self, version: int, into: Sequence[Tensor]) -> None:
        """The weights of a forward pass begun when ``version`` is the newest: max(0, version - D) of every stage."""
        rows = [v[max(0, version - D) % (D + 1)] for v, D in zip(self._views, self._delays, strict=True)]
        torch._foreach_copy_(list(into), rows)  # type: ignore[attr-defined]
