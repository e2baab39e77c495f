"""A model as a chain of stages that processes can hold: traced, cut anywhere, and equal to the model bit for bit.

The model is traced by torch.fx; modules without children, and emulated layers, stay whole. A rank's part is a graph
over the same modules. What passes between two ranks, a packet, is the tuple of all values that were made before the cut
and are used after it, in the order in which they were made. Operations keep their order, so that in-place ones may.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from recoup.errors import RecoupError
from recoup.models.transformer import CharGPT
from recoup.network.checks import is_module
from recoup.network.emulated import Emulated
from recoup.pipeline.stages import JOINING, POOLS, Stages, listed, resolve

FROZEN = (F.dropout, F.alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout, torch.dropout)
SUMS = ("add", "iadd", "add_", "sub", "isub")
POOLING = ("avg_pool", "max_pool", "mean")


class Chain:
    """A model's operations in order, each in a stage.

    Args:
        model: of one input and one output.
        stages: lists of module names, in the order in which the modules run; None: a cut before layers with
            parameters that are no norm, and before sums and poolings, which are stages of their own.

    Attributes:
        stages: the lists, one of which may be empty: it only counts for the delays.

    Raises:
        RecoupError: a model that torch.fx cannot follow, with where; stages whose modules do not run in that order;
            functional dropout, whose training flag tracing would freeze.

    >>> chain = Chain(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    >>> chain.stages
    [['0', '1'], ['2'], []]
    """

    def __init__(self, model: nn.Module, stages: Sequence[Sequence[str]] | None = None) -> None:
        self.model, self.graph = model, traced(model)
        self.stages: Stages = derived(model, self.graph) if stages is None else listed(stages)
        resolve(model, self.stages)
        self._nodes = [node for node in self.graph.nodes if node.op not in ("placeholder", "output")]
        (self._input,) = (node for node in self.graph.nodes if node.op == "placeholder")
        (self._output,) = (node for node in self.graph.nodes if node.op == "output")
        self._stage = self._numbered()

    def _numbered(self) -> dict[fx.Node, int]:
        """The stage of every operation: of its module, else of what came before it."""
        owner = {name: index for index, names in enumerate(self.stages) for name in names}
        found, at, last = {self._input: -1}, 0, ""
        for node in self._nodes:
            own = _owner(node, owner)
            if own is not None and own < at:
                raise RecoupError(
                    f"pipeline.chain: {node.target} is in stage {own} and runs after {last} of stage {at}: list the "
                    "stages in the order in which their modules run, and modules that run between others with them"
                )
            if own is not None:
                at, last = own, str(node.target)
            found[node] = at
        return found

    def placed(self) -> dict[fx.Node, int]:
        """The operations in order, and the stage of each."""
        return {node: self._stage[node] for node in self._nodes}

    def part(self, first: int, end: int) -> fx.GraphModule:
        """Stages ``first`` to ``end`` as a module: from the packet before to the tuple behind, or the model's output.

        Raises:
            RecoupError: a cut that parameters, or what is made of them alone, would have to cross; one that a value
                used three times or more crosses, whose gradients would be summed in another order.
        """
        graph, names = fx.Graph(), dict[fx.Node, fx.Node]()
        for value in self._packet(first):
            names[value] = graph.placeholder(f"{value.name}_in")
        for node in self._nodes:
            if first <= self._stage[node] < end:
                names[node] = graph.node_copy(node, lambda n: names[n])
        if end >= len(self.stages):
            graph.output(fx.map_arg(self._output.args[0], lambda n: names[n]))
        else:
            graph.output(tuple(names[value] for value in self._packet(end)))
        made = fx.GraphModule(self.model, graph)
        modules = dict(made.named_modules())
        for index in range(first, min(end, len(self.stages))):
            for name in self.stages[index]:  # also what no pass uses: momentum and decay act on it
                for inner, module in self.model.get_submodule(name).named_modules(prefix=name):
                    if inner not in modules and any(True for _ in module.parameters(recurse=False)):
                        made.add_submodule(inner, module)
        made.training = self.model.training
        return made

    def _packet(self, cut: int) -> list[fx.Node]:
        """What crosses the cut before a stage, in the order in which it is made."""
        if cut == 0:
            return [self._input]
        found = []
        for value in (self._input, *self._nodes):
            later = [user for user in value.users if user is self._output or self._stage.get(user, 0) >= cut]
            if self._stage[value] < cut and later:
                self._refuse(value, cut, len(value.users) - len(later))
                found.append(value)
        return found

    def _refuse(self, value: fx.Node, cut: int, before: int) -> None:
        if value.op == "get_attr" or (value is not self._input and self._fixed(value)):
            raise RecoupError(
                f"pipeline.chain: {value.name}, which is made of parameters alone, is used on both sides of the cut "
                f"before stage {cut}: cut elsewhere"
            )
        if before and len(value.users) > 2 and value is not self._input:
            raise RecoupError(
                f"pipeline.chain: {value.name} is used {len(value.users)} times, on both sides of the cut before stage "
                f"{cut}: its gradients would be summed in another order; cut elsewhere"
            )

    def _fixed(self, value: fx.Node) -> bool:
        """Whether a value does not depend on the input."""
        seen, stack = set(), [value]
        while stack:
            node = stack.pop()
            if node is self._input or node.op == "call_module":
                return False
            if node not in seen:
                seen.add(node)
                stack += node.all_input_nodes
        return True


def chain(model: nn.Module, stages: Sequence[Sequence[str]] | None = None) -> Chain:
    """See `Chain`."""
    return Chain(model, stages)


class _Tracer(fx.Tracer):
    """Modules without children, emulated layers, and torch's own stay whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See `torch.fx.Tracer`."""
        return (
            isinstance(m, Emulated)
            or not any(True for _ in m.children())
            or super().is_leaf_module(m, module_qualified_name)
        )


def traced(model: nn.Module) -> fx.Graph:
    """A model's operations.

    Raises:
        RecoupError: see `Chain`.
    """
    is_module(model, "pipeline.chain")
    if isinstance(model, CharGPT):
        return _chargpt(model)
    try:
        graph = _Tracer().trace(model)
    except RecoupError:
        raise
    except Exception as error:
        raise RecoupError(
            f"pipeline.chain: torch.fx cannot follow {type(model).__name__}.forward: {_place(error)}"
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; move what depends on values "
            "or sizes into a module without children, which stays whole, or make the model an nn.Sequential of such; "
            f"without processes nothing is cut, and a Simulator takes stages listed by hand: {_listed(model)}"
        ) from error
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise RecoupError(
            f"pipeline.chain: {type(model).__name__} takes {', '.join(node.name for node in inputs) or 'nothing'}; a "
            "chain has one input"
        )
    for node in graph.nodes:
        if node.op == "call_function" and node.target in FROZEN:
            raise RecoupError(
                f"pipeline.chain: {node.name} is functional dropout, whose training flag tracing freezes: use "
                "nn.Dropout"
            )
    return graph


def _place(error: Exception) -> str:
    """The line of the model that fx could not follow."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        frames.append((name, trace.tb_lineno, trace.tb_frame.f_code.co_name))
        trace = trace.tb_next
    inner = [f for f in frames if "/torch/" not in f[0] and f[0] != __file__]
    return f"line {inner[-1][1]} of {inner[-1][2]}: " if inner else ""


def derived(model: nn.Module, graph: fx.Graph) -> Stages:
    """Stages where nothing is listed: see `Chain`."""
    modules, stages, seen = dict(model.named_modules()), Stages([[]]), set[str]()
    for node in graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if module is None:
            if (_named(node, SUMS) and len(node.all_input_nodes) > 1) or _named(node, POOLING):
                stages.append([])
            continue
        name = str(node.target)
        begins = any(True for _ in module.parameters()) and not isinstance(module, JOINING)
        if begins or isinstance(module, POOLS):
            stages.append([])
        if name not in seen:
            stages[-1].append(name)
            seen.add(name)
    stages = stages[1:] if not stages[0] and len(stages) > 1 else stages
    return [*stages, []]


def _named(node: fx.Node, names: Sequence[str]) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return any(name == part or (part.endswith("pool") and part in name) for part in names)


def _owner(node: fx.Node, owner: dict[str, int]) -> int | None:
    """The stage that lists the module of an operation, or the one above it."""
    if node.op not in ("call_module", "get_attr"):
        return None
    parts = str(node.target).split(".")
    prefixes = [".".join(parts[:i]) for i in range(len(parts), -1, -1)]
    return next((owner[prefix] for prefix in prefixes if prefix in owner), None)


def positions(tokens: Tensor) -> Tensor:
    """0, 1, ... for every token of a row."""
    return torch.arange(tokens.shape[1], device=tokens.device)


def _listed(model: nn.Module) -> list[list[str]]:
    """A list of stages to begin with: a child with parameters each."""
    return [[name] for name, child in model.named_children() if any(True for _ in child.parameters())]


def _chargpt(model: CharGPT) -> fx.Graph:
    """Of `CharGPT`, whose shapes fx cannot follow: blocks stay whole."""
    graph = fx.Graph()
    tokens = graph.placeholder("tokens")
    where = graph.call_module("pos", (graph.call_function(positions, (tokens,)),))
    add: Callable[..., Any] = torch.add
    x = graph.call_function(add, (graph.call_module("tok", (tokens,)), where))
    for index in range(len(model.blocks)):
        x = graph.call_module(f"blocks.{index}", (x,))
    graph.output(graph.call_module("head", (graph.call_module("lnf", (x,)),)))
    return graph
