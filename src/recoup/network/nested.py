"""Nested tensors, which torch's encoders make of padded sequences where they count on their layers' fused path.

nn.TransformerEncoder in eval mode drops what ``src_key_padding_mask`` hides and gives its layers sequences of several
lengths; only their fused path takes those, and that is off where a module has a hook or runs on hardware. Hooks give
such a layer the padded sequences and their mask, and give its caller nested ones again, so that hidden places are
zeros at the encoder's end, as in float. A layer within it that was converted by itself, and knows of no encoder, is
given zeros in hidden places.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

MASK = "src_key_padding_mask"
_HIDDEN = "_recoup_hidden"  # on what a hook made of nested sequences: for which module, and which places


class Handles(tuple[RemovableHandle, ...]):
    """Of hooks on a layer and on the encoder around it, which a copy of the layer alone is not in."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Handles":
        # A module's hooks are copied before what it has else, and an encoder's before its layers.
        return Handles(copy.deepcopy(one, memo) for one in self._alive() if id(one.hooks_dict_ref()) in memo)

    def __reduce__(self) -> tuple[type, tuple]:
        return Handles, (self._alive(),)

    def _alive(self) -> tuple[RemovableHandle, ...]:
        """Those whose modules are there: torch copies no other."""
        return tuple(one for one in self if one.hooks_dict_ref() is not None)


def leave_nested(layer: nn.Module) -> None:
    """Undo every `take_nested` of an encoder's layer, whoever has the handles."""
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        hooks, named = getattr(layer, kind), getattr(layer, f"{kind}_with_kwargs")
        for number in [number for number, hook in hooks.items() if hook in (_padded, _nested)]:
            del hooks[number]
            named.pop(number, None)


def take_nested(layer: nn.Module) -> tuple[RemovableHandle, ...]:
    """From now on an encoder's layer takes nested sequences on its unfused path too, or one of its children does, until
    the handles are removed. Several that ask for it do not disturb each other."""
    before = _padded if isinstance(layer, nn.TransformerEncoderLayer) else _padded_rows
    return (
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(_nested, with_kwargs=True, prepend=True),
    )


@contextmanager
def taking_nested(model: nn.Module) -> Iterator[None]:
    """The same for the time, in every layer whose fused path is off already, by a hook within it."""
    layers = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    layers = [m for m in layers if any(part._forward_hooks or part._forward_pre_hooks for part in m.modules())]
    handles: list[RemovableHandle] = []
    try:
        for layer in layers:
            handles += take_nested(layer)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _padded(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    named = "src" in kwargs
    src = kwargs["src"] if named else args[0] if args else None
    if not (isinstance(src, Tensor) and src.is_nested):
        return None
    x, hidden = _unnested(src)
    mask = torch.zeros_like(hidden, dtype=x.dtype).masked_fill_(hidden, float("-inf"))
    setattr(mask, _HIDDEN, (id(layer), hidden))
    kwargs = {**kwargs, MASK: mask}
    return (args, {**kwargs, "src": x}) if named else ((x, *args[1:]), kwargs)


def _padded_rows(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    if not (args and isinstance(args[0], Tensor) and args[0].is_nested):
        return None
    x, hidden = _unnested(args[0])
    setattr(x, _HIDDEN, (id(layer), hidden))
    return (x, *args[1:]), kwargs


def _unnested(src: Tensor) -> tuple[Tensor, Tensor]:
    """Sequences padded with zeros to the longest, and which places that are."""
    x = src.to_padded_tensor(0.0)
    lengths = torch.tensor([len(sequence) for sequence in src.unbind()], device=x.device)
    return x, torch.arange(x.shape[1], device=x.device) >= lengths[:, None]


def _nested(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    told = kwargs.get(MASK) if isinstance(layer, nn.TransformerEncoderLayer) else args[0] if args else None
    owner, hidden = getattr(told, _HIDDEN, (None, None))
    if hidden is None or owner != id(layer) or output.is_nested:
        return None
    return torch._nested_tensor_from_mask(output, hidden.logical_not(), mask_check=False)  # type: ignore[attr-defined]
