"""Many runs of one network at once: seeds, mitigations and delays as one batched network.

At batch one a run uses a fraction of the machine: most of its time goes to starting operations. Here every operation
works on all runs (`torch.vmap`), and every run sees its own stale weights.

Legend: R runs, P parameters; every parameter is one block w_Rn of all runs, and what differs between runs is a column
c_R1 that broadcasts over it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.pipeline.derived import refuse_derived_weights
from recoup.pipeline.mitigation import Mitigation
from recoup.pipeline.optimizer import spike
from recoup.pipeline.schedule import check_delays
from recoup.pipeline.stages import resolve

Rate = float | Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Run:
    """What one run has of its own.

    Attributes:
        delays: D_s of every stage.
        mitigation: a `Mitigation` or its name.
        lr: the learning rate, or a function of the step.
        momentum, weight_decay: as of `Simulator`.
    """

    delays: Sequence[int]
    mitigation: Mitigation | str = "none"
    lr: Rate = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0


class Batched:
    """Runs that train at once, each as its own `Simulator` would.

    A run's weights equal those of its own `Simulator` up to rounding, not bit for bit: a batched matrix product sums in
    another order than a single one. All that follows the gradient is the same arithmetic.

    Args:
        models: one a run, of the same architecture and dtype, with that run's initial weights; they are not changed
            (see `load`). Training-mode batch norm is refused, other buffers are constants.
        stages: lists of module names, as of `Simulator`.
        runs: one a model.
        loss: of (output, y), for one run; it must work under `torch.vmap`.

    Raises:
        RecoupError: models and runs that do not fit each other or the stages; what `Simulator` refuses; in a step
            inputs without R rows.

    >>> models = [nn.Linear(4, 2) for _ in range(2)]
    >>> batched = Batched(models, [["" ]], [Run([3], "sc"), Run([0])], nn.functional.cross_entropy)
    >>> batched.step(torch.ones(2, 1, 4), torch.zeros(2, 1, dtype=torch.int64)).shape
    torch.Size([2])
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        stages: Sequence[Iterable[str]],
        runs: Sequence[Run],
        loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy,
    ) -> None:
        if not models or len(models) != len(runs):
            raise RecoupError(
                f"pipeline.Batched: {len(models)} models for {len(runs)} runs; there must be one for each"
            )
        for name, module in models[0].named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise RecoupError(f"pipeline.Batched: {name} is a batch norm in training: use group norm")
        self._network, self._loss, self.runs, self.steps = models[0], loss, list(runs), 0
        self.diverged: dict[int, int] = {}
        stages = [list(names) if not isinstance(names, str) else names for names in stages]
        delays = [check_delays(run.delays, len(stages)) for run in runs]
        parameters = [dict(model.named_parameters()) for model in models]
        self._blocks: dict[str, _Block] = {}
        for index, names in enumerate(resolve(models[0], stages)):
            for name in names:
                if parameters[0][name].requires_grad:
                    each = [_matching(own, name, parameters[0][name], run) for run, own in enumerate(parameters)]
                    self._blocks[name] = _Block(torch.stack(each), index, [d[index] for d in delays], self.runs)
        self._unchecked = any(
            delay and not _mitigation(run).stash for run, own in zip(runs, delays, strict=True) for delay in own
        )

    def step(self, x: Any, y: Any) -> Tensor:
        """One step of every run; the losses [R].

        A run whose loss is not finite keeps the weights it had before that step, ``diverged[run]`` is the step's number
        and its losses stay NaN; the other runs go on.

        Args:
            x, y: tensors [R, ...], or tuples of them: row r is the input of run r, batch dimension included.
        """
        rates = [run.lr(self.steps) if callable(run.lr) else run.lr for run in self.runs]
        for block in self._blocks.values():
            block.show(self.steps, rates)
        live = {name: block.leaf for name, block in self._blocks.items()}
        if self._unchecked:
            refuse_derived_weights(_Probe(self, live), (x, y), list(live.values()))
            self._unchecked = False
        with torch.enable_grad():
            losses = self._forward(live, x, y)
            for block in self._blocks.values():
                block.turn(rates)
            gradients = torch.autograd.grad(losses.sum(), list(live.values()))
        found = losses.detach()
        self._note(found)
        kept = [(block, run, block.w[run].clone()) for block in self._blocks.values() for run in self.diverged]
        for block, gradient in zip(self._blocks.values(), gradients, strict=True):
            block.update(gradient.reshape(block.w.shape), rates, self.steps)
        for block, run, weights in kept:
            block.w[run] = weights
            block.velocity[run] = 0
        self.steps += 1
        found = found.clone()
        found[list(self.diverged)] = math.nan
        return found

    def _forward(self, live: Mapping[str, Tensor], x: Any, y: Any) -> Tensor:
        def one(weights: Any, x: Any, y: Any) -> Tensor:
            return self._loss(torch.func.functional_call(self._network, weights, (x,)), y)

        return torch.vmap(one, randomness="different")(live, x, y)

    def _note(self, losses: Tensor) -> None:
        if losses.shape != (len(self.runs),):
            raise RecoupError(f"pipeline.Batched: the losses are {list(losses.shape)}; they must be [{len(self.runs)}]")
        if not torch.isfinite(losses.sum()):
            for run, number in enumerate(losses.tolist()):
                if not math.isfinite(number):
                    self.diverged.setdefault(run, self.steps)

    def weights(self, run: int) -> dict[str, Tensor]:
        """The newest weights of a run by parameter name, as copies."""
        return {name: block.w[run].clone().view(block.shape[1:]) for name, block in self._blocks.items()}

    @torch.no_grad()
    def load(self, run: int, model: nn.Module) -> nn.Module:
        """Copy the newest weights of a run into a model; returns it."""
        own = dict(model.named_parameters())
        for name, weights in self.weights(run).items():
            own[name].copy_(weights)
        return model


