"""Modules whose backward pass would use stale weights: they save tensors computed *from* their parameters.

The simulator overwrites parameters between forward and backward. A graph that saved a parameter itself sees the new
values; one that saved a standardized, normalized or cast copy does not.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recoup.errors import RecoupError


def refuse_derived_weights(model: nn.Module, x: Any, parameters: list[Tensor]) -> None:
    """Raise if a forward pass saves a tensor that depends on parameters and not on the input.

    Looked at in one forward pass, whose input is made to require a gradient so that activations can be told apart. An
    input without gradient (tokens) allows only the check for parametrizations.

    Raises:
        RecoupError: such a module; the message names it.
    """
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise RecoupError(
                f"pipeline: {name} is parametrized: its weight is computed anew in every pass, and {ADVICE}"
            )
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return
    probe = x.detach().clone().requires_grad_()
    storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    running: list[str] = []
    found: list[str] = []
    state = torch.get_rng_state()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.requires_grad and tensor.grad_fn is not None and tensor.untyped_storage().data_ptr() not in storages:
            leaves = _leaves(tensor)
            if leaves and id(probe) not in leaves:
                found.append(running[-1] if running else "the model")
        return tensor

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, n=name: running.append(n)))
        hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(probe)
    finally:
        for hook in hooks:
            hook.remove()
        torch.set_rng_state(state)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
    if found:
        raise RecoupError(
            f"pipeline: {found[0] or 'the model'} saves weights derived from its parameters, and {ADVICE}"
        )


ADVICE = (
    "the backward pass would use the ones of the forward: use mitigation='stash', delays of 0, or a module that "
    "computes them again in its backward pass"
)


def _leaves(tensor: Tensor) -> set[int]:
    """The ids of the leaf tensors a tensor's graph ends in."""
    seen: set[Any] = set()
    leaves: set[int] = set()
    stack: list[Any] = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.add(id(variable))
        stack.extend(next_node for next_node, _ in node.next_functions)
    return leaves
