"""What `recoup.network.emulated.Emulated.pure` promises, asked of a layer."""

from typing import Any

import torch
from torch import Tensor, nn

import recoup as rc
from recoup.network.replay import _key


def impurities(layer: Any, x: Tensor, make: Any) -> list[str]:
    """How a layer that says ``pure`` breaks its promise: its output is decided by input, config, mode, weight, bias and
    travelling extras, and giving it is all that it does.

    Args:
        layer: emulated, in eval mode.
        x: its input.
        make: gives a float layer of the same sizes.
    """
    with torch.no_grad():
        return [*_of_calls(layer, x), *_of_twins(layer, x, make), *_of_keys(layer, x)]


def _of_calls(layer: Any, x: Tensor) -> list[str]:
    before, given, random = _state(layer), x.clone(), torch.get_rng_state()
    first = layer(x).clone()
    faults = [] if torch.equal(random, torch.get_rng_state()) else ["draws random numbers"]
    faults += [] if torch.equal(x, given) else ["writes into its input"]
    changed = sorted(name for name, value in _state(layer).items() if before.get(name) != value)
    faults += [f"changes its {name}" for name in changed]
    layer(x + 1)
    torch.rand(3)
    again = layer(x)
    own = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}
    faults += ["gives a part of what it was given"] if again.untyped_storage().data_ptr() in own else []
    return faults + ([] if torch.equal(first, again) else ["gives another output when it is called again"])


def _of_twins(layer: Any, x: Tensor, make: Any) -> list[str]:
    """Another layer with all that is named, and with another name, past and mode of training."""
    twin = nn.ModuleDict({"other": make()})
    twin["other"].load_state_dict(layer.state_dict())
    for name in layer.measured:
        setattr(twin["other"], name, getattr(layer, name))
    rc.emulate_(twin, layer.config, {"other": layer.config})
    other: Any = twin["other"]
    for name in layer.travelling:
        setattr(other, name, getattr(layer, name))
    other.mode = layer.mode
    other.train()
    return [] if torch.equal(layer(x), other(x)) else ["depends on more than it says: a twin's output is another"]


def _of_keys(layer: Any, x: Tensor) -> list[str]:
    """An extra that decides the output is in the key by which outputs are kept."""
    key, faults = _key(layer, x), []
    if key is None:
        return ["has no key"]
    for name in (*layer.travelling, "mode"):
        kept = getattr(layer, name)
        other = kept.flip(0) if isinstance(kept, Tensor) else _other(kept)
        if other is not None:
            setattr(layer, name, other)
            faults += [] if _key(layer, x) != key else [f"is found by another {name}"]
            setattr(layer, name, kept)
    return faults if _key(layer, x) == key else [*faults, "has another key in the same state"]


def _other(value: Any) -> Any:
    """A mode or a scale that is not this one; None where nothing else is legal."""
    if isinstance(value, str):
        return "emulate" if value == "float" else "float"
    return 2 * value if isinstance(value, float) else None


def _state(layer: nn.Module) -> dict[str, str]:
    """Every attribute as text, tensors by their bytes."""
    own = {**layer.__dict__, **layer._parameters, **layer._buffers}
    return {name: str(v.detach().numpy().tobytes()) if isinstance(v, Tensor) else repr(v) for name, v in own.items()}
