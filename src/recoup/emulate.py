"""Put hardware under a model's layers, in place, and take it away again.

Which layers a config stands in for is on its wing's card (`recoup.wings`); a model may mix wings.
"""

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from recoup.errors import RecoupError, RecoupWarning
from recoup.network import ledger
from recoup.network.checks import is_module
from recoup.network.derived import patched, replaced
from recoup.network.emulated import Emulated, become, emulated_layers, keep_off_fast_path, revert
from recoup.network.multipliers import Multiplier, multipliers
from recoup.network.nested import leave_nested
from recoup.network.own_products import multiplies_itself
from recoup.network.selection import UNMATCHED, Selection
from recoup.network.wing import Card
from recoup.policy import Policy
from recoup.wings import cards, told_takers, wing_of

M = TypeVar("M", bound=nn.Module)
Plan = dict[str, tuple[nn.Module, Any, type[nn.Module]]]
"""Name -> the module, its config and its class to be."""


def emulate_(model: M, config: Any, layers: Mapping[str, Any] | None = None) -> M:
    """Emulate hardware in a model, in place.

    A layer keeps its identity, name, parameters, buffers, hooks and state_dict keys; only its class changes, so float
    checkpoints still load, and `restore_` gives everything back.

    Args:
        model: any module, the layer itself included.
        config: the hardware of every layer that ``layers`` does not mention, e.g. ``NBSMT(threads=2)``; None: only
            the layers that ``layers`` mentions. NB-SMT takes the calibrated layers (see `calibrate_`), LBA every
            Linear, Conv1d, Conv2d, `models.attention.AttentionProducts` and, of Hugging Face transformers, Conv1D and
            the products of every attention module that asks its attention interface, the first and the last layer
            included, LightNorm every batch norm, LayerNorm and RMSNorm, also subclasses without a forward of their own
            and classes of transformers whose code is an RMS norm's.
        layers: ``{"name" or "re:regular expression": config or None}``; the first key that matches a layer's whole
            name decides, None leaves it in float.

    Returns:
        The same model.

    Raises:
        RecoupError: a config of no known wing, a key that matches nothing or a layer the config cannot take, a layer
            that is emulated already or not calibrated, a config that takes no layer at all (of a layer map, any). The
            model is then as it was.

    Warns:
        RecoupWarning: layers that run otherwise than asked (a grouped convolution runs one thread); those that stay in
            float because a method was set on the object itself, as wrappers set ``forward``, or put into a class of
            torch's; under hardware for products, by name, what a config was meant for and stays in float: subclasses,
            which may compute something else, classes without a stand-in (recurrent layers, transposed convolutions,
            attention), layers that `calibrate_` never saw, and modules of any other class that own weights, be they
            parameters, buffers or packed, and may multiply with them (`network.multipliers`), or whose forward has
            products that no layer makes, as attention that does not ask transformers' interface (by its code,
            `network.own_products`). A layer map's None leaves any of them in float without a word.
    """
    is_module(model, "emulate_")
    config, layers = _unpacked(config, layers)
    modules = dict(model.named_modules())
    weighty = multipliers(model)
    candidates = [name for name, module in modules.items() if name in weighty or _multiplies(module)]
    chosen = Selection(layers, candidates, "emulate_", others=modules)
    for value in [config, *(layers or {}).values()]:
        _layers_of(value)
    plan, left = _planned(modules, weighty, chosen, config, layers or {})
    if not plan:
        if config is None:  # then keys say more than the network
            _check_each_is_used(plan, modules, chosen, {None: config} | dict(layers or {}))
        raise RecoupError(f"emulate_: {_why_nothing(model, config)}{_also_left(left)}")
    _check_each_is_used(plan, modules, chosen, {None: config} | dict(layers or {}))
    with ledger.whole(model):  # warnings may be errors
        _convert(plan, modules)
        try:
            ledger.begin_structure(model, "emulate_")
            _warn(plan, left)
        except BaseException:
            for module, _, _ in plan.values():
                revert(module)
            raise
    return model


