"""Nested tensors, which torch's encoders make of padded sequences where they count on their layers' fused path.

nn.TransformerEncoder in eval mode drops what ``src_key_padding_mask`` hides and gives its layers sequences of several
lengths; only their fused path takes those, and that is off where a module has a hook or runs on hardware. Hooks give
such a layer the padded sequences and their mask, and give its caller nested ones again, so that hidden places are
zeros at the encoder's end, as in float.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

MASK = "src_key_padding_mask"
_HOOKS = "_recoup_nested_hooks"  # where a layer holds them
_NOW = "_recoup_nested_masks"  # and what the call hides that runs on a thread


def take_nested(layer: nn.TransformerEncoderLayer) -> None:
    """From now on the layer takes nested sequences on its unfused path too."""
    if _HOOKS not in layer.__dict__:
        hooks = (
            layer.register_forward_pre_hook(_padded, with_kwargs=True),
            layer.register_forward_hook(_nested, with_kwargs=True, prepend=True),
        )
        layer.__dict__[_HOOKS] = tuple(hook.id for hook in hooks)


def leave_nested(layer: nn.Module) -> None:
    """Undo `take_nested`."""
    if _HOOKS not in layer.__dict__:
        return
    before, after = layer.__dict__.pop(_HOOKS)
    layer.__dict__.pop(_NOW, None)
    layer._forward_pre_hooks.pop(before, None)
    layer._forward_pre_hooks_with_kwargs.pop(before, None)
    layer._forward_hooks.pop(after, None)
    layer._forward_hooks_with_kwargs.pop(after, None)


@contextmanager
def taking_nested(model: nn.Module) -> Iterator[None]:
    """The same for the time, in every layer whose fused path is off already, by a hook within it."""
    layers = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer) and _HOOKS not in m.__dict__]
    layers = [m for m in layers if any(part._forward_hooks or part._forward_pre_hooks for part in m.modules())]
    try:
        for layer in layers:
            take_nested(layer)
        yield
    finally:
        for layer in layers:
            leave_nested(layer)


def _padded(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    named = "src" in kwargs
    src = kwargs["src"] if named else args[0]
    if masks := layer.__dict__.get(_NOW):
        masks.pop(get_ident(), None)  # of a call that failed
    if not (isinstance(src, Tensor) and src.is_nested):
        return None
    x = src.to_padded_tensor(0.0)
    lengths = torch.tensor([len(sequence) for sequence in src.unbind()], device=x.device)
    hidden = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    layer.__dict__.setdefault(_NOW, {})[get_ident()] = hidden
    kwargs = {**kwargs, MASK: torch.zeros_like(hidden, dtype=x.dtype).masked_fill_(hidden, float("-inf"))}
    return (args, {**kwargs, "src": x}) if named else ((x, *args[1:]), kwargs)


def _nested(layer: nn.Module, _args: tuple, _kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    masks = layer.__dict__.get(_NOW)
    hidden = masks.pop(get_ident(), None) if masks else None
    if hidden is None:
        return None
    seen = hidden.logical_not()
    return torch._nested_tensor_from_mask(output, seen, mask_check=False)  # type: ignore[attr-defined]
