"""How long the stages of a model take on this machine: what `balance` and `wallclock` reckon with."""

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from recoup.errors import RecoupError
from recoup.fields import integer
from recoup.network.checks import is_module
from recoup.pipeline.mitigation import Mitigation
from recoup.pipeline.simulator import Simulator
from recoup.pipeline.state import as_it_was
from recoup.pipeline.traced import Chain
from recoup.pipeline.wallclock import Times


def stage_times(
    model: nn.Module,
    stages: Sequence[Iterable[str]] | None,
    x: Tensor,
    y: Any,
    *,
    loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy,
    mitigation: Mitigation | str = "none",
    delays: Sequence[int] | None = None,
    rounds: int = 9,
) -> list[Times]:
    """Medians over some rounds of each stage's forward and backward of one sample, one stage after another.

    Taken apart stages take longer than within one pass: what a pass of the whole takes less is taken off, an equal part
    for every operation of a forward, and for every stage's backward. What a step of a `Simulator` takes beyond a whole
    pass is the update, a share for every trained parameter. The loss belongs to the last stage. The threads are those
    that torch has now; give processes as many.

    Args:
        model: any that `Chain` can follow; its weights, buffers and the random state stay as they are.
        stages: lists of module names; None: as `Chain` finds them.
        x, y: a sample with its batch dimension.
        loss, mitigation: see `Simulator`.
        delays: of the step whose update is timed, with the memory that its rings take; None: none, which takes a little
            less time than a step that predicts and finds older weights out of the caches.
        rounds: from 1.

    Returns:
        Seconds, a `Times` a stage.

    Raises:
        RecoupError: what `Chain` and `Simulator` raise; no rounds; an x that is no tensor.
    """
    is_module(model, "stage_times")
    rounds = integer("pipeline.stage_times", "rounds", rounds, (1, 1 << 31))
    if not isinstance(x, Tensor):
        raise RecoupError(f"pipeline.stage_times(x={type(x).__name__}): x must be a tensor, with its batch dimension")
    model = copy.deepcopy(model)
    chain = Chain(model, stages)  # type: ignore[arg-type]
    walk, late = _Walk(chain, loss), [0] * len(chain.stages) if delays is None else delays
    with torch.random.fork_rng(), as_it_was(model):
        simulator = Simulator(model, chain.stages, late, 0.0, 0.9, 0.0, mitigation, loss)
        rows = [
            (*walk.times(x, y), *walk.whole(x, y), _timed(lambda: simulator.step(x, y))) for _ in range(rounds + 2)
        ][2:]  # the first ones allocate and compile
        model.zero_grad()
    firsts, seconds, *rest = zip(*rows, strict=True)
    apart = [[statistics.median(stage) for stage in zip(*each, strict=True)] for each in (firsts, seconds)]
    *whole, step = map(statistics.median, rest)
    forward, backward = map(_within, apart, whole, (walk.operations, [1] * walk.count))
    update = max(0.0, step - sum(whole))
    sizes = [sum(p.numel() for p in walk.parameters(s)) for s in range(walk.count)]
    share = [size / max(1, sum(sizes)) for size in sizes]
    return [Times(f, b, update * part) for f, b, part in zip(forward, backward, share, strict=True)]


def _within(apart: Sequence[float], whole: float, weights: Sequence[int]) -> list[float]:
    """Times of stages within a pass, from those of each alone; no stage takes less than nothing."""
    excess = max(0.0, sum(apart) - whole) / max(1, sum(weights))
    return [max(0.0, each - weight * excess) for each, weight in zip(apart, weights, strict=True)]


def _timed(run: Callable[[], object]) -> float:
    _finished()
    begun = time.perf_counter()
    run()
    _finished()
    return time.perf_counter() - begun


