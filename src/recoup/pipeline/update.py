"""The updates of some neighbouring pipeline stages, whatever the rule: what a mitigation does to them.

What differs between stages are numbers, and every operation is element by element: the bits do not depend on how many
stages lie together. This is the definition; `native` has the same bits in one pass for SGD with momentum.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recoup.pipeline.lists import each
from recoup.pipeline.mitigation import Mitigation
from recoup.pipeline.optimizers import SGDM, Parts, Rule, Slots, coasting, spike

__all__ = ["StageOptimizer", "Update", "spike"]


class Update:
    """A rule's steps and predictions for stages whose gradients are D updates late.

        g' = c beta^D g / n,   w' = w - eta u'   (with annealing w - eta u' / D^(1 - min(t / K, 1)))
        ahead: w' - eta T u  or  w' + T (w' - w);   back: w' - eta T_b u

    Args:
        rule: makes u' and u of g'; see `optimizers`.
        mitigation: see `Mitigation`.
        delays: D of each stage.
        first: index of the first stage in the pipeline, for SpecTrain.

    Attributes:
        late: D of Spike Compensation of every stage, or None.
        shrink: beta^D of every stage.
        forward, backward: T and T_b of every stage.
    """

    def __init__(self, rule: Rule, mitigation: Mitigation, delays: Sequence[int], first: int) -> None:
        self.rule, self.mitigation, self.delays = rule, mitigation, list(delays)
        alpha = mitigation.compensation
        self.late = [alpha * D for D in delays] if alpha else None
        self.shrink = [mitigation.shrink**D for D in delays]
        reach = [coasting(rule.memory, D) if mitigation.reach == "coasting" else float(D) for D in delays]
        self.forward, self.backward = [0.0] * len(reach), [0.0] * len(reach)
        if mitigation.prediction != "none":
            self.forward = [mitigation.horizon * T for T in reach]
        if mitigation.prediction == "spectrain":
            self.backward = [mitigation.horizon * (first + s) for s in range(len(reach))]
            self.forward = [f + b for f, b in zip(self.forward, self.backward, strict=True)]
        elif mitigation.past:
            self.backward = [-T for T in reach]

    @property
    def predicts(self) -> bool:
        """Whether forward passes see other weights than the newest of their time."""
        return any(self.forward)

    @property
    def turns(self) -> bool:
        """Whether backward passes see others than the newest, or those of the forward."""
        return any(self.backward)

    def annealing(self, t: int) -> list[float]:
        """What each stage's rate is divided by."""
        share = min(t / self.mitigation.annealing, 1) if self.mitigation.annealing else 1
        return [float(max(D, 1)) ** (1 - share) for D in self.delays]

    @torch.no_grad()
    def step(
        self,
        t: int,
        rate: float,
        g: Parts,
        w: Parts,
        old: Slots,
        new: Slots,
        into: Parts,
        factors: Sequence[float] | None = None,
    ) -> None:
        """Update t: the next state and weights into ``new`` and ``into``; ``g`` is overwritten, the rest is not.

        ``factors``: c of every stage, None for 1: what clipping makes smaller.
        """
        if factors is not None:
            each._foreach_mul_(g, [a * b for a, b in zip(self.shrink, factors, strict=True)])
        elif self.mitigation.shrink != 1:
            each._foreach_mul_(g, self.shrink)
        change = self.rule.change(t, g, w, old, new, self.late)
        if self.mitigation.annealing:
            # as tensors: by a number, a GPU multiplies with its reciprocal
            change = each._foreach_div(
                change, [part.new_tensor(n) for part, n in zip(w, self.annealing(t), strict=True)]
            )
        each._foreach_copy_(into, each._foreach_add(w, change, alpha=-rate))

    @torch.no_grad()
    def ahead(self, t: int, rate: float, w: Parts, slots: Slots, before: Parts | None) -> Parts:
        """The weights that a forward pass after t updates will use; they may share memory with the newest.

        ``before``: the weights before the last update, for the prediction by weights.
        """
        if not self.predicts:
            return w
        if self.mitigation.prediction == "weight" and before is not None:
            made = each._foreach_sub(w, before)
            each._foreach_mul_(made, self.forward)
            each._foreach_add_(made, w)
            return list(made)
        return self._along(t, rate, w, slots, self.forward)

    @torch.no_grad()
    def returning(self, t: int, rate: float, w: Parts, slots: Slots) -> Parts:
        """The weights of a backward pass after t updates: the newest, unless the mitigation says otherwise."""
        return self._along(t, rate, w, slots, self.backward) if self.turns else w

    def _along(self, t: int, rate: float, w: Parts, slots: Slots, horizons: Sequence[float]) -> Parts:
        made = each._foreach_mul(self.rule.direction(t, w, slots), list(horizons))
        each._foreach_mul_(made, -rate)
        each._foreach_add_(made, w)
        return list(made)


class StageOptimizer:
    """An `Update` of weights that lie in one vector, in place: for loops that delay by themselves.

    Args:
        weights: the newest weights of all stages, flat; updated in place.
        sizes: elements of each stage.
        delays, first, mitigation: as of `Update`.
        momentum, weight_decay: of SGD; or give a ``rule``.
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
        rule: Rule | None = None,
    ) -> None:
        self.weights, self._sizes = weights, list(sizes)
        self.rule = SGDM(momentum, weight_decay) if rule is None else rule
        self._update = Update(self.rule, mitigation, delays, first)
        self.slots = {name: torch.zeros_like(weights) for name in self.rule.slots}
        self.before = weights.clone() if mitigation.prediction == "weight" else None
        self.updates = 0

    @property
    def velocity(self) -> Tensor:
        """Of SGD."""
        return self.slots["velocity"]

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: float) -> None:
        """One update; ``gradient`` is overwritten."""
        if self.before is not None:
            self.before.copy_(self.weights)
        w, slots = self._parts(self.weights), self._slots()
        self._update.step(self.updates, rate, self._parts(gradient), w, slots, slots, w)
        self.updates += 1

    @torch.no_grad()
    def ahead(self, rate: float) -> Tensor:
        """The weights that a forward pass begun now will use; they may share memory with the newest."""
        if not self._update.predicts:
            return self.weights
        before = None if self.before is None else self._parts(self.before)
        return torch.cat(self._update.ahead(self.updates, rate, self._parts(self.weights), self._slots(), before))

    @torch.no_grad()
    def returning(self, rate: float) -> Tensor:
        """The weights of a backward pass now."""
        if not self._update.turns:
            return self.weights
        return torch.cat(self._update.returning(self.updates, rate, self._parts(self.weights), self._slots()))

    def _parts(self, flat: Tensor) -> Parts:
        return list(flat.split(self._sizes))

    def _slots(self) -> dict[str, Parts]:
        return {name: self._parts(value) for name, value in self.slots.items()}

    def state(self) -> dict[str, Any]:
        """Everything but the configuration."""
        kept = {"weights": self.weights, **self.slots}
        if self.before is not None:
            kept["before"] = self.before
        return {**{name: value.clone() for name, value in kept.items()}, "updates": self.updates}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.weights.copy_(state["weights"])
        for name, value in self.slots.items():
            value.copy_(state[name])
        if self.before is not None:
            self.before.copy_(state["before"])
        self.updates = int(state["updates"])