class _Probe(nn.Module):
    """The batched forward pass as a module, for the check of saved weights."""

    def __init__(self, batched: Batched, live: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.run = lambda pair: batched._forward(live, *pair)

    def forward(self, pair: tuple[Any, Any]) -> Tensor:
        return self.run(pair)


class _Block:
    """One parameter of all runs: newest weights, velocity, ring and the live weights that the graph refers to.

    The same arithmetic as `StageOptimizer`, element by element. A coefficient that all runs share is a number.
    """

    def __init__(self, weights: Tensor, stage: int, delays: Sequence[int], runs: Sequence[Run]) -> None:
        self.shape, self.delays = weights.shape, list(delays)
        self.w = weights.detach().reshape(len(runs), -1).clone()
        self.velocity, self.scratch = torch.zeros_like(self.w), torch.empty_like(self.w)
        self.live = self.w.clone()
        self.leaf = nn.Parameter(torch.empty(0, dtype=self.w.dtype, device=self.w.device))
        self.leaf.data = self.live.view(self.shape)  # its version counter is its own, and we write through `live`
        hows = [_mitigation(run) for run in runs]
        self.momentum = self._column([run.momentum for run in runs])
        self.decay = self._column([run.weight_decay for run in runs])
        pairs = [spike(run.momentum, how.compensation * D) for run, how, D in zip(runs, hows, delays, strict=True)]
        compensated = any(how.compensation for how in hows)
        self.a, self.b = (self._column([pair[i] for pair in pairs]) if compensated else None for i in (0, 1))
        shrinks = [how.shrink**D for how, D in zip(hows, delays, strict=True)]
        self.shrink = self._column(shrinks) if min(shrinks) < 1 else None
        self.annealing = [(max(D, 1), how.annealing) for how, D in zip(hows, delays, strict=True)]
        by_velocity, by_weight, back = [], [], []
        for how, D in zip(hows, delays, strict=True):
            early = stage if how.prediction == "spectrain" else 0
            by_velocity.append(how.horizon * (D + early) if how.prediction in ("velocity", "spectrain") else 0.0)
            by_weight.append(how.horizon * D if how.prediction == "weight" else 0.0)
            back.append(how.horizon * early)
        self.by_velocity, self.by_weight, self.back = map(self._column, (by_velocity, by_weight, back))
        self.before = self.w.clone() if self.by_weight is not None else None
        self.stash = torch.tensor([[how.stash] for how in hows], device=self.w.device)
        self.some_stash, self.all_stash = bool(self.stash.any()), bool(self.stash.all())
        self.depth = max(delays) + 1
        self.ring = self.w.expand(self.depth, *self.w.shape).clone()
        self.same = len(set(delays)) == 1
        self._rows = torch.arange(len(runs))

    def _column(self, values: Sequence[float]) -> Tensor | float | None:
        """Values [R, 1] of the weights' dtype; a number if all are the same; None if that is 0."""
        if len(set(values)) == 1:
            return values[0] or None
        return torch.tensor(values, dtype=torch.float64).to(self.w)[:, None]

    @torch.no_grad()
    def show(self, step: int, rates: Sequence[float]) -> None:
        """Predict, keep the prediction, and make live what this step's forward pass sees: version max(0, step - D)."""
        now = self.ring[step % self.depth]
        if self.by_velocity is not None:
            torch.mul(self.velocity, self.by_velocity, out=now)
            now.mul_(self._negative(rates)).add_(self.w)
        else:
            now.copy_(self.w)
        if self.by_weight is not None and self.before is not None:
            torch.sub(self.w, self.before, out=self.scratch)
            now.add_(self.scratch.mul_(self.by_weight))
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
        newest = self.w
        if self.back is not None:
            newest = torch.mul(self.velocity, self.back, out=self.scratch).mul_(self._negative(rates)).add_(self.w)
        if self.some_stash:
            newest = torch.where(self.stash, self.live, newest)
        self.live.copy_(newest)

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
        if self.a is not None:
            change = torch.mul(self.velocity, self.a, out=self.scratch)
            change.add_(gradient.mul_(0.0 if self.b is None else self.b))
        if any(K for _, K in self.annealing):
            late = [D ** (1 - min(step / K, 1)) if K else 1.0 for D, K in self.annealing]
            change = torch.div(change, torch.tensor(late, dtype=torch.float64).to(self.w)[:, None], out=self.scratch)
        rate = self._negative(rates)
        if isinstance(rate, Tensor):
            self.w.add_(torch.mul(change, rate, out=self.scratch))
        else:
            self.w.add_(change, alpha=rate)

    def _negative(self, rates: Sequence[float]) -> Tensor | float:
        if len(set(rates)) == 1:
            return -rates[0]
        return torch.tensor(rates, dtype=torch.float64).neg().to(self.w)[:, None]


def _mitigation(run: Run) -> Mitigation:
    return Mitigation.parse(run.mitigation) if isinstance(run.mitigation, str) else run.mitigation


def _matching(own: dict[str, nn.Parameter], name: str, first: Tensor, run: int) -> Tensor:
    """The parameter of a run's model, if it is like the first's."""
    found = own.get(name)
    if found is None or found.shape != first.shape or found.dtype != first.dtype or found.device != first.device:
        has = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
        raise RecoupError(
            f"pipeline.Batched: {name} is {first.dtype} {list(first.shape)} in the first model, {has} in model {run}"
        )
    return found.detach()