def _multiplies(module: nn.Module) -> bool:
    """Whether a layer map may name a module though it owns no weights."""
    return _emulable(module) or multiplies_itself(module)


def _planned(
    modules: Mapping[str, nn.Module],
    weighty: Mapping[str, Multiplier],
    chosen: Selection,
    config: Any,
    layers: Mapping[str, Any],
) -> tuple[Plan, dict[str, list[str]]]:
    """What becomes of each module that is to be emulated, and what stays in float although a config was meant for it:
    reason -> how the modules are told."""
    plan: Plan = {}
    left: dict[str, list[str]] = {}
    for name, module in modules.items():
        wanted = chosen.of(name)
        asked = wanted is not UNMATCHED
        wanted = wanted if asked else config
        if wanted is None:
            continue
        card = wing_of(wanted, "emulate_")
        target = card.stand_in(module)
        if target is not None and (asked or card.ready(module)):
            plan[name] = (module, wanted, target)
        elif isinstance(module, Emulated) and _would_take(card, module):
            raise RecoupError(
                f"emulate_: {module.title} is emulated already ({module.config!r}): restore_ the model first"
            )
        elif name in layers and target is None:
            if _is_wrapped(card, module):
                raise RecoupError(f"emulate_: layer {name!r} ({type(module).__name__}) is {_wrapped(module)}")
            raise RecoupError(
                f"emulate_: layer {name!r} is a {type(module).__name__}; {type(wanted).__name__} stands in for "
                f"{', '.join(t.__name__ for t in _layers_of(wanted))}, and {told_takers(type(module))}"
            )
        elif reason := _why_left(card, name, module, weighty):
            short = f"{name or 'the model itself'} ({type(module).__name__})"
            told = str(weighty[name]) if "may multiply" in reason else short
            left.setdefault(reason, []).append(told)
    return plan, left


def _emulable(module: nn.Module) -> bool:
    """Whether a layer map may name a module: what a wing takes, or would say that it leaves in float."""
    every = cards().values()
    kinds = (Emulated, *(kind for card in every for kind in (*card.layers, *card.float_only)))
    return isinstance(module, kinds) or any(card.stand_in(module) is not None or card.kin(module) for card in every)


def _would_take(card: Card, layer: Emulated) -> bool:
    """Whether a card's hardware is for what an emulated layer stands in for."""
    return layer.float_class in card.layers or card.adapt(layer.float_class) is not None


def _why_left(card: Card, name: str, module: nn.Module, weighty: Mapping[str, Multiplier]) -> str | None:
    """Why a module that a config was meant for stays in float, if that must be said."""
    hardware = card.config.__name__
    if isinstance(module, Emulated) or (card.declined(module) and not card.ready(module)):
        return None
    if _is_wrapped(card, module):
        return _wrapped(module)
    if isinstance(module, torch.jit.ScriptModule):
        if module.original_name in {kind.__name__ for kind in card.layers}:
            return "left in float, because torch.jit compiled them (emulate_ before it)"
        return None
    if isinstance(module, tuple(card.layers)) and is_parametrized(module):
        return "left in float, because they are parametrized (parametrize.remove_parametrizations gives plain weights)"
    if isinstance(module, tuple(card.layers)) and card.stand_in(module) is None:
        return "left in float, because a subclass may compute something else"
    if card.stand_in(module) is not None:
        return "left in float, because they are not calibrated (calibrate_ did not see them)"
    if isinstance(module, card.float_only):
        note = f" ({card.float_only_note})" if card.float_only_note else ""
        return f"left in float, because {hardware} has no stand-in for them{note}"
    if card.kin(module):
        return f"left in float, because {hardware} does not know what they compute"
    if card.multiplies and name in weighty:
        return f"left in float, and may multiply ({hardware} does not know their classes)"
    if card.multiplies and any(other.multiplies and other.stand_in(module) for other in cards().values()):
        return f"left in float, because {hardware} has no stand-in for them"
    if card.multiplies and multiplies_itself(module):
        return f"with products in their own forward, which stay in float ({hardware} runs those of layers)"
    return None


