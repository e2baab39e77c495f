"""What every emulated layer has in common, whatever hardware it emulates.

An emulated layer *is* the float layer: the converter changes the object's class and adds a config, so parameters,
buffers, hooks, names and other references to the layer stay as they are, and giving the class back restores it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from torch import nn

Mode = Literal["emulate", "baseline", "float"]


class Emulated(nn.Module):
    """Base of the emulated layers: ``class NBSMTConv2d(Emulated, nn.Conv2d)``.

    Attributes:
        float_class: the torch layer this one stands in for.
        extras: attributes that conversion adds and `restore` takes away again.
        config: the wing's frozen config object.
        mode: ``emulate`` (as configured), ``baseline`` (the same number formats without the shortcut whose harm is
            being measured; for NB-SMT plain 8-bit arithmetic) or ``float`` (the layer as torch computes it).
        layer: the name within the model.
        title: name and shape, for messages; a plain string, so that compilers see a constant.
    """

    float_class: ClassVar[type[nn.Module]]
    extras: ClassVar[tuple[str, ...]] = ("config", "mode", "layer", "title", "fast_path_hook")

    config: Any
    mode: Mode = "emulate"
    layer: str = ""
    title: str

    def convert(self, config: Any, layer: str) -> None:
        """Called once after the class was changed; a wing checks here what the layer needs."""
        self.config, self.mode, self.layer = config, "emulate", layer
        self.title = f"layer '{layer}' ({self.float_class.extra_repr(self)})"

    def release(self) -> None:
        """Called before the layer turns back: let go of what was prepared for it."""

    def caveat(self) -> str | None:
        """What runs otherwise than the config asks, as in "are grouped and run one thread", or None."""
        return None


def become(module: nn.Module, layer_class: type[nn.Module], config: Any, name: str) -> None:
    """Turn a float layer into an emulated one, in place; if it refuses, it stays as it was."""
    original = type(module)
    module.__class__ = layer_class  # type: ignore[assignment]
    try:
        module.convert(config, name)  # type: ignore[operator]
    except BaseException:
        _drop_extras(module)
        module.__class__ = original
        raise


def revert(module: nn.Module) -> None:
    """Turn an emulated layer back into the float layer, in place."""
    assert isinstance(module, Emulated)
    module.release()
    _drop_extras(module)
    module.__class__ = module.float_class  # type: ignore[assignment]


def keep_off_fast_path(module: nn.Module) -> None:
    """Make torch call this layer: inside nn.TransformerEncoderLayer its fused path reads the weights and passes the
    layer by, unless one of its modules has a hook."""
    module.fast_path_hook = module.register_forward_pre_hook(_called)  # type: ignore[assignment]


def _called(module: nn.Module, args: tuple) -> None:
    """A hook that does nothing but be there."""


def _drop_extras(module: nn.Module) -> None:
    hook = module.__dict__.get("fast_path_hook")
    if hook is not None:
        module._forward_pre_hooks.pop(hook.id, None)
    for name in module.extras:  # type: ignore[union-attr]
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)
        module.__dict__.pop(name, None)


def emulated_layers(model: nn.Module) -> dict[str, Any]:
    """The emulated layers of a model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Emulated)}


@contextmanager
def running(model: nn.Module, mode: Mode) -> Iterator[None]:
    """All emulated layers of the model in one mode; then each as before."""
    layers = list(emulated_layers(model).values())
    before = [layer.mode for layer in layers]
    try:
        for layer in layers:
            layer.mode = mode
        yield
    finally:
        for layer, mode_before in zip(layers, before, strict=True):
            layer.mode = mode_before
