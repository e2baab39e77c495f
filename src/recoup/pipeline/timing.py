"""How long the stages of a model take on this machine: what `balance` and `wallclock` reckon with."""

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
from recoup.network.copies import copied
from recoup.pipeline.mitigation import Mitigation
from recoup.pipeline.optimizers import Rule
from recoup.pipeline.simulator import Simulator
from recoup.pipeline.state import as_it_was
from recoup.pipeline.traced import Chain
from recoup.pipeline.wallclock import Times

Pass = tuple[dict[fx.Node, Any], dict[fx.Node, Any]]  # what a stage takes up, as leaves, and what it has afterwards


def stage_times(
    model: nn.Module,
    stages: Sequence[Iterable[str]] | None,
    x: Tensor,
    y: Any,
    *,
    loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy,
    mitigation: Mitigation | str = "none",
    delays: Sequence[int] | None = None,
    optimizer: Rule | None = None,
    rounds: int = 9,
) -> list[Times]:
    """Medians over some rounds of each stage's forward, backward and update of one sample, in steps of a `Simulator`.

    In turns a step of the whole, and one whose passes go stage by stage. Taken apart stages take longer than within one
    pass: what a pass of the whole takes less is taken off, an equal part for every operation of a forward, and for
    every stage's backward. What a step does for every trained parameter beside, checking and showing it, is shared out
    by their number, the update by their elements. The loss belongs to the last stage. The threads are those that torch
    has now; give processes as many. What ranks that run at once take of each other, caches and the way to memory, and
    what packets take is not in it: `runtime.balanced` has it.

    Args:
        model: any that `Chain` can follow; its weights, buffers and the random state stay as they are.
        stages: lists of module names; None: as `Chain` finds them.
        x, y: a sample with its batch dimension.
        loss, mitigation: see `Simulator`.
        delays: of the steps that are timed, with the memory that their rings take; None: none, which takes a little
            less time than finding older weights out of the caches.
        optimizer: see `Simulator`.
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
    model = copied(model, "pipeline.stage_times")
    chain = Chain(model, stages)  # type: ignore[arg-type]
    late = [0] * len(chain.stages) if delays is None else delays
    with torch.random.fork_rng(), as_it_was(model):
        simulator = Simulator(model, chain.stages, late, 0.0, 0.9, 0.0, mitigation, loss, optimizer=optimizer)
        simulator.skip(max(late) + 2)  # a pipeline that has just begun finds its older weights in the caches
        steps = _Steps(simulator, chain, x, y)
        rows = [(steps.whole(), steps.apart()) for _ in range(rounds + 2)][2:]  # the first ones allocate and compile
        simulator.finish()
    wholes, stagewise = zip(*rows, strict=True)
    return _shared_out(steps.walk, _medians(wholes), [_medians(each) for each in zip(*stagewise, strict=True)])


def _medians(rows: Iterable[Sequence[float]]) -> list[float]:
    return [statistics.median(values) for values in zip(*rows, strict=True)]


def _shared_out(walk: "_Walk", whole: Sequence[float], apart: Sequence[Sequence[float]]) -> list[Times]:
    """The times of stages, from the parts of a whole step and from passes stage by stage."""
    before, forward, between, backward, update = whole
    forwards = _within(apart[0], forward, walk.operations)
    backwards = _within(apart[1], backward, [1] * walk.count)
    own = [walk.parameters(stage) for stage in range(walk.count)]
    number, size = (_shares([measure(p) for p in own]) for measure in (len, lambda p: sum(each.numel() for each in p)))
    return [
        Times(f + n * before, b + n * between, s * update)
        for f, b, n, s in zip(forwards, backwards, number, size, strict=True)
    ]


def _shares(parts: Sequence[int]) -> list[float]:
    return [part / max(1, sum(parts)) for part in parts]


def _within(apart: Sequence[float], whole: float, weights: Sequence[int]) -> list[float]:
    """Times of stages within a pass, from those of each alone; no stage takes less than nothing."""
    excess = max(0.0, sum(apart) - whole) / max(1, sum(weights))
    return [max(0.0, each - weight * excess) for each, weight in zip(apart, weights, strict=True)]


def _timed(run: Callable[[], object]) -> float:
    finished()
    begun = time.perf_counter()
    run()
    finished()
    return time.perf_counter() - begun


def finished() -> None:
    """Wait for the GPU, if there is one in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class _Steps:
    """Steps of a simulator, in the parts that a rank's tick has (`worker.Worker`), on one sample."""

    def __init__(self, simulator: Simulator, chain: Chain, x: Tensor, y: Any) -> None:
        self.simulator, self.x, self.y = simulator, x, y
        self.walk = _Walk(chain, self._loss)

    def _loss(self, output: Any, y: Any) -> Tensor:
        with self.simulator.rings.loss():
            return self.simulator.loss(output, y)

    def whole(self) -> list[float]:
        """Seconds before the forward pass, of it, between the two, of the backward pass, and of the update."""
        simulator = self.simulator
        made: list[Tensor] = []

        def forward() -> None:
            with torch.enable_grad(), simulator.forward(simulator.steps):
                made.append(self._loss(simulator.model(self.x), self.y))

        def backward() -> None:
            made.pop().backward()

        seconds = [_timed(part) for part in (self._ready, forward, self._turn, backward, simulator.update)]
        simulator.settle()
        return seconds

    def apart(self) -> tuple[list[float], list[float]]:
        """Seconds of every stage's forward, and of its backward."""
        simulator = self.simulator
        self._ready()
        with torch.enable_grad(), simulator.forward(simulator.steps):
            forward, passes = self.walk.forward(self.x, self.y)
        self._turn()
        backward = self.walk.backward(passes)
        simulator.update()
        simulator.settle()
        return forward, backward

    def _ready(self) -> None:
        """For a forward pass."""
        self.simulator.check(self.x)
        self.simulator.show(self.simulator.updates)

    def _turn(self) -> None:
        """From the weights of the forward pass to those of the backward pass."""
        self.simulator.begin()
        self.simulator.show_newest(self.simulator.updates)


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

    def forward(self, x: Tensor, y: Any) -> tuple[list[float], list[Pass]]:
        """Seconds of every stage's forward, and what `backward` needs."""
        values: dict[fx.Node, Any] = {self._input: x}
        passes, seconds = [], []
        for stage, nodes in enumerate(self._nodes):
            entered = {
                node: values[node] if node is self._input else _leaf(values[node])  # no rank needs the image's gradient
                for node in self._taken(nodes)
                if node in values
            }
            inner = {node: v.clone() if isinstance(v, Tensor) else v for node, v in entered.items()}
            seconds.append(_timed(partial(self._forward, stage, inner, y)))
            passes.append((entered, inner))
            values |= inner
        return seconds, passes

    def _forward(self, stage: int, inner: dict[fx.Node, Any], y: Any) -> None:
        for node in self._nodes[stage]:
            inner[node] = self._run(node, inner)
        if stage == self.count - 1:
            inner[self._output] = self.loss(fx.map_arg(self._output.args[0], inner.__getitem__), y)

    def backward(self, passes: list[Pass]) -> list[float]:
        """Seconds of every stage's backward; trained parameters have their gradients."""
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
