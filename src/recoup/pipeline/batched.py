"""Many runs of one network at once: seeds, mitigations and delays as one batched network.

At batch one a run uses a fraction of the machine: most of its time goes to starting operations. Here every operation
works on all runs (`torch.vmap`), and every run sees its own stale weights.

Legend: R runs; every parameter is one `Block` of all runs.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from recoup.errors import RecoupError
from recoup.network.norms import is_batch_norm
from recoup.pipeline.block import Block, Run, mitigation_of
from recoup.pipeline.derived import refuse_derived_weights
from recoup.pipeline.norms import OnlineNorm2d
from recoup.pipeline.schedule import check_delays
from recoup.pipeline.stages import listed, resolve
from recoup.pipeline.state import random_state, refuse_unlike, set_random_state


class Batched:
    """Runs that train at once, each as its own `Simulator` would.

    A run's weights equal those of its own `Simulator` up to rounding, not bit for bit: a batched matrix product sums in
    another order than a single one. All that follows the gradient is the same arithmetic.

    Args:
        models: one a run, of the same architecture and dtype, with that run's initial weights; they are not changed
            (see `load`). Frozen parameters and buffers are each run's own, and constants; what moves its buffers in
            training (batch norm, online norm) is refused.
        stages: lists of module names, as of `Simulator`.
        runs: one a model.
        loss: of (output, y), for one run; it must work under `torch.vmap`.

    Raises:
        RecoupError: models and runs that do not fit each other or the stages; what `Simulator` refuses; in a step
            inputs without R rows, a learning rate that is not a number from 0, autocast.

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
        for name, value, kind in (("models", models, nn.Module), ("runs", runs, Run)):
            if not isinstance(value, list | tuple) or not all(isinstance(one, kind) for one in value):
                raise RecoupError(f"pipeline.Batched({name}={value!r}): must be a list of {kind.__name__} objects")
        if not models or len(models) != len(runs):
            raise RecoupError(
                f"pipeline.Batched: {len(models)} models for {len(runs)} runs; there must be one for each"
            )
        for name, module in models[0].named_modules():
            if (is_batch_norm(module) or isinstance(module, OnlineNorm2d)) and module.training:
                kind = "an online norm" if isinstance(module, OnlineNorm2d) else "a batch norm"
                raise RecoupError(f"pipeline.Batched: {name} is {kind} in training: use group norm")
        self._network, self._loss, self.runs, self.steps = models[0], loss, list(runs), 0
        self.diverged: dict[int, int] = {}
        stages = listed(stages)
        delays = [check_delays(run.delays, len(stages)) for run in runs]
        parameters = [dict(model.named_parameters()) for model in models]
        _same_names(parameters, "parameters")
        self._blocks: dict[str, Block] = {}
        for index, names in enumerate(resolve(models[0], stages)):
            for name in names:
                if parameters[0][name].requires_grad:
                    each = [_matching(own, name, parameters[0][name], run) for run, own in enumerate(parameters)]
                    self._blocks[name] = Block(torch.stack(each), index, [d[index] for d in delays], self.runs)
        if not self._blocks:
            raise RecoupError("pipeline.Batched: the models have no parameters that require a gradient")
        constants = [_constants(model) for model in models]
        _same_names(constants, "frozen parameters and buffers")
        self._constants = {
            name: torch.stack([_matching(own, name, first, run) for run, own in enumerate(constants)])
            for name, first in constants[0].items()
        }
        self._unchecked = any(
            delay and not mitigation_of(run).stash for run, own in zip(runs, delays, strict=True) for delay in own
        )

    def step(self, x: Any, y: Any) -> Tensor:
        """One step of every run; the losses [R].

        A run whose loss is not finite keeps the weights it had before that step, ``diverged[run]`` is the step's number
        and its losses stay NaN; the other runs go on.

        Args:
            x, y: tensors [R, ...], or tuples of them: row r is the input of run r, batch dimension included.
        """
        rates = self._checked(x, y)
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
            leaves = list(live.values())
            gradients = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
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

    def _checked(self, x: Any, y: Any) -> list[float]:
        """The rates of this step; an error if they or the inputs do not fit."""
        R = len(self.runs)
        for leaf in tree_leaves((x, y)):
            if isinstance(leaf, Tensor) and (leaf.dim() == 0 or len(leaf) != R):
                raise RecoupError(f"pipeline.Batched: an input is {list(leaf.shape)}; it must have a row a run, {R}")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise RecoupError("pipeline.Batched: autocast saves cast weights, which stay stale; train in one dtype")
        rates = [run.lr(self.steps) if callable(run.lr) else run.lr for run in self.runs]
        for run, rate in enumerate(rates):
            if not 0 <= rate < math.inf:
                raise RecoupError(f"pipeline.Batched: the learning rate of run {run} in step {self.steps} is {rate!r}")
        return [float(rate) for rate in rates]

    def _forward(self, live: Mapping[str, Tensor], x: Any, y: Any) -> Tensor:
        def one(weights: Any, constants: Any, x: Any, y: Any) -> Tensor:
            return self._loss(torch.func.functional_call(self._network, {**constants, **weights}, (x,)), y)

        over = (0, 0 if self._constants else None, 0, 0)
        return torch.vmap(one, over, randomness="different")(live, self._constants, x, y)

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

    def state_dict(self) -> dict[str, Any]:
        """Everything that the runs need to go on bit for bit, torch's default random generators included."""
        return {
            "configuration": self._configuration(),
            "steps": self.steps,
            "diverged": dict(self.diverged),
            "random": random_state(self._device),
            "blocks": {name: block.state() for name, block in self._blocks.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; learning rates are not part of it.

        Raises:
            RecoupError: the state of other runs, or one that is incomplete; the message says what differs. Nothing is
                then changed.
        """
        mine, theirs = self._configuration(), state.get("configuration") if isinstance(state, dict) else None
        if not isinstance(theirs, dict):
            raise RecoupError("pipeline.Batched: no state of a Batched: it has no configuration")
        for name, value in mine.items():
            if theirs.get(name) != value:
                raise RecoupError(
                    f"pipeline.Batched: the state is of other runs: {name} is {theirs.get(name)!r}, here {value!r}"
                )
        ours = self.state_dict()
        refuse_unlike(
            {n: ours[n] for n in ("steps", "blocks")}, {n: state[n] for n in ("steps", "blocks") if n in state}
        )
        refuse_unlike({"cpu": ours["random"]["cpu"]}, {"cpu": state.get("random", {}).get("cpu")}, "the random state")
        for name, block in self._blocks.items():
            block.load(state["blocks"][name])
        set_random_state(state["random"], self._device)
        self.steps, self.diverged = int(state["steps"]), {int(k): int(v) for k, v in state["diverged"].items()}

    @property
    def _device(self) -> torch.device:
        return next(iter(self._blocks.values())).w.device

    def _configuration(self) -> dict[str, Any]:
        return {
            "shapes": {name: [str(block.w.dtype), *block.shape] for name, block in self._blocks.items()},
            "stages": {name: block.stage for name, block in self._blocks.items()},
            "delays": {name: block.delays for name, block in self._blocks.items()},
            "mitigations": [repr(mitigation_of(run)) for run in self.runs],
            "momentum": [float(run.momentum) for run in self.runs],
            "weight_decay": [float(run.weight_decay) for run in self.runs],
        }


class _Probe(nn.Module):
    """The batched forward pass as a module, for the check of saved weights."""

    def __init__(self, batched: Batched, live: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network = batched._network  # so that errors can name its modules
        self.run = lambda pair: batched._forward(live, *pair)

    def forward(self, pair: tuple[Any, Any]) -> Tensor:
        return self.run(pair)


def _constants(model: nn.Module) -> dict[str, Tensor]:
    """What training does not change: frozen parameters and buffers."""
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {**frozen, **dict(model.named_buffers())}


def _same_names(each: Sequence[Mapping[str, Tensor]], kind: str) -> None:
    for run, own in enumerate(each):
        if other := set(own) ^ set(each[0]):
            raise RecoupError(
                f"pipeline.Batched: the first model and model {run} do not have the same {kind}: "
                f"{', '.join(sorted(other))}"
            )


def _matching(own: Mapping[str, Tensor], name: str, first: Tensor, run: int) -> Tensor:
    """The parameter of a run's model, if it is like the first's."""
    found = own.get(name)
    if found is not None and found.requires_grad != first.requires_grad:
        raise RecoupError(f"pipeline.Batched: {name} is frozen in one of the first model and model {run}, not in both")
    if found is None or found.shape != first.shape or found.dtype != first.dtype or found.device != first.device:
        has = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
        raise RecoupError(
            f"pipeline.Batched: {name} is {first.dtype} {list(first.shape)} in the first model, {has} in model {run}"
        )
    return found.detach()
