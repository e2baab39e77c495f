"""Modules whose backward pass would use stale weights: they save tensors computed *from* their parameters.

The simulator overwrites parameters between forward and backward. A graph that saved a parameter itself sees the new
values; one that saved a standardized, normalized or cast copy does not. Such copies are found in one forward pass:
every operation is watched, and what stems from parameters (and constants) but not from the input must not be saved.
Where others decide what is saved (activation checkpoints, offloading), that cannot be seen, and is refused. What a
custom `torch.autograd.Function` keeps as attributes of its context is not seen.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from recoup.errors import RecoupError
from recoup.pipeline.state import as_it_was

ADVICE = (
    "the backward pass would use the ones of the forward: use mitigation='stash', delays of 0, or a module that "
    "computes them again in its backward pass (such as recoup.pipeline.norms.StandardizedConv2d)"
)
FOREIGN = (
    "runs under saved-tensor hooks, such as those of activation checkpointing or offloading: the backward pass would "
    "use recomputed activations or copies of the weights; switch them off, or use mitigation='stash'"
)


def refuse_derived_weights(
    model: nn.Module,
    x: Any,
    parameters: Sequence[Tensor],
    used: Callable[[Tensor, Sequence[str]], None] | None = None,
    run: Callable[[Any], Any] | None = None,
) -> None:
    """Raise if a forward pass of the model saves a tensor that depends on parameters and not on the input.

    Args:
        model: run once on ``x``; its buffers and the random state are put back.
        x: an input; every tensor and numpy array in it counts, also within dataclasses, mappings and lists. The model
            sees a copy of its tensors.
        parameters: those that the pipeline overwrites; frozen ones are constants.
        used: told of every saved tensor that is a parameter, or a view of one, and of the modules that ran then.
        run: what brings ``x`` through the model; None: a call of it.

    Raises:
        RecoupError: a parametrized, compiled, checkpointed or such a module; the message names it.
    """
    _refuse_opaque(model)
    if _hooks() is not None:
        raise RecoupError(f"pipeline: the step {FOREIGN}")
    running: list[str] = []
    found: list[str] = []
    foreign: list[str] = []
    seen: list[tuple[Tensor, list[str]]] = []

    def here() -> str:
        return running[-1] if running else ""

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) in trace.parameters:
            seen.append((tensor.detach(), list(running)))
        if _storage(tensor) in trace.derived:
            found.append(here())
        return tensor.detach()  # a node that holds its own output through Python is never freed

    x = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, x)  # a pass may write to its input
    activations = set(_addresses(x))
    kind = _OriginsUncompiled if "torch._dynamo" in sys.modules else _Origins
    trace = kind(parameters, activations, pack, lambda: foreign.append(here()))
    random = torch.random.fork_rng({p.device for p in parameters if p.device.type == "cuda"})
    saves = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with as_it_was(model), _named(model, running), random, torch.enable_grad(), saves, trace:
        _refuse_reentrant((run or model)(x))
    if foreign:
        raise RecoupError(f"pipeline: {_shown(foreign[0])} {FOREIGN}")
    if found and not activations:
        raise RecoupError(
            f"pipeline: no tensor was found in the input, a {type(x).__name__}, so what stems from it cannot be told "
            "from what stems from weights alone; give the model tensors, or use mitigation='stash'"
        )
    if found:
        raise RecoupError(f"pipeline: {_shown(found[0])} saves weights derived from its parameters, and {ADVICE}")
    if used is not None:
        for tensor, names in seen:
            used(tensor, names)


def _refuse_opaque(model: nn.Module) -> None:
    """Raise for modules that compute their weights, or that are compiled."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise RecoupError(
                f"pipeline: {_shown(name)} is parametrized: its weight is computed anew in every pass, and {ADVICE}"
            )
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise RecoupError(f"pipeline: {_shown(name)} is compiled: what it saves cannot be seen; pass it uncompiled")


class _Origins(TorchDispatchMode):
    """Sorts all storages by what they were computed from: the input, or parameters alone."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        activations: set[int],
        pack: Callable[[Tensor], Tensor],
        foreign: Callable[[], None],
    ) -> None:
        super().__init__()
        self._pack, self._foreign = pack, foreign
        self.parameters = {_storage(parameter) for parameter in parameters}
        self.activations = set(activations)
        self.derived: set[int] = set()
        self._alive: list[Tensor] = []  # or an address could come back with another origin

    def __exit__(self, *raised: Any) -> None:
        """Let go of all that was computed: this mode and who packs know each other, and wait for garbage collection.

        A graph that lives keeps the stream on which gradients gather, and a CUDA graph is captured on another.
        """
        super().__exit__(*raised)
        self._alive.clear()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not to be kept from torch's compiler, which torch would import for that: two seconds in every process."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        hooks = _hooks()
        if hooks and hooks[0] is not self._pack:
            self._foreign()
        result = func(*args, **(kwargs or {}))
        before = {_storage(leaf) for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)}
        after = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._alive += after
        made = {_storage(leaf) for leaf in after} - self.parameters
        if before & self.activations:
            self.activations |= made
            self.derived -= made
        elif before & (self.parameters | self.derived):
            self.derived |= made
        return result


class _OriginsUncompiled(_Origins):
    """The same where the compiler is loaded: what runs compiled does not compile what watches it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs)


def _refuse_reentrant(output: Any) -> None:
    """Raise if the graph has an activation checkpoint of torch's older kind, which is a node of its own."""
    nodes = [leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise RecoupError(
                "pipeline: the model has activation checkpoints: its backward pass would compute activations anew, "
                "with the newest weights; switch them off, or use mitigation='stash'"
            )
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]


def _hooks() -> tuple[Any, Any] | None:
    """The innermost hooks on saved tensors."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]


def _addresses(x: Any) -> Iterator[int]:
    """Where the tensors and numpy arrays of an input lie."""
    for leaf in tree_leaves(x):
        if isinstance(leaf, Tensor):
            yield _storage(leaf)
        elif isinstance(leaf, np.ndarray):
            yield leaf.ctypes.data
        elif isinstance(leaf, Mapping):
            yield from _addresses(list(leaf.values()))
        elif isinstance(leaf, Sequence) and not isinstance(leaf, str | bytes):
            yield from _addresses(list(leaf))
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _addresses([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type):
            yield from _addresses([value for value in vars(leaf).values() if value is not leaf])


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _shown(name: str) -> str:
    return name or "the model itself"


@contextmanager
def _named(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Keep the names of the modules whose forward runs in ``running``."""

    def leave(*_: Any) -> None:
        running.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, n=name: running.append(n)))
        hooks.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