def _finished() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class _Walk:
    """A chain's operations, run stage by stage: what a stage takes up is detached, so that its backward is its own."""

    def __init__(self, chain: Chain, loss: Callable[[Any, Any], Tensor]) -> None:
        self.model, self.loss, self.count = chain.model, loss, len(chain.stages)
        self._names = chain.stages
        self._input = next(node for node in chain.graph.nodes if node.op == "placeholder")
        (self._output,) = (node for node in chain.graph.nodes if node.op == "output")
        self._nodes: list[list[fx.Node]] = [[] for _ in chain.stages]
        for node, stage in chain.placed().items():
            self._nodes[stage].append(node)

    def parameters(self, stage: int) -> list[nn.Parameter]:
        """The trained ones of a stage."""
        modules = [self.model.get_submodule(name) for name in self._names[stage]]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    @property
    def operations(self) -> list[int]:
        """How many each stage has."""
        return [len(nodes) for nodes in self._nodes]

    def whole(self, x: Tensor, y: Any) -> tuple[float, float]:
        """Seconds of the model's own forward, with the loss, and of its backward."""
        made: list[Tensor] = []
        forward = _timed(lambda: made.append(self.loss(self.model(x), y)))
        backward = _timed(made[0].backward)
        self.model.zero_grad()
        return forward, backward

    def times(self, x: Tensor, y: Any) -> tuple[list[float], list[float]]:
        """Seconds of every stage's forward, and of its backward."""
        values: dict[fx.Node, Any] = {self._input: x}
        passes, forward = [], []
        for stage, nodes in enumerate(self._nodes):
            entered = {
                node: values[node] if node is self._input else _leaf(values[node])  # no rank needs the image's gradient
                for node in self._taken(nodes)
                if node in values
            }
            inner = {node: v.clone() if isinstance(v, Tensor) else v for node, v in entered.items()}
            forward.append(_timed(partial(self._forward, stage, inner, y)))
            passes.append((entered, inner))
            values |= inner
        return forward, self._backward(passes)

    def _forward(self, stage: int, inner: dict[fx.Node, Any], y: Any) -> None:
        for node in self._nodes[stage]:
            inner[node] = self._run(node, inner)
        if stage == self.count - 1:
            inner[self._output] = self.loss(fx.map_arg(self._output.args[0], inner.__getitem__), y)

    def _backward(self, passes: list[tuple[dict[fx.Node, Any], dict[fx.Node, Any]]]) -> list[float]:
        gradients: dict[fx.Node, Tensor] = {}
        found = []
        for entered, inner in reversed(passes):
            made = [node for node in inner if node not in entered and isinstance(inner[node], Tensor)]
            roots = [node for node in made if inner[node].requires_grad and (node in gradients or node is self._output)]
            tensors, flow = [inner[node] for node in roots], [gradients.get(node) for node in roots]
            found.append(_timed(partial(torch.autograd.backward, tensors, flow)) if roots else 0.0)
            for node, leaf in entered.items():
                if isinstance(leaf, Tensor) and leaf.grad is not None:
                    gradients[node] = gradients[node] + leaf.grad if node in gradients else leaf.grad
        self.model.zero_grad()
        return found[::-1]

    def _taken(self, nodes: list[fx.Node]) -> dict[fx.Node, None]:
        """What some operations use; the last stage also what is left of the result."""
        used = [node for own in nodes for node in own.all_input_nodes]
        last = self._output.all_input_nodes if nodes is self._nodes[-1] else []
        return dict.fromkeys([*used, *last])

    def _run(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        arguments: tuple[Any, ...] = fx.map_arg(node.args, values.__getitem__)  # type: ignore[assignment]
        options: dict[str, Any] = fx.map_arg(node.kwargs, values.__getitem__)  # type: ignore[assignment]
        if node.op == "call_module":
            return self.model.get_submodule(str(node.target))(*arguments, **options)
        if node.op == "call_method":
            return getattr(arguments[0], str(node.target))(*arguments[1:], **options)
        if node.op == "get_attr":
            module, _, name = str(node.target).rpartition(".")
            return getattr(self.model.get_submodule(module), name)
        return node.target(*arguments, **options)  # type: ignore[operator]


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.is_floating_point())
