"""The update of one pipeline stage, the same object in the simulator and in every process of the runtime.

Legend: all tensors are flat vectors of a stage's parameters; k counts its updates.
"""

from typing import Any

import torch
from torch import Tensor

from recoup.pipeline.mitigation import Mitigation


def spike(momentum: float, delay: float) -> tuple[float, float]:
    """The coefficients of Spike Compensation in float64: a = m^D, b = (1 - m^D) / (1 - m); m = 1: 1 and D.

    Every gradient's total contribution is right from D updates on; D = 0 is SGD with momentum, D = 1 Nesterov's.
    """
    a = momentum**delay
    return a, delay if momentum == 1 else (1 - a) / (1 - momentum)


class StageOptimizer:
    """SGD with momentum for a delay of D updates, and the weights that its passes see.

        g' = beta^D g + wd w,   v' = m v + g',   w' = w - eta (a v' + b g')   or   w - eta v'

    Args:
        weights: the newest weights, updated in place.
        delay: D.
        position: index s of the stage, for SpecTrain.
        momentum, weight_decay: m and wd; the decay acts on the newest weights.
        mitigation: see `Mitigation`.
    """

    def __init__(
        self, weights: Tensor, delay: int, position: int, momentum: float, weight_decay: float, mitigation: Mitigation
    ) -> None:
        self.weights, self.delay, self.position = weights, delay, position
        self.momentum, self.weight_decay, self.mitigation = momentum, weight_decay, mitigation
        self.velocity = torch.zeros_like(weights)
        self.before = weights.clone() if mitigation.prediction == "weight" else None
        self.updates = 0
        self._spike = spike(momentum, mitigation.compensation * delay) if mitigation.compensation else None

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: float) -> None:
        """One update; ``gradient`` is overwritten."""
        how = self.mitigation
        if how.shrink != 1:
            gradient.mul_(how.shrink**self.delay)
        if self.weight_decay:
            gradient.add_(self.weights, alpha=self.weight_decay)
        if how.annealing and self.delay:
            rate = rate / self.delay ** (1 - min(self.updates / how.annealing, 1))
        if self.momentum:
            self.velocity.mul_(self.momentum).add_(gradient)
        else:
            self.velocity.copy_(gradient)
        if self.before is not None:
            self.before.copy_(self.weights)
        if self._spike is None:
            self.weights.add_(self.velocity, alpha=-rate)
        else:
            a, b = self._spike
            self.weights.add_(self.velocity * a + gradient * b, alpha=-rate)
        self.updates += 1

    @torch.no_grad()
    def ahead(self, rate: float, out: Tensor) -> None:
        """Write the weights that a forward pass begun now will use."""
        how = self.mitigation
        if how.prediction == "spectrain":
            self._by_velocity(rate, how.horizon * (self.delay + self.position), out)
        elif how.prediction == "velocity":
            self._by_velocity(rate, how.horizon * self.delay, out)
        elif self.before is not None:
            torch.sub(self.weights, self.before, out=out)
            out.mul_(how.horizon * self.delay).add_(self.weights)
        else:
            out.copy_(self.weights)

    @torch.no_grad()
    def returning(self, rate: float, out: Tensor) -> None:
        """Write the weights of a backward pass now: the newest; with SpecTrain those of s updates ahead."""
        if self.mitigation.prediction == "spectrain":
            self._by_velocity(rate, self.mitigation.horizon * self.position, out)
        else:
            out.copy_(self.weights)

    def _by_velocity(self, rate: float, horizon: float, out: Tensor) -> None:
        torch.add(self.weights, self.velocity, alpha=-rate * horizon, out=out)

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
