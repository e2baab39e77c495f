"""Pipelined backpropagation on one device, exact: samples one after another, each seeing the weights its stages had.

Sample k is forwarded with version max(0, k - D_s) of stage s and sent back through the newest weights. That *is* the
asynchronous pipeline, tick for tick, so only a map from parameters to stages is needed, not a model that is cut.

Every stage keeps its newest weights, its velocity and a ring of the weights that forwards are still to use, all flat;
the model's parameters are views of one more flat buffer, which is overwritten in place through an alias. The graph
keeps references, not copies, so what lies there during the backward pass is what it multiplies with.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from recoup.errors import RecoupError
from recoup.fields import boolean, integer
from recoup.network.norms import is_batch_norm
from recoup.pipeline.derived import refuse_derived_weights
from recoup.pipeline.finite import broken_stage, refuse_gradient, scalar
from recoup.pipeline.flat import WRITTEN, FlatParameters
from recoup.pipeline.graphs import Graphs, Pass
from recoup.pipeline.mitigation import Mitigation
from recoup.pipeline.optimizer import Ring, StageOptimizer
from recoup.pipeline.schedule import check_delays
from recoup.pipeline.stages import resolve
from recoup.pipeline.state import Buffers, random_state, refuse_unlike, set_random_state

Rate = float | Callable[[int], float]


class Simulator:
    """A model trained as by a pipeline whose stages are ``delays`` updates late.

    A parameter that a step does not use has a gradient of zero there: momentum and decay act on it, as with
    ``zero_grad(set_to_none=False)`` in torch.

    Args:
        model: trained in place, in its dtype; after every step, also after an error, its parameters are the newest
            weights. It must not change its parameters by itself, and what others write to them is refused in the next
            step, or, by way of ``.data``, which torch does not count, undone. A copy.deepcopy of a Simulator is
            refused too: make a new one and load the state.
        stages: lists of module names; see `pipeline.stages`. `automatic` makes them for common networks.
        delays: D_s of every stage, in updates; see `delays`.
        lr: the learning rate, or a function of the update's number; it may be set between steps.
        momentum, weight_decay: of SGD; the decay acts on the newest weights.
        mitigation: a `Mitigation` or its name.
        loss: of (output, y), a tensor of one element; the gradient of an update is the mean over its samples' losses.
        update_size: steps whose gradients are averaged into one update; they are forwarded with the same version.
        first: index of the first stage, where the model is a later part of a pipeline.
        cuda_graph: replay forward and backward as a CUDA graph, captured at the first step of every shape of inputs.
            The model must be on a CUDA device, its pass free of Python that changes from step to step and of
            synchronisation, x and y tensors or tuples, lists and dicts of them. The logic is tested with a recorder of
            operations on the CPU; on a GPU it was not run yet.

    Raises:
        RecoupError: stages that miss, repeat or invent a module, or share a parameter; delays that do not fit; modules
            that save weights derived from their parameters (a parametrization, or a forward that standardizes its
            weight) with a delay and without ``stash``: the backward pass would use the stale ones. In a step: batch
            norm with one sample, autocast, a parameter that someone else changed; a loss or a gradient that is not
            finite, with the step and the stage: the weights, rings and buffers are then those before the step.

    Source: Kosson et al., MLSys 2021; that ``update_size`` leaves delays in updates is our definition.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> simulator = Simulator(model, [["0", "1"], ["2"]], [2, 0], 0.1, 0.9, 0.0, "sc", nn.functional.cross_entropy)
    >>> loss = simulator.step(torch.ones(1, 4), torch.zeros(1, dtype=torch.int64))
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Iterable[str]],
        delays: Sequence[int],
        lr: Rate,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        mitigation: Mitigation | str = "none",
        loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy,
        *,
        update_size: int = 1,
        first: int = 0,
        cuda_graph: bool = False,
    ) -> None:
        stages = [list(names) if not isinstance(names, str) else names for names in stages]
        self.model, self.lr, self.loss, self.stages = model, lr, loss, stages
        self.mitigation = Mitigation.parse(mitigation) if isinstance(mitigation, str) else mitigation
        self.delays = check_delays(delays, len(stages))
        self.momentum, self.weight_decay = _positive("momentum", momentum), _positive("weight_decay", weight_decay)
        self.update_size = integer("pipeline.Simulator", "update_size", update_size, (1, 1 << 31))
        self.names, self.first = resolve(model, stages), first
        boolean("pipeline.Simulator", "cuda_graph", cuda_graph)
        if cuda_graph:
            _refuse_off_cuda(model)
        self.steps = self.updates = 0
        self._batch_norms = {name: module for name, module in model.named_modules() if is_batch_norm(module)}
        self._unchecked = any(self.delays) and not self.mitigation.stash
        self._flat = flat = FlatParameters(model, self.names)
        self._newest, self._buffers = flat.live.clone(), Buffers(model)
        how = (self.momentum, self.weight_decay, self.mitigation)
        self._optimizer = StageOptimizer(self._newest, flat.sizes, self.delays, first, *how)
        self._ring, self._written = Ring(self._newest, flat.sizes, self.delays), 0
        self._seen, self._torn = flat.gradient._version, False
        self._graphs = Graphs(model) if cuda_graph else None
        # what a graph's backward pass reads: memory that stays, and the newest weights lie in such memory already
        self._returning = self._newest.clone() if self.mitigation.prediction == "spectrain" else self._newest

    @property
    def rate(self) -> float:
        """The learning rate of the coming update."""
        rate = self.lr(self.updates) if callable(self.lr) else self.lr
        if not 0 <= rate < math.inf:
            raise RecoupError(f"pipeline.Simulator: the learning rate of update {self.updates} is {rate!r}")
        return float(rate)

    def step(self, x: Any, y: Any) -> float:
        """Forward and backward of one sample, or batch, and its update; the loss.

        ``x`` and ``y`` reach ``model(x)`` and ``loss(output, y)`` unchanged.
        """
        self.check(x)
        kept, written = self._begin(), self._written
        try:
            with torch.enable_grad():
                self._flat.attach()
                self.show(self.updates)
                number = self._eager(x, y) if self._graphs is None else self._replayed(self._graphs, x, y, kept)
                self.update()
        except BaseException:
            self._undo(kept)
            self._written = written  # a step tried again may have another rate
            raise
        finally:
            self.settle()
            self._seen = self._flat.gradient._version
        return number

    def _eager(self, x: Any, y: Any) -> float:
        value = scalar(self.loss(self.model(x), y))
        number = value.item()
        if not math.isfinite(number):
            self.refuse_loss(number, x, f"step {self.steps}")
        if not self.mitigation.stash:
            self.show_newest(self.updates)
        value.backward()
        self.refuse_gradient(f"step {self.steps}")
        return number

    def _replayed(self, graphs: Graphs, x: Any, y: Any, kept: Tensor | None) -> float:
        if self._returning is not self._newest:
            with torch.no_grad():
                self._returning.copy_(self._optimizer.returning(self.rate))

        def undo() -> None:
            self._undo(kept)
            self.show(self.updates)

        number, total = graphs.run(x, y, self._pass, undo).tolist()  # waits for the GPU once
        if not math.isfinite(number):
            self._undo(kept)
            self.show(self.updates)
            self.refuse_loss(number, x, f"step {self.steps}")
        self.refuse_gradient(f"step {self.steps}", total)
        return number

    def _pass(self, x: Any, y: Any) -> Pass:
        """What a graph holds: forward, loss and backward; its result is the loss and the sum of the gradient."""

        def run() -> Tensor:
            value = scalar(self.loss(self.model(x), y))
            if not self.mitigation.stash:
                with torch.no_grad():
                    self._flat.live.copy_(self._returning)
            value.backward()
            return torch.stack([value.detach().double().view(()), self._flat.gradient.sum().double()])

        return run

    def attach(self) -> None:
        """Let gradients add up in the flat buffer."""
        self._flat.attach()

    def show(self, version: int) -> None:
        """Put the weights of a forward pass begun at a version into the model."""
        if self._written < self.updates:  # not at the end of the update: the prediction's rate is the coming update's
            self._ring.write(self.updates, self._optimizer.ahead(self.rate))
            self._written = self.updates
        self._ring.read(version, self._flat.parts)

    def show_newest(self, version: int) -> None:
        """Put the weights of a backward pass into the model, in place under the graph; with stash the forward's."""
        if self.mitigation.stash:
            self._ring.read(version, self._flat.parts)
        else:
            with torch.no_grad():
                self._flat.live.copy_(self._optimizer.returning(self.rate))

    def refuse_loss(self, number: float, x: Any, where: str) -> None:
        """Say in which stage a loss that is not finite arose; the weights of the forward pass are in the model."""
        self._buffers.put_back()
        reason = broken_stage(self.model, x, self.stages, self._flat.parts, self.first)
        raise RecoupError(f"pipeline: the loss of {where} is {number}: {reason}; nothing was updated")

    def refuse_gradient(self, where: str, total: float | None = None) -> None:
        """Raise if the gradient so far, whose sum is ``total``, is not finite."""
        total = self._flat.gradient.sum().item() if total is None else total
        if not math.isfinite(total):  # the sum of large numbers may be infinite: look closer
            refuse_gradient(self._flat.gradient, self._flat.sizes, self.first, where)

    def update(self) -> None:
        """Count a backward pass; after ``update_size`` of them, update."""
        if (self.steps + 1) % self.update_size:
            self.steps += 1
            return
        rate, gradient = self.rate, self._flat.gradient
        self._torn = True  # until all of it is done
        if self.update_size > 1:
            gradient.div_(self.update_size)
        self._optimizer.step(gradient, rate)
        gradient.zero_()
        self.steps += 1
        self.updates += 1
        self._torn = False

    def _begin(self) -> Tensor | None:
        """Remember what an error must put back; the gradient of an update that is not complete."""
        gradient, under_way = self._flat.gradient, self.steps % self.update_size
        if under_way:
            self._refuse_foreign_gradient()
        elif gradient._version != self._seen:  # a backward pass of somebody else
            gradient.zero_()
        self._buffers.keep()
        return gradient.clone() if under_way else None

    def _refuse_foreign_gradient(self) -> None:
        if self._flat.gradient._version != self._seen:
            raise RecoupError(
                "pipeline.Simulator: the parameters' gradients were changed between the samples of one update; use "
                "torch.autograd.grad for gradients of your own, or do it between updates"
            )

    def _undo(self, kept: Tensor | None) -> None:
        """No gradient and no statistics of an unfinished step."""
        self._flat.gradient.zero_() if kept is None else self._flat.gradient.copy_(kept)
        self._buffers.put_back()

    def settle(self) -> None:
        """Put the newest weights into the model."""
        with torch.no_grad():
            self._flat.live.copy_(self._newest)

    def clear(self) -> None:
        """Forget the gradient of an unfinished update."""
        self._flat.gradient.zero_()

    def check(self, x: Any) -> None:
        """Refuse what would silently use stale weights or statistics of one sample."""
        changed = self._flat.changed()
        if changed is not None:
            advice = "make a new Simulator" + ", or use its load_state_dict" * changed.endswith(WRITTEN)
            raise RecoupError(
                f"pipeline.Simulator: {changed} since the pipeline was filled, and older versions of it are under way: "
                f"{advice}"
            )
        self._refuse_torn()
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise RecoupError("pipeline.Simulator: autocast saves cast weights, which stay stale; train in one dtype")
        if self._batch_norms and _one_sample(x):
            for name, module in self._batch_norms.items():
                if module.training:
                    raise RecoupError(
                        f"pipeline.Simulator: {name} is a batch norm, and the batch has one sample: use group norm "
                        "(nn.GroupNorm, or norm='group' in recoup.models)"
                    )
        if self._unchecked:
            refuse_derived_weights(self.model, x, self._flat.parameters)
            self._unchecked = False

    def _refuse_torn(self) -> None:
        if self._torn:
            raise RecoupError(
                f"pipeline.Simulator: update {self.updates} was interrupted half-way; use load_state_dict to go on "
                "from an earlier state, or make a new Simulator"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on bit for bit, as tensors and plain values.

        That is also the model's buffers and frozen parameters, and the state of torch's default random generators.
        """
        self._refuse_torn()
        if self.steps % self.update_size:
            self._refuse_foreign_gradient()
        return self._state()

    def _state(self) -> dict[str, Any]:
        gradient = self._flat.gradient
        return {
            "configuration": self._configuration(),
            "steps": self.steps,
            "updates": self.updates,
            "written": self._written,
            "gradient": gradient.clone() if self.steps % self.update_size else torch.zeros_like(gradient),
            "optimizer": self._optimizer.state(),
            "ring": [rows.clone() for rows in self._ring.rows],
            "buffers": {name: buffer.clone() for name, buffer in self.model.named_buffers()},
            "frozen": {name: parameter.detach().clone() for name, parameter in self._flat.frozen.items()},
            "random": random_state(self._flat.live.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; the learning rate and the loss are not part of it.

        Raises:
            RecoupError: the state of another configuration, or one that is incomplete; the message says what differs.
                Nothing is then changed.
        """
        mine = self._configuration()
        theirs = state.get("configuration") if isinstance(state, dict) else None
        if not isinstance(theirs, dict):
            raise RecoupError("pipeline.Simulator: no state of a Simulator: it has no configuration")
        for name, value in mine.items():
            if theirs.get(name) != value:
                raise RecoupError(
                    f"pipeline.Simulator: the state is of another run: {name} is {theirs.get(name)!r}, here {value!r}"
                )
        ours = self._state()
        rest = [name for name in ours if name not in ("configuration", "random")]  # generators differ with the machine
        refuse_unlike({name: ours[name] for name in rest}, {name: state[name] for name in rest if name in state})
        refuse_unlike({"cpu": ours["random"]["cpu"]}, {"cpu": state.get("random", {}).get("cpu")}, "the random state")
        self._take(state)

    @torch.no_grad()
    def _take(self, state: dict[str, Any]) -> None:
        self._torn = True  # an interrupt in here leaves half a state
        self._optimizer.load(state["optimizer"])
        for rows, kept in zip(self._ring.rows, state["ring"], strict=True):
            rows.copy_(kept)
        self._flat.gradient.copy_(state["gradient"])
        others = [*self.model.named_buffers(), *self._flat.frozen.items()]
        for name, value in others:
            value.copy_(state["buffers" if name in state["buffers"] else "frozen"][name])
        set_random_state(state["random"], self._flat.live.device)
        self.steps, self.updates, self._written = (int(state[name]) for name in ("steps", "updates", "written"))
        self._seen, self._torn = self._flat.gradient._version, False
        self.settle()
        self._flat.accept()

    def _configuration(self) -> dict[str, Any]:
        return {
            "stages": self.names,
            "shapes": self._flat.shapes,
            "dtype": str(self._newest.dtype),
            "delays": self.delays,
            "first": self.first,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "mitigation": repr(self.mitigation),
            "update_size": self.update_size,
        }


def _one_sample(x: Any) -> bool:
    """Whether every tensor in a batch has one row."""
    rows = [leaf.shape[0] for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.dim()]
    return bool(rows) and all(count == 1 for count in rows)


def _refuse_off_cuda(model: nn.Module) -> None:
    places = sorted({str(p.device) for p in model.parameters() if p.device.type != "cuda"})
    if places:
        raise RecoupError(
            f"pipeline.Simulator(cuda_graph=True): parameters are on {', '.join(places)}; they must be on a CUDA device"
        )


def _positive(name: str, value: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise RecoupError(f"pipeline.Simulator({name}={value!r}): {name} must be a number from 0")
    return float(value)