def _is_wrapped(card: Card, module: nn.Module) -> bool:
    return card.for_class(type(module)) is not None and bool(replaced(module))


def _wrapped(module: nn.Module) -> str:
    others = patched(type(module))
    own = [name for name in replaced(module) if name not in others]
    put = ", ".join(f"{kind}.{name}" for name, kind in others.items())
    told = [f"{', '.join(own)} was set on the object itself and would run as before"] if own else []
    told += [f"{put} is not torch's own and would not run on hardware"] if put else []
    remedy = "emulate_ first, then wrap; or take the wrapper off" if own else "put torch's own method back"
    return f"left in float, because {', and '.join(told)} ({remedy})"


def _check_each_is_used(
    plan: Plan,
    modules: Mapping[str, nn.Module],
    chosen: Selection,
    configs: Mapping[str | None, Any],
) -> None:
    """Refuse a config that takes no layer, unless keys before it took all those that it could."""
    keys = {name: [*chosen.keys(name), None] for name in modules}
    for key, config in configs.items():
        if config is None or any(keys[name][0] == key for name in plan):
            continue
        card = wing_of(config, "emulate_")
        reached = {name: module for name, module in modules.items() if key in keys[name]}
        own = {name: module for name, module in reached.items() if card.stand_in(module) is not None}
        if any(keys[name][0] != key and card.ready(module) for name, module in own.items()):
            continue
        said = "" if key is None else f" for {key!r}"
        if own:
            own = {name: module for name, module in own.items() if keys[name][0] == key} or own
            kinds = ", ".join(dict.fromkeys(type(module).__name__ for module in own.values()))
            raise RecoupError(f"emulate_: {config!r}{said} takes none of {len(own)} layers ({kinds}): {card.unready}")
        stands = ", ".join(kind.__name__ for kind in card.layers)
        named = {} if key is None else reached
        found = ", ".join(f"{name} ({type(module).__name__})" for name, module in named.items())
        kinds = dict.fromkeys(type(module) for module in named.values() if _emulable(module))
        found += "".join(f"; {told_takers(kind)}" for kind in kinds)
        raise RecoupError(
            f"emulate_: {config!r}{said} finds no layer it can take: it stands in for {stands}; "
            + (f"the key matches {found}" if found else "the model has none")
        )


def _unpacked(config: Any, layers: Mapping[str, Any] | None) -> tuple[Any, Mapping[str, Any] | None]:
    """A policy as the layer map that it is."""
    if not isinstance(config, Policy):
        return config, layers
    if layers is not None:
        raise RecoupError("emulate_: a policy names its layers itself; leave layers out")
    return None, config


def restore_(model: M, *, statistics: str = "auto") -> M:
    """Give the float network back, in place: classes (of every layer its own, subclasses too), and the batch norm
    statistics and weights from before they were repaired.

    Other weights and activation scales stay, so that the model can be emulated anew without calibration; gains,
    corrections and channel orders go. A model to which nothing was done is returned as it is.

    Args:
        model: any module.
        statistics: ``auto``: what repairs wrote into statistics, and into weights where a wing's repair does that, goes
            back if neither changed since; if any did, as in training, all stays, and a warning says so. ``undo``: what
            still is as the repair wrote it goes back, whatever happened to the others.

    Raises:
        RecoupError: no such ``statistics``; a layer that was parametrized while it was emulated.

    Warns:
        RecoupWarning: statistics that stay because something changed since they were repaired.
    """
    if statistics not in ("auto", "undo"):
        raise RecoupError(f"restore_(statistics={statistics!r}): statistics must be 'auto' or 'undo'")
    is_module(model, "restore_")
    for layer in emulated_layers(model).values():
        if is_parametrized(layer):
            raise RecoupError(
                f"restore_: {layer.title} was parametrized after emulate_, which gave it another class: take that off "
                "first (torch.nn.utils.parametrize.remove_parametrizations)"
            )
    _restore_tensors(model, statistics == "undo")
    for layer in emulated_layers(model).values():
        revert(layer)
    for module in model.modules():  # layers that were taken out of it meanwhile may still hold hooks on it
        if isinstance(module, nn.TransformerEncoderLayer):
            leave_nested(module)
    for card in cards().values():
        card.take_back(model)
    for module in model.modules():
        ledger.forget(module)
    return model


