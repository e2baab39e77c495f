"""Pipelined backpropagation on one device, exact: samples one after another, each seeing the weights its stages had.

Sample k is forwarded with version max(0, k - D_s) of stage s and sent back through the newest weights. That *is* the
asynchronous pipeline, tick for tick, so only a map from parameters to stages is needed, not a model that is cut.

The weights of all versions that are still needed, and how a pass comes to see them, are `rings.Rings`'; the graph keeps
references, not copies, so what is shown during the backward pass is what it multiplies with.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.fields import boolean, integer, is_number
from recoup.network.checks import is_module
from recoup.network.norms import is_batch_norm
from recoup.pipeline.arguments import clip_of, rate_of, refuse_autocast, refuse_off_cuda, refuse_one_sample, rule_of
from recoup.pipeline.derived import refuse_derived_weights
from recoup.pipeline.finite import broken_stage, scalar
from recoup.pipeline.gradients import Gradients, Kept
from recoup.pipeline.graphs import Graphs, Pass
from recoup.pipeline.layout import WRITTEN, Layout
from recoup.pipeline.memory import Memory, estimate, refuse_beyond
from recoup.pipeline.mitigation import Mitigation
from recoup.pipeline.optimizers import SGDM, Rule
from recoup.pipeline.rings import NEVER, Rings
from recoup.pipeline.schedule import check_delays
from recoup.pipeline.seeded import Streams, random_layers
from recoup.pipeline.stages import listed, resolve
from recoup.pipeline.state import Buffers, random_state, refuse_unlike, set_random_state
from recoup.pipeline.update import Update

Rate = float | Callable[[int], float]


class Simulator:
    """A model trained as by a pipeline whose stages are ``delays`` updates late.

    A parameter that a step does not use has a gradient of zero there: momentum and decay act on it, as with
    ``zero_grad(set_to_none=False)`` in torch.

    Args:
        model: trained in place, in its dtype; after every step, also after an error, its parameters are the newest
            weights. It must not change its parameters by itself, and what others write to them is refused in the next
            step; by way of ``.data``, which torch does not count, it is undone, or, in parameters of
            `layout.LARGE` elements and more, taken into the newest version alone.
        stages: lists of module names; see `pipeline.stages`. `automatic` makes them for common networks.
        delays: D_s of every stage, in updates; see `delays`.
        lr: the learning rate, or a function of the update's number; it may be set between steps.
        momentum, weight_decay: of SGD; the decay acts on the newest weights.
        mitigation: a `Mitigation` or its name.
        loss: of (output, y), a tensor of one element; the gradient of an update is the mean over its samples' losses.
        update_size: steps whose gradients are averaged into one update; they are forwarded with the same version.
        optimizer: a rule of `optimizers` in place of SGD with ``momentum`` and ``weight_decay``.
        clip: the largest Euclidean norm of a stage's gradient; a larger one is scaled down to it, as
            `torch.nn.utils.clip_grad_norm_` does; a norm over all stages would have to wait for them.
        seed: of random layers such as dropout, which draw by it, the sample and the stage (`seeded`); not in graphs.
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
        optimizer: Rule | None = None,
        clip: float | None = None,
        seed: int = 0,
        first: int = 0,
        cuda_graph: bool = False,
    ) -> None:
        is_module(model, "pipeline.Simulator")
        stages = listed(stages)
        self.model, self.lr, self.loss, self.stages = model, rate_of(lr), loss, stages
        self.run: Callable[[Any], Any] = model  # brings an input through the model
        self.mitigation = Mitigation.of(mitigation, "pipeline.Simulator")
        self.delays = check_delays(delays, len(stages))
        self.optimizer = SGDM(momentum, weight_decay) if optimizer is None else rule_of(optimizer)
        self.update_size = integer("pipeline.Simulator", "update_size", update_size, (1, 1 << 31))
        self.clip, self.names = clip_of(clip), resolve(model, stages)
        self.first = integer("pipeline.Simulator", "first", first, (0, 1 << 31))
        boolean("pipeline.Simulator", "cuda_graph", cuda_graph)
        if cuda_graph:
            refuse_off_cuda(model)
        self._at = 0, 0
        self._batch_norms = {name: module for name, module in model.named_modules() if is_batch_norm(module)}
        self._unchecked = any(self.delays) and not self.mitigation.stash
        self._layout, self._buffers = Layout(model, self.names), Buffers(model)
        update = Update(self.optimizer, self.mitigation, self.delays, first)
        copied = cuda_graph or self._layout.device.type != "cpu"
        refuse_beyond(estimate(self._layout, update, copied), self.delays, self._layout.device)
        self.rings = Rings(model, self._layout, update, self.update_size, self.clip, copied)
        self._gradients = Gradients(self._layout, fixed=cuda_graph)
        self._graphs = Graphs(model) if cuda_graph else None
        self.seed = integer("pipeline.Simulator", "seed", seed, (0, (1 << 64) - 1))
        self.streams = Streams(model, random_layers(model, stages, first), self.seed)

    @staticmethod
    def memory(
        model: nn.Module,
        stages: Sequence[Iterable[str]],
        delays: Sequence[int],
        mitigation: Mitigation | str = "none",
        optimizer: Rule | None = None,
    ) -> Memory:
        """What a simulator of these would keep, in bytes; nothing is allocated, and the model stays as it is.

        >>> print(Simulator.memory(nn.Linear(512, 256), [[""], []], [2, 0], "lwpv"))
        4.5 MiB (rings 2.0, newest 1.0, state 1.0, returning 0.0, copies 0.0, gradients 0.5)
        """
        is_module(model, "pipeline.Simulator.memory")
        names, how = resolve(model, listed(stages)), Mitigation.of(mitigation, "pipeline.Simulator.memory")
        update = Update(SGDM() if optimizer is None else optimizer, how, check_delays(delays, len(names)), 0)
        layout = Layout(model, names)
        return estimate(layout, update, layout.device.type != "cpu")

    def __deepcopy__(self, _: Any) -> "Simulator":
        raise RecoupError(
            "pipeline.Simulator: a copy would train the model that this one trains: make a new Simulator over a copy "
            "of the model, and load the state"
        )

    @property
    def steps(self) -> int:
        """Samples that went through."""
        return self._at[0]

    @property
    def updates(self) -> int:
        """Updates that were done."""
        return self._at[1]

    def skip(self, updates: int) -> None:
        """From the beginning, be where so many updates that change nothing lead; for measuring."""
        self.rings.fill(updates)
        self._at = updates * self.update_size, updates

    @property
    def rate(self) -> float:
        """The learning rate of the coming update."""
        return self._rate(self.updates)

    def _rate(self, update: int) -> float:
        rate = self.lr(update) if callable(self.lr) else self.lr
        if not is_number(rate) or not 0 <= rate < math.inf:
            raise RecoupError(f"pipeline.Simulator: the learning rate of update {update} is {rate!r}")
        return float(rate)

    def _foreseen(self) -> float:
        """The rate of the update after the coming one, if it can be known already: a schedule may end here."""
        if not self.rings.foresees:
            return NEVER
        try:
            return self._rate(self.updates + 1)
        except Exception:  # whatever it is: it is raised where that update asks, and until then nothing is predicted
            return NEVER

    def step(self, x: Any, y: Any) -> float:
        """Forward and backward of one sample, or batch, and its update; the loss.

        ``x`` and ``y`` reach ``model(x)`` and ``loss(output, y)`` unchanged.
        """
        self.check(x)
        kept, fixed = self.begin(), self.rings.fixed
        self._buffers.keep()
        try:
            with torch.enable_grad():
                self.show(self.updates)
                number = self._eager(x, y) if self._graphs is None else self._replayed(self._graphs, x, y, kept)
                self.update()
        except BaseException:
            self._undo(kept)
            self.rings.fixed = fixed  # tried again, it may have another rate
            raise
        finally:
            self.settle()
        return number

    def _eager(self, x: Any, y: Any) -> float:
        with self.forward(self.steps):
            output = self.model(x)
        with self.rings.loss():
            value = scalar(self.loss(output, y))
        number = value.item()
        if not math.isfinite(number):
            self.refuse_loss(number, x, f"step {self.steps}")
        if not self.mitigation.stash:
            self.show_newest(self.updates)
        value.backward()
        return number

    def _replayed(self, graphs: Graphs, x: Any, y: Any, kept: Kept | None) -> float:
        if not self.mitigation.stash:
            self.rings.stage(self.updates, self.rate)

        def undo() -> None:
            self._undo(kept)
            self.show(self.updates)

        number = graphs.run(x, y, self._pass, undo).item()  # waits for the GPU
        if not math.isfinite(number):
            self._undo(kept)
            self.show(self.updates)
            self.refuse_loss(number, x, f"step {self.steps}")
        return number

    def _pass(self, x: Any, y: Any) -> Pass:
        """What a graph holds: forward, loss and backward; its result is the loss."""

        def run() -> Tensor:
            value = scalar(self.loss(self.model(x), y))
            if not self.mitigation.stash:
                self.rings.unstage()
            value.backward()
            return value.detach().double().view(())

        return run

    @contextmanager
    def forward(self, sample: int) -> Iterator[None]:
        """For the forward pass of a sample through the model."""
        with self.rings.forward(), self.streams.of(sample):
            yield

    def show(self, version: int) -> None:
        """Put the weights of a forward pass begun at a version into the model."""
        self.rings.show(version, self.updates, self.rate)

    def show_newest(self, version: int) -> None:
        """Put the weights of a backward pass into the model, in place under the graph; with stash the forward's."""
        self.rings.show_returning(version, self.updates, self.rate)

    def refuse_loss(self, number: float, x: Any, where: str) -> None:
        """Say in which stage a loss that is not finite arose; the weights of the forward pass are in the model."""
        self._buffers.put_back()
        reason = broken_stage(self.model, x, self.stages, self.rings.parts(self.updates), self.first, self.run)
        raise RecoupError(f"pipeline: the loss of {where} is {number}: {reason}; nothing was updated")

    def update(self, where: str = "") -> None:
        """Count a backward pass; after ``update_size`` of them, update.

        Raises:
            RecoupError: a gradient that is not finite, with its stage; it counts for nothing then.
        """
        steps, updates = self._at
        if (steps + 1) % self.update_size:
            broken = [] if self._gradients.finite() else self._gradients.broken()
            after = steps + 1, updates
        else:
            broken = self.rings.advance(updates, self.rate, self._foreseen(), self._gradients)
            after = steps + 1, updates + 1
        if broken:
            raise RecoupError(
                f"pipeline: the gradient of {where or f'step {steps}'} is not finite, first in stage "
                f"{self.first + broken[-1]}; nothing was updated"  # it flows from the last stage to the first
            )
        self._at = after
        if self.update_size > 1:
            self._gradients.note()

    def begin(self) -> Kept | None:
        """Make ready for a backward pass; the gradient of an update that is under way, which an error puts back."""
        under_way = self.steps % self.update_size > 0
        if under_way:
            self._refuse_foreign_gradient()
        return self._gradients.begin(under_way)

    def _refuse_foreign_gradient(self) -> None:
        if self._gradients.foreign():
            raise RecoupError(
                "pipeline.Simulator: the parameters' gradients were changed between the samples of one update; use "
                "torch.autograd.grad for gradients of your own, or do it between updates"
            )

    def _undo(self, kept: Kept | None) -> None:
        """No gradient and no statistics of an unfinished step."""
        self._gradients.put_back(kept)
        self._gradients.note()
        self._buffers.put_back()

    def settle(self) -> None:
        """Put the newest weights into the model."""
        self.rings.settle(self.updates)

    def finish(self) -> None:
        """Leave the newest weights in the model, in memory of its own, and no gradient of an unfinished update."""
        self.settle()
        self.rings.release()
        self._gradients.clear()

    def check(self, x: Any) -> None:
        """Refuse what would silently use stale weights or statistics of one sample."""
        changed = self._layout.changed()
        if changed is not None:
            advice = "make a new Simulator" + ", or use its load_state_dict" * changed.endswith(WRITTEN)
            told = f"{changed} since the pipeline was filled, and older versions of it are under way"
            raise RecoupError(f"pipeline.Simulator: {told}: {advice}")
        refuse_autocast()
        refuse_one_sample(x, self._batch_norms)
        if self._unchecked:
            refuse_derived_weights(self.model, x, self._layout.parameters, self.rings.used, self.run)
            self._unchecked = False

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on bit for bit; also buffers, frozen parameters and torch's random generators."""
        if self.steps % self.update_size:
            self._refuse_foreign_gradient()
        return self._state()

    def _state(self) -> dict[str, Any]:
        return {
            "configuration": self._configuration(),
            "steps": self.steps,
            "updates": self.updates,
            "gradient": self._gradients.state(self.steps % self.update_size > 0),
            **self.rings.state(self.updates),
            "buffers": {name: buffer.clone() for name, buffer in self.model.named_buffers()},
            "frozen": {name: parameter.detach().clone() for name, parameter in self._layout.frozen.items()},
            "random": random_state(self._layout.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; the learning rate and the loss are not part of it.

        Raises:
            RecoupError: a state of another configuration or incomplete, with what differs; nothing is then changed.
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
        steps, updates = int(state["steps"]), int(state["updates"])
        self.rings.load(state, updates)
        self._gradients.load(state["gradient"], steps % self.update_size > 0)
        others = [*self.model.named_buffers(), *self._layout.frozen.items()]
        for name, value in others:
            value.copy_(state["buffers" if name in state["buffers"] else "frozen"][name])
        set_random_state(state["random"], self._layout.device)
        moved = self._layout.misplaced()
        self._at = steps, updates
        self.settle()
        if not moved:
            self._layout.settled()

    def _configuration(self) -> dict[str, Any]:
        return {
            "stages": self.names,
            "shapes": self._layout.shapes,
            "dtype": str(self._layout.dtype),
            "delays": self.delays,
            "first": self.first,
            "optimizer": repr(self.optimizer),
            "mitigation": repr(self.mitigation),
            "update_size": self.update_size,
            "clip": self.clip,
            "seed": self.seed,
        }
