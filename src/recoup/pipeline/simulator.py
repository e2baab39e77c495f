"""Pipelined backpropagation on one device, exact: samples one after another, each seeing the weights its stages had.

Sample k is forwarded with version max(0, k - D_s) of stage s and sent back through the newest weights. That *is* the
asynchronous pipeline, tick for tick, so only a map from parameters to stages is needed, not a model that is cut.

Every stage keeps its newest weights, its velocity and a ring of the weights that forwards are still to use, all flat;
the model's parameters are views of one more flat buffer, which is overwritten in place through an alias. The graph
keeps references, not copies, so what lies there during the backward pass is what it multiplies with.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.formats.fields import integer
from recoup.pipeline.derived import refuse_derived_weights
from recoup.pipeline.mitigation import Mitigation
from recoup.pipeline.optimizer import Ring, StageOptimizer
from recoup.pipeline.schedule import check_delays
from recoup.pipeline.stages import resolve

# Every parameter begins where an allocation of its own could: elsewhere MKL's and oneDNN's products round otherwise.
ALIGNMENT = 64

Rate = float | Callable[[int], float]


class Simulator:
    """A model trained as by a pipeline whose stages are ``delays`` updates late.

    Args:
        model: trained in place, in its dtype; after every step, also after an error, its parameters are the newest
            weights. It must not change its parameters by itself.
        stages: lists of module names; see `pipeline.stages`. `automatic` makes them for common networks.
        delays: D_s of every stage, in updates; see `delays`.
        lr: the learning rate, or a function of the update's number; it may be set between steps.
        momentum, weight_decay: of SGD; the decay acts on the newest weights.
        mitigation: a `Mitigation` or its name.
        loss: of (output, y); the gradient of an update is the mean over its samples' losses.
        update_size: steps whose gradients are averaged into one update; they are forwarded with the same version.
        first: index of the first stage, where the model is a later part of a pipeline.

    Raises:
        RecoupError: stages that miss, repeat or invent a module, or share a parameter; delays that do not fit; modules
            that save weights derived from their parameters (a parametrization, or a forward that standardizes its
            weight) with a delay and without ``stash``: the backward pass would use the stale ones. In a step: batch
            norm with one sample, a loss that is not finite (with the step; nothing is updated), autocast.

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
    ) -> None:
        stages = [list(names) if not isinstance(names, str) else names for names in stages]
        self.model, self.lr, self.loss = model, lr, loss
        self.mitigation = Mitigation.parse(mitigation) if isinstance(mitigation, str) else mitigation
        self.delays = check_delays(delays, len(stages))
        self.momentum, self.weight_decay = _positive("momentum", momentum), _positive("weight_decay", weight_decay)
        self.update_size = integer("pipeline.Simulator", "update_size", update_size, (1, 1 << 31))
        self.names, self._first = resolve(model, stages), first
        self.steps = self.updates = 0
        norms = nn.modules.batchnorm._BatchNorm
        self._batch_norms = {name: module for name, module in model.named_modules() if isinstance(module, norms)}
        self._unchecked = any(self.delays) and not self.mitigation.stash
        self._flatten()

    def _flatten(self) -> None:
        """Lay all parameters out in one buffer, stage by stage, without changing them."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        names = [[name for name in stage if parameters[name].requires_grad] for stage in self.names]
        first = [parameters[name] for stage in names for name in stage]
        if not first:
            raise RecoupError("pipeline.Simulator: the model has no parameters that require a gradient")
        kinds = {(p.dtype, p.device) for p in first}
        if len(kinds) > 1:
            raise RecoupError(
                f"pipeline.Simulator: parameters must have one dtype and device; got {sorted(map(str, kinds))}"
            )
        align = ALIGNMENT // first[0].element_size()
        sizes = [sum(-(-parameters[name].numel() // align) * align for name in stage) for stage in names]
        self._live = first[0].new_zeros(sum(sizes), requires_grad=False)
        self._gradient = torch.zeros_like(self._live)
        self._parameters = []
        at = 0
        for parameter in first:
            end = at + parameter.numel()
            self._live[at:end].copy_(parameter.detach().reshape(-1))
            parameter.data = self._live[at:end].view(parameter.shape)  # no graph is alive yet
            self._parameters.append((parameter, self._gradient[at:end].view(parameter.shape)))
            at += -(-parameter.numel() // align) * align
        self._marks = self._look()
        self._sizes = sizes
        self._parts = list(self._live.split(sizes))
        self._newest = self._live.clone()
        how = (self.momentum, self.weight_decay, self.mitigation)
        self._optimizer = StageOptimizer(self._newest, sizes, self.delays, self._first, *how)
        self._ring, self._written = Ring(self._newest, sizes, self.delays), 0

    @property
    def rate(self) -> float:
        """The learning rate of the coming update."""
        rate = self.lr(self.updates) if callable(self.lr) else self.lr
        if not rate >= 0:
            raise RecoupError(f"pipeline.Simulator: the learning rate of update {self.updates} is {rate!r}")
        return float(rate)

    def step(self, x: Any, y: Any) -> float:
        """Forward and backward of one sample, or batch, and its update; the loss.

        ``x`` and ``y`` reach ``model(x)`` and ``loss(output, y)`` unchanged.
        """
        self.check(x)
        with self._returned(), torch.enable_grad():
            self.attach()
            self.show(self.updates)
            value = self.loss(self.model(x), y)
            number = self.checked(value, f"step {self.steps}")
            if not self.mitigation.stash:
                self.show_newest(self.updates)
            value.backward()
            self.update()
        return number

    def attach(self) -> None:
        """Let gradients add up in the flat buffer."""
        for parameter, gradient in self._parameters:
            if parameter.grad is not gradient:
                parameter.grad = gradient

    def show(self, version: int) -> None:
        """Put the weights of a forward pass begun at a version into the model."""
        if self._written < self.updates:  # not at the end of the update: the prediction's rate is the coming update's
            self._written = self.updates
            self._ring.write(self.updates, self._optimizer.ahead(self.rate))
        self._ring.read(version, self._parts)

    def show_newest(self, version: int) -> None:
        """Put the weights of a backward pass into the model, in place under the graph; with stash the forward's."""
        if self.mitigation.stash:
            self._ring.read(version, self._parts)
        else:
            with torch.no_grad():
                self._live.copy_(self._optimizer.returning(self.rate))

    @staticmethod
    def checked(value: Tensor, where: str) -> float:
        """A loss as a number, or an error."""
        number = value.item()
        if not math.isfinite(number):
            raise RecoupError(f"pipeline: the loss of {where} is {number}; nothing was updated")
        return number

    def update(self) -> None:
        """Count a backward pass; after ``update_size`` of them, update."""
        self.steps += 1
        if self.steps % self.update_size == 0:
            self._update(self.rate)

    def _update(self, rate: float) -> None:
        if self.update_size > 1:
            self._gradient.div_(self.update_size)
        self._optimizer.step(self._gradient, rate)
        self._gradient.zero_()
        self.updates += 1

    @contextmanager
    def _returned(self) -> Iterator[None]:
        """Whatever happens: the newest weights in the model, and no gradient of an unfinished step."""
        kept = self._gradient.clone() if self.steps % self.update_size else None
        try:
            yield
        except BaseException:
            self._gradient.zero_() if kept is None else self._gradient.copy_(kept)
            raise
        finally:
            self.settle()

    def settle(self) -> None:
        """Put the newest weights into the model."""
        with torch.no_grad():
            self._live.copy_(self._newest)

    def _look(self) -> list[tuple[int, int]]:
        """What changes when someone else writes to a parameter (our alias does not count) or moves it."""
        return [(parameter._version, parameter.data_ptr()) for parameter, _ in self._parameters]

    def _changed(self) -> str:
        """The first parameter that was written to or moved."""
        now = self._look()
        index = next(i for i, mark in enumerate(self._marks) if now[i] != mark)
        found = self._parameters[index][0]
        return next(name for name, parameter in self.model.named_parameters() if parameter is found)

    def check(self, x: Any) -> None:
        """Refuse what would silently use stale weights or statistics of one sample."""
        if self._look() != self._marks:
            raise RecoupError(
                f"pipeline.Simulator: {self._changed()} was written to or moved since the pipeline was filled, and "
                "older versions of it are under way: make a new Simulator, or use its load_state_dict"
            )
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise RecoupError("pipeline.Simulator: autocast saves cast weights, which stay stale; train in one dtype")
        if self._batch_norms and isinstance(x, Tensor) and x.dim() and x.shape[0] == 1:
            for name, module in self._batch_norms.items():
                if module.training:
                    raise RecoupError(
                        f"pipeline.Simulator: {name} is a batch norm, and the batch has one sample: use group norm "
                        "(nn.GroupNorm, or norm='group' in recoup.models)"
                    )
        if self._unchecked:
            refuse_derived_weights(self.model, x, [parameter for parameter, _ in self._parameters])
            self._unchecked = False

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on bit for bit, as tensors and plain values."""
        return {
            "configuration": self._configuration(),
            "steps": self.steps,
            "updates": self.updates,
            "gradient": self._gradient.clone(),
            "optimizer": self._optimizer.state(),
            "ring": [rows.clone() for rows in self._ring.rows],
            "buffers": {name: buffer.clone() for name, buffer in self.model.named_buffers()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; the learning rate is not part of it.

        Raises:
            RecoupError: the state of another configuration; the message says what differs. Nothing is then changed.
        """
        mine, theirs = self._configuration(), state.get("configuration", {})
        for name, value in mine.items():
            if theirs.get(name) != value:
                raise RecoupError(
                    f"pipeline.Simulator: the state is of another run: {name} is {theirs.get(name)!r}, here {value!r}"
                )
        self._optimizer.load(state["optimizer"])
        for rows, kept in zip(self._ring.rows, state["ring"], strict=True):
            rows.copy_(kept)
        self._gradient.copy_(state["gradient"])
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(state["buffers"][name])
        self.steps, self.updates = int(state["steps"]), int(state["updates"])
        self._written = self.updates - 1  # written again by the next forward pass, to the same bits
        self.settle()

    def _configuration(self) -> dict[str, Any]:
        return {
            "stages": self.names,
            "sizes": self._sizes,
            "delays": self.delays,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "mitigation": repr(self.mitigation),
            "update_size": self.update_size,
        }


def _positive(name: str, value: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise RecoupError(f"pipeline.Simulator({name}={value!r}): {name} must be a number from 0")
    return float(value)