def _restore_tensors(model: nn.Module, undo: bool) -> None:
    """Put back what repairs wrote into statistics and weights, where nothing changed since; say it where it did."""
    steps = ledger.held(model)
    whole = bool(ledger.restorable(model))
    intact = [step for step in steps if ledger.unchanged(*step[1:])]
    for _, module, entry in steps if whole else intact if undo else ():
        ledger.put_back(module, entry)
    if steps and not whole and not undo:
        norms = sum(entry.stage == "statistics" for *_, entry in steps)
        stay = [f"the statistics of {norms} batch norms"] if norms else []
        stay += [f"what repairs did to the weights of {len(steps) - norms} modules"] if len(steps) > norms else []
        warnings.warn(
            f"restore_: weights or statistics changed since they were repaired, so {' and '.join(stay)} stay as they "
            f'are; restore_(model, statistics="undo") puts back the {len(intact)} that still hold what the repair '
            "wrote",
            RecoupWarning,
            stacklevel=3,
        )


def _layers_of(config: Any) -> Mapping[type[nn.Module], type[nn.Module]]:
    return {} if config is None else wing_of(config, "emulate_").layers


def _convert(plan: Plan, modules: Mapping[str, nn.Module]) -> None:
    done: list[nn.Module] = []
    encoders = [module for module in modules.values() if isinstance(module, nn.TransformerEncoderLayer)]
    within: dict[nn.Module, list[nn.Module]] = {}
    for encoder in encoders:
        for child in encoder.children():  # which several may share
            within.setdefault(child, []).append(encoder)
    try:
        for name, (module, config, target) in plan.items():
            become(module, target, config, name)
            done.append(module)
            # A layer that is converted by itself may lie in such a layer, which cannot be seen from here.
            if module in within or (not name and isinstance(module, nn.Linear | nn.LayerNorm)):
                keep_off_fast_path(module, within.get(module, ()))
    except BaseException:
        for module in done:
            revert(module)
        raise


def _warn(plan: Plan, left: Mapping[str, list[str]]) -> None:
    caveats: dict[str, list[str]] = {}
    for name, (module, _, _) in plan.items():
        caveat = module.caveat()  # type: ignore[operator]
        if caveat:
            caveats.setdefault(caveat, []).append(name)
    for caveat, names in caveats.items():
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        warnings.warn(f"emulate_: {len(names)} layers {caveat}: {shown}", RecoupWarning, stacklevel=3)
    if left:
        warnings.warn(f"emulate_: {_also_left(left).removeprefix('; ')}", RecoupWarning, stacklevel=3)


def _also_left(left: Mapping[str, list[str]]) -> str:
    return "".join(f"; {len(names)} layers {reason}: {', '.join(names)}" for reason, names in left.items())


def _why_nothing(model: nn.Module, config: Any) -> str:
    if config is not None:
        card = wing_of(config, "emulate_")
        own = [module for module in model.modules() if card.for_class(type(module)) is not None]
        if card.unready and own and not any(card.ready(module) for module in own):
            return card.unready
    kinds = ", ".join(t.__name__ for t in _layers_of(config)) or "nothing"
    held = Counter(_class_of(module) for module in model.modules() if not next(module.children(), None))
    shown = ", ".join(f"{count} {name}" for name, count in held.most_common(6)) + (", ..." if len(held) > 6 else "")
    return (
        f"the model has no layer to emulate (config {config!r} takes {kinds}; the layer map left none; "
        f"the model is made of {shown})"
    )


def _class_of(module: nn.Module) -> str:
    """A class by its name, and by where it is from if a layer of torch's is called the same."""
    kind = type(module)
    return kind.__name__ if getattr(nn, kind.__name__, kind) is kind else f"{kind.__module__}.{kind.__name__}"
