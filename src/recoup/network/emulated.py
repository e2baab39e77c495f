"""What every emulated layer has in common, whatever hardware it emulates.

An emulated layer *is* the float layer: the converter changes the object's class and adds a config, so parameters,
buffers, hooks, names and other references to the layer stay as they are, and giving the class back restores it.
"""

import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from recoup.errors import RecoupWarning
from recoup.network.checks import is_module
from recoup.network.nested import Handles, take_nested
from recoup.storage.digest import of_tensors

Mode = Literal["emulate", "baseline", "float"]


class Emulated(nn.Module):
    """Base of the emulated layers: ``class NBSMTConv2d(Emulated, nn.Conv2d)``.

    Attributes:
        float_class: the torch layer this one stands in for, and turns back into: a layer's own where its class stands
            in for several.
        extras: attributes that conversion adds and `emulate.restore_` takes away again.
        travelling: what a state_dict's metadata carries besides the float layer's keys, which stay as they are.
        fitted: of these, what belongs to the layer's weight and goes when another one is loaded.
        measured: of these, what stays where a state_dict has none: activation scales.
        config: the wing's frozen config object.
        mode: ``emulate`` (as configured), ``baseline`` (the same number formats without the shortcut whose harm is
            being measured; for NB-SMT plain 8-bit arithmetic) or ``float`` (the layer as torch computes it).
        tells_baseline: whether ``forward`` knows ``baseline``; if not, it runs in ``float`` where others run in that. A
            card with a baseline of its own sets it.
        layer: the name within the model.
        trained: whether the layer was in training since its last repair.
        title: name and shape, for messages; a plain string, so that compilers see a constant.
        sums: where a layer counts sums that end at the ends of its range, for who asks (`network.saturation`), or None.
        witness: what it was when statistics were repaired, and who is told when training ends (`network.stale.Sight`).
        range_words: what such sums are called in a warning; ``range_remedy``: what to do about them, for its end.
        pure: whether ``forward`` depends on the input, config, mode, weight, bias and travelling extras alone, and does
            nothing but give its output, which may then be kept (`network.replay`). Each class says it itself: what a
            subclass does besides is not known.
    """

    float_class: type[nn.Module]
    extras: ClassVar[tuple[str, ...]] = (
        *("config", "mode", "layer", "title", "path_hooks", "__module__", "trained"),
        *("sums", "witness", "float_class", "extras_came"),
    )
    travelling: ClassVar[tuple[str, ...]] = ()
    fitted: ClassVar[tuple[str, ...]] = ()
    measured: ClassVar[tuple[str, ...]] = ()

    config: Any
    mode: Mode = "emulate"
    layer: str = ""
    title: str
    trained: bool = False
    sums: Any = None
    witness: Any = None
    range_words: ClassVar[str] = "sums end at the largest value that the hardware holds"
    range_remedy: ClassVar[str] = ""
    tells_baseline: ClassVar[bool] = False
    pure: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.pure = cls.__dict__.get("pure", False)

    def convert(self, config: Any, layer: str) -> None:
        """Called once after the class was changed; a wing checks here what the layer needs."""
        self.config, self.mode, self.layer = config, "emulate", layer
        # torch.fx takes a module for a leaf, as it does the float layer, if it says that it is one of torch.nn.
        self.__dict__["__module__"] = "torch.nn"
        self.title = f"layer '{layer}' ({self.float_class.extra_repr(self)})"

    def train(self, mode: bool = True) -> "Emulated":
        """As torch; from the first training on, gains and corrections are part of what is trained."""
        ends = self.training and not mode
        self.trained = self.trained or mode
        super().train(mode)
        if ends and self.witness is not None:
            self.witness.witness.trained(self, self.witness.hardware)
        return self

    def release(self) -> None:
        """Called before the layer turns back: let go of what was prepared for it."""

    def rescaled(self) -> None:
        """Called when `calibrate_` has measured the layer's activation scale anew."""

    def fault(self, name: str, value: Any) -> str | None:  # noqa: ARG002 -- for wings to fill in
        """What is wrong with a travelling extra that a state_dict brings, as in "has shape [3]", or None."""
        return None

    def acts_as(self) -> Hashable:
        """What decides its outputs beside class, input, weight and bias; equal for layers that compute alike."""
        if self.mode == "float":
            return self.float_class
        return self.mode, repr(self.config), self.extras_digest(self.travelling)

    def extras_digest(self, names: Iterable[str]) -> Hashable:
        """Of some travelling extras."""
        found = {name: torch.as_tensor(value) for name in names if (value := getattr(self, name, None)) is not None}
        return tuple((name, value.dtype, value.shape, of_tensors(value)) for name, value in found.items())

    def extra_tensors(self) -> dict[str, Tensor]:
        """The travelling extras there are, as tensors."""
        found = {name: getattr(self, name, None) for name in self.travelling}
        return {name: torch.as_tensor(value) for name, value in found.items() if value is not None}

    def take_extras(self, values: Mapping[str, Any]) -> None:
        """Set every travelling extra, on the layer's device; what ``values`` lacks becomes None unless measured."""
        device = next((p.device for p in self.parameters(recurse=False)), None)
        for name in self.travelling:
            value = values.get(name)
            if value is not None or name not in self.measured:
                setattr(self, name, value.to(device) if isinstance(value, Tensor) else value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Keys stay those of the float layer; the travelling extras go into the state_dict's metadata."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None and self.travelling:
            extras = {name: getattr(self, name, None) for name in self.travelling}
            metadata.setdefault(prefix[:-1], {})["recoup"] = extras

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Set aside while the weight is loaded: with assign=True it is replaced, which a wing's guard may refuse.
        kept = {name: value for name in self.fitted if (value := getattr(self, name, None)) is not None}
        for name in kept:
            setattr(self, name, None)
        before = _copied(self) if kept else None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        same = before is not None and torch.equal(before, _copied(self))
        if same:
            for name, value in kept.items():
                setattr(self, name, value)  # the same weights: what was fitted still belongs to them
        travelled = local_metadata.get("recoup")
        if travelled is None or not self.travelling or not set(self.travelling) & travelled.keys():
            if kept and not same:
                warnings.warn(
                    f"load_state_dict: {self.title}: {', '.join(kept)} belonged to other weights and is gone: load "
                    "with recoup.load, or run recoup.repair_",
                    RecoupWarning,
                    stacklevel=2,
                )
            return  # a float checkpoint, or of another wing: scale and order stay
        faults = [f"{prefix}{n} {f}" for n, v in travelled.items() if v is not None and (f := self.fault(n, v))]
        error_msgs += faults[:1]
        if not faults:
            self.take_extras(travelled)
            self.__dict__["extras_came"] = True  # for the ledger, whose entries are those of others

    def caveat(self) -> str | None:
        """What runs otherwise than the config asks, as in "are grouped and run one thread", or None."""
        return None

    def note(self) -> str:
        """What `caveat` says of several layers, of this one, beside its config: "one thread because grouped", or ""."""
        return ""


def _copied(module: nn.Module) -> Tensor:
    """A copy of a layer's weight; of a norm without one nothing."""
    weight = getattr(module, "weight", None)
    return weight.detach().clone() if isinstance(weight, Tensor) else torch.empty(0, dtype=torch.float32)


def become(module: nn.Module, layer_class: type[nn.Module], config: Any, name: str) -> None:
    """Turn a float layer into an emulated one, in place; if it refuses, it stays as it was."""
    original = type(module)
    module.__class__ = layer_class  # type: ignore[assignment]
    if layer_class.float_class is not original:  # type: ignore[attr-defined]
        module.__dict__["float_class"] = original
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
    original = module.float_class
    _drop_extras(module)
    module.__class__ = original  # type: ignore[assignment]


def keep_off_fast_path(module: nn.Module, encoders: Sequence[nn.Module]) -> None:
    """Make torch call this layer: inside nn.TransformerEncoderLayer its fused path reads the weights and passes the
    layer by, unless one of its modules has a hook. Nested sequences, which only the fused path takes, are then taken on
    the other one: the layer has the handles of all hooks, also those on its encoder, which go with it.

    Args:
        module: the layer.
        encoders: each nn.TransformerEncoderLayer it lies in, where that is known.
    """
    hook = module.register_forward_pre_hook(_called)
    module.__dict__["path_hooks"] = Handles(
        (hook, *(one for layer in encoders or (module,) for one in take_nested(layer)))
    )


def _called(module: nn.Module, args: tuple) -> None:
    """A hook that does nothing but be there."""


def _drop_extras(module: nn.Module) -> None:
    for hook in module.__dict__.get("path_hooks", ()):
        hook.remove()
    for name in module.extras:  # type: ignore[union-attr]
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)
        module.__dict__.pop(name, None)


def emulated_layers(model: nn.Module, purpose: str = "recoup") -> dict[str, Any]:
    """The emulated layers of a model by name, each once; an error, headed by the verb, for what is no model."""
    is_module(model, purpose)
    return {name: module for name, module in model.named_modules() if isinstance(module, Emulated)}


@contextmanager
def running(model: nn.Module, mode: Mode) -> Iterator[None]:
    """All emulated layers of the model in one mode; then each as before.

    A layer that does not tell ``baseline`` from ``emulate`` has the float layer for its baseline.
    """
    layers = list(emulated_layers(model).values())
    before = [layer.mode for layer in layers]
    try:
        for layer in layers:
            layer.mode = "float" if mode == "baseline" and not layer.tells_baseline else mode
        yield
    finally:
        for layer, mode_before in zip(layers, before, strict=True):
            layer.mode = mode_before
