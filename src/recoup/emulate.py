"""Put hardware under a model's layers, in place, and take it away again.

Which layers a config stands in for is on its wing's card (`recoup.wings`); a model may mix wings.
"""

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from recoup.errors import RecoupError, RecoupWarning
from recoup.network import ledger
from recoup.network.emulated import Emulated, become, emulated_layers, keep_off_fast_path, revert
from recoup.network.selection import UNMATCHED, Selection
from recoup.policy import Policy
from recoup.wings import cards, wing_of

M = TypeVar("M", bound=nn.Module)


def emulate_(model: M, config: Any, layers: Mapping[str, Any] | None = None) -> M:
    """Emulate hardware in a model, in place.

    A layer keeps its identity, name, parameters, buffers, hooks and state_dict keys; only its class changes, so float
    checkpoints still load, and `restore_` gives everything back.

    Args:
        model: any module, the layer itself included.
        config: the hardware of every layer that ``layers`` does not mention, e.g. ``NBSMT(threads=2)``; None: only
            the layers that ``layers`` mentions. NB-SMT takes the calibrated layers (see `calibrate_`), LBA every
            Linear, Conv1d, Conv2d and `models.attention.AttentionProducts`, the first and the last layer included,
            LightNorm every batch norm.
        layers: ``{"name" or "re:regular expression": config or None}``; the first key that matches a layer's whole
            name decides, None leaves it in float.

    Returns:
        The same model.

    Raises:
        RecoupError: a config of no known wing, a key that matches nothing or a layer the config cannot take, a layer
            that is emulated already or not calibrated. The model is then as it was.

    Warns:
        RecoupWarning: layers that run otherwise than asked (a grouped convolution runs one thread) or that are passed
            over because a subclass with a forward of its own cannot be taken apart, or because LBA has no stand-in.
    """
    config, layers = _unpacked(config, layers)
    modules = dict(model.named_modules())
    known = {kind for card in cards().values() for kind in card.layers}
    candidates = [name for name, module in modules.items() if isinstance(module, Emulated) or type(module) in known]
    chosen = Selection(layers, candidates, "emulate_", others=modules)
    for value in [config, *(layers or {}).values()]:
        _layers_of(value)
    plan: dict[str, tuple[nn.Module, Any, type[nn.Module]]] = {}
    passed_over = []
    for name, module in modules.items():
        asked = (own := chosen.of(name)) is not UNMATCHED
        wanted = own if asked else config
        if wanted is None:
            continue
        target = _layers_of(wanted).get(type(module))
        if target is not None and (asked or wing_of(wanted, "emulate_").ready(module)):
            plan[name] = (module, wanted, target)
        elif isinstance(module, Emulated) and module.float_class in _layers_of(wanted):
            raise RecoupError(
                f"emulate_: {module.title} is emulated already ({module.config!r}): restore_ the model first"
            )
        elif name in (layers or {}) and target is None:
            raise RecoupError(
                f"emulate_: layer {name!r} is a {type(module).__name__}; {type(wanted).__name__} stands in for "
                f"{', '.join(t.__name__ for t in _layers_of(wanted))}"
            )
        elif target is None and isinstance(module, tuple(_layers_of(wanted))):
            passed_over.append(f"{name} ({type(module).__name__})")
    if not plan:
        raise RecoupError(f"emulate_: {_why_nothing(model, config)}")
    _convert(plan, modules)
    ledger.begin_structure(model, "emulate_")
    _warn(plan, passed_over, _without_stand_in(modules, config), config)
    return model


def _unpacked(config: Any, layers: Mapping[str, Any] | None) -> tuple[Any, Mapping[str, Any] | None]:
    """A policy as the layer map that it is."""
    if not isinstance(config, Policy):
        return config, layers
    if layers is not None:
        raise RecoupError("emulate_: a policy names its layers itself; leave layers out")
    return None, config


