"""Where a number that is not finite comes from: looked for after the failure, so that steps pay nothing for it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from recoup.errors import RecoupError
from recoup.pipeline.state import as_it_was


def scalar(value: Any) -> Tensor:
    """The loss, if it is one: a floating tensor of one element that depends on parameters."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        shown = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise RecoupError(f"pipeline: the loss is {shown}; it must be a floating tensor with one element")
    if not value.requires_grad:
        raise RecoupError("pipeline: the loss does not depend on any parameter (detached, or in inference mode)")
    return value


def broken_stage(
    model: nn.Module,
    x: Any,
    stages: Sequence[Sequence[str]],
    parts: Sequence[Tensor],
    first: int,
    run: Callable[[Any], Any],
) -> str:
    """Run a sample again and say where it breaks: "the output of stage 2 (module 'layer2') is not finite".

    Modules are taken in the order in which they run. A module whose input is broken already was given it by what lies
    between the modules: a sum of the stage before, if that has no modules of its own. Buffers and the random state are
    put back; with dropout the second pass drops other units.

    Args:
        model: with the weights of the failed forward pass in it.
        x: the sample.
        stages: the module names of every stage.
        parts: the weights of every stage, flat.
        first: the number of the first stage.
        run: brings the sample through the model.
    """
    for index, part in enumerate(parts):
        if not part.isfinite().all():
            return f"the weights of stage {first + index} are not finite"
    if not _finite(x):
        return f"the input of stage {first} is not finite"
    found: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        stage = next((s for s, names in enumerate(stages) if any(_covers(given, name) for given in names)), None)
        if stage is not None:
            before = stage - 1 if stage and not stages[stage - 1] else stage
            hooks.append(module.register_forward_pre_hook(_told(found, f"what enters {_module(name)}", first + before)))
            hooks.append(module.register_forward_hook(_told(found, f"the output of {_module(name)}", first + stage)))
    devices = {part.device for part in parts if part.device.type == "cuda"}
    try:
        with as_it_was(model), torch.random.fork_rng(devices), torch.no_grad():
            run(x)
    finally:
        for hook in hooks:
            hook.remove()
    last = first + len(stages) - 1
    return found[0] if found else f"all outputs of the stages are finite, so it is the loss (stage {last})"


def _told(found: list[str], what: str, stage: int) -> Any:
    """A hook that notes tensors that are not finite; its last argument is what the module got or gave."""

    def hook(*arguments: Any) -> None:
        if not _finite(arguments[-1]):
            found.append(f"{what} (stage {stage}) is not finite")

    return hook


def _finite(values: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in tree_leaves(values) if isinstance(t, Tensor))


def _covers(given: str, name: str) -> bool:
    return given in ("", name) or name.startswith(f"{given}.")


def _module(name: str) -> str:
    return f"module {name}" if name else "the model"