def _without_stand_in(modules: Mapping[str, nn.Module], config: Any) -> list[str]:
    """Modules that multiply and have no counterpart in any wing: under a config for all layers they stay float."""
    kinds = () if config is None else wing_of(config, "emulate_").float_only
    known = tuple(kind for card in cards().values() for kind in card.layers)
    return [
        f"{name} ({type(module).__name__})"
        for name, module in modules.items()
        if isinstance(module, kinds) and not isinstance(module, known)
    ]


def restore_(model: M, *, statistics: str = "auto") -> M:
    """Give the float network back, in place: classes, and the batch norm statistics from before they were repaired.

    Weights and activation scales stay, so that the model can be emulated anew without calibration; gains, corrections
    and channel orders go. A model to which nothing was done is returned as it is.

    Args:
        model: any module.
        statistics: ``auto``: statistics go back if neither weights nor statistics changed since they were repaired;
            if any did, as in training, all stay, and a warning says so. ``undo``: those norms that still hold what the
            repair wrote go back, whatever happened to the others.

    Warns:
        RecoupWarning: statistics that stay because something changed since they were repaired.
    """
    if statistics not in ("auto", "undo"):
        raise RecoupError(f"restore_(statistics={statistics!r}): statistics must be 'auto' or 'undo'")
    _restore_statistics(model, statistics == "undo")
    for layer in emulated_layers(model).values():
        revert(layer)
    for module in model.modules():
        ledger.forget(module)
    return model


def _restore_statistics(model: nn.Module, undo: bool) -> None:
    """Put back what batch norms stored before repairs, where nothing changed since; say it where something did."""
    repaired = {name: (norm, own[-1]) for name, (norm, own) in ledger.found(model, "statistics").items()}
    intact = {name for name, pair in repaired.items() if ledger.same_statistics(*pair)}
    whole = bool(ledger.restorable(model))
    for name, (norm, entry) in repaired.items():
        if whole or (undo and name in intact):
            ledger.put_back(norm, entry)
    if repaired and not whole and not undo:
        warnings.warn(
            f"restore_: weights or statistics changed since they were repaired, so the statistics of {len(repaired)} "
            f'batch norms stay as they are; restore_(model, statistics="undo") puts back the {len(intact)} that still '
            "hold what the repair wrote",
            RecoupWarning,
            stacklevel=3,
        )


def _layers_of(config: Any) -> Mapping[type[nn.Module], type[nn.Module]]:
    return {} if config is None else wing_of(config, "emulate_").layers


def _convert(plan: Mapping[str, tuple[nn.Module, Any, type[nn.Module]]], modules: Mapping[str, nn.Module]) -> None:
    done: list[nn.Module] = []
    try:
        for name, (module, config, target) in plan.items():
            become(module, target, config, name)
            done.append(module)
            if isinstance(modules.get(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
                keep_off_fast_path(module)
    except BaseException:
        for module in done:
            revert(module)
        raise


def _warn(
    plan: Mapping[str, tuple[nn.Module, Any, type[nn.Module]]], passed_over: list[str], without: list[str], config: Any
) -> None:
    caveats: dict[str, list[str]] = {}
    for name, (module, _, _) in plan.items():
        caveat = module.caveat()  # type: ignore[operator]
        if caveat:
            caveats.setdefault(caveat, []).append(name)
    if passed_over:
        caveats["left in float, because a subclass may compute something else"] = passed_over
    if without:
        note = wing_of(config, "emulate_").float_only_note
        because = f"left in float, because {type(config).__name__} has no stand-in for them"
        caveats[f"{because} ({note})" if note else because] = without
    for caveat, names in caveats.items():
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        warnings.warn(f"emulate_: {len(names)} layers {caveat}: {shown}", RecoupWarning, stacklevel=3)


def _why_nothing(model: nn.Module, config: Any) -> str:
    if config is not None:
        card = wing_of(config, "emulate_")
        if card.unready and any(type(module) in card.layers for module in model.modules()):
            return card.unready
    kinds = ", ".join(t.__name__ for t in _layers_of(config)) or "nothing"
    return f"the model has no layer to emulate (config {config!r} takes {kinds}; the layer map left none)"
