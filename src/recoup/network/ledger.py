"""What was done to a network: entries on its modules, which repairs read, replace, refuse and take back.

Stages, in the order of the signal: structure (a slot per kind) -> gain -> bias -> statistics (one slot each); every
stage is measured on the network with the earlier ones in place. All rules here are our own definition.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError, RecoupWarning
from recoup.network.emulated import Emulated, emulated_layers
from recoup.network.entries import (
    BUFFERS,
    PLACE,
    STAGES,
    Entry,
    config_text,
    entries,
    found,
    hardware_digest,
    next_number,
    statistics,
    taken_away,
    tensor,
    there,
    tracked,
    trained_with,
    unchanged,
    weights_digest,
    write,
)
from recoup.network.stale import Sight, Witness, changed, forget_loading, stale, warn_stale, watch_loading

__all__ = [
    "BUFFERS",
    "STAGES",
    "Entry",
    "Sight",
    "Witness",
    "begin_structure",
    "changed",
    "config_text",
    "entries",
    "follow",
    "following",
    "forget",
    "found",
    "hardware_digest",
    "held",
    "next_number",
    "put_back",
    "record",
    "refuse_after_statistics",
    "restorable",
    "stale",
    "statistics",
    "take_back",
    "taken_away",
    "tensor",
    "trained_with",
    "unchanged",
    "undo",
    "unrepaired_statistics",
    "warn_stale",
    "watch_loading",
    "weights_digest",
    "whole",
    "write",
]


def refuse_after_statistics(model: nn.Module, verb: str) -> None:
    """A gain or a bias is not measured on statistics that were repaired without it.

    Raises:
        RecoupError: a norm's statistics were repaired.
    """
    for _, own in found(model, "statistics").values():
        images = "" if own[-1].images is None else f", {own[-1].images} images"
        raise RecoupError(
            f"{verb}: batch norm statistics were repaired with the hardware as it was ({own[-1].verb}{images}); undo "
            'them with rc.undo_(model, "statistics"), or use rc.repair_(model, batches), which does all in order'
        )


def record(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    stage: str,
    verb: str,
    before: Mapping[str, Mapping[str, Any]],
    *,
    slot: str | None = None,
    images: int | None = None,
    edited: Mapping[str, Iterable[str]] | None = None,
) -> None:
    """Write a finished step down on each of ``modules``; what was there before the first step into the slot stays.

    ``edited``: the names of each module's tensors that were written in place; by default statistics are.
    """
    slot, number = slot or stage, next_number(model)
    for name, module in modules.items():
        own = entries(module)
        kept = {**before[name], **own[slot].before} if slot in own else before[name]
        names = {*(edited or {}).get(name, ()), *(own[slot].after if slot in own else ())}
        names |= {*statistics(module)} if stage == "statistics" and edited is None else set()
        after = {n: value.detach().clone() for n in sorted(names) if (value := tensor(module, n)) is not None}
        entry = Entry(stage, slot, verb, number, images, kept, after, weights_digest(module), config_text(module))
        module.__dict__[PLACE] = {**own, slot: entry}
        if isinstance(module, Emulated):
            module.trained = False
    if stage == "statistics":
        witness = Witness([module for module in modules.values() if entries(module).get(slot)])
        for layer in emulated_layers(model).values():
            layer.witness = Sight(witness, hardware_digest(layer), weights_digest(layer))
    watch_loading(model)


def held(model: nn.Module) -> list[tuple[str, nn.Module, Entry]]:
    """The steps that wrote into tensors the network had before, the last first."""
    all_of_them = [
        (name, module, entry) for name, (module, own) in found(model).items() for entry in own if entry.after
    ]
    return sorted(all_of_them, key=lambda one: -one[2].number)


def restorable(model: nn.Module) -> list[tuple[str, nn.Module, Entry]]:
    """The steps whose tensors go back when the float network does, the last first: all, if nothing has changed since,
    neither the weights of any module with an entry nor what the steps wrote; else none."""
    both = [(module, entry) for module, own in found(model).values() for entry in own]
    untouched = all(entry.weights == weights_digest(module) for module, entry in both)
    seen = [layer for layer in emulated_layers(model).values() if layer.witness is not None]
    untouched = untouched and all(layer.witness.weights == weights_digest(layer) for layer in seen)
    steps = held(model)
    return steps if untouched and all(unchanged(module, entry) for _, module, entry in steps) else []


def undo(model: nn.Module, first: str) -> dict[str, int]:
    """Take every step from a stage on back.

    Returns:
        stage -> how many modules had an entry there.
    """
    counted: dict[str, int] = {}
    undone: set[str] = set()
    for module in model.modules():
        later = [entry for entry in entries(module).values() if STAGES.index(entry.stage) >= STAGES.index(first)]
        own = [entry for entry in later if entry.after or there(module, entry)]  # also what is taken away already
        for entry in sorted(own, key=lambda entry: -entry.number):
            if there(module, entry):
                put_back(module, entry)
                counted[entry.stage] = counted.get(entry.stage, 0) + 1
            undone.add(entry.stage)
        gone = {entry.slot for entry in own}
        _keep(module, {slot: entry for slot, entry in entries(module).items() if slot not in gone})
    if STAGES.index(first) <= 1:
        for module in model.modules():  # extras that were set by hand have no entry
            for name in module.fitted if isinstance(module, Emulated) else ():
                setattr(module, name, None)
    if "statistics" in undone:  # what the layers were when those were measured decides nothing any more
        for layer in emulated_layers(model).values():
            layer.witness = None
    return {stage: counted[stage] for stage in STAGES if stage in counted}


def begin_structure(model: nn.Module, verb: str) -> None:
    """Before a step that changes the hardware: repairs were fitted for it as it was, so they go, and it is said.

    Warns:
        RecoupWarning: which repairs went.
    """
    with whole(model):  # where warnings are errors, nothing goes
        gone = undo(model, "gain")
        if not gone:
            return
        kinds = {"gain": "layers", "bias": "layers", "statistics": "norms"}
        said = " and ".join(
            f"{stage} ({n} {kinds[stage] if n > 1 else kinds[stage][:-1]})" for stage, n in gone.items()
        )
        warnings.warn(f"{verb}: undid {said}, fitted for other hardware; run rc.repair_", RecoupWarning, stacklevel=3)


def put_back(module: nn.Module, entry: Entry) -> None:
    """Set what an entry's step changed to what was there before.

    Tensors that something else has written since (training, another checkpoint) are not the step's: they stay. Where
    that was a checkpoint from before the step, they are back already.

    Warns:
        RecoupWarning: tensors that stay.
    """
    if entry.after and not unchanged(module, entry) and not taken_away(module, entry):
        what = "statistics of a batch norm" if entry.after.keys() <= set(BUFFERS) else ", ".join(entry.after)
        warnings.warn(f"{what} changed since {entry.verb}, so they are not taken back", RecoupWarning, stacklevel=4)
        return
    edits = entry.after.keys() - set(BUFFERS)
    with torch.no_grad(), following(module) if edits else nullcontext():
        for name, value in entry.before.items():
            old = tensor(module, name)
            if name in entry.after and old is not None and isinstance(value, Tensor):
                old.copy_(value)  # in place: wrappers hold the tensor itself
            else:
                setattr(module, name, value)


@contextmanager
def unrepaired_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms with the statistics from before their repair, of those that still hold what it wrote; then as now."""
    repaired = [(norm, own[-1]) for norm, own in found(model, "statistics").values() if unchanged(norm, own[-1])]
    written = [(tensor(norm, name), entry.before[name]) for norm, entry in repaired for name in entry.after]
    now = [(held, held.detach().clone(), before) for held, before in written if isinstance(held, Tensor)]
    try:
        with torch.no_grad():
            for held, _, before in now:
                held.copy_(before)
        yield
    finally:
        with torch.no_grad():
            for held, value, _ in now:
                held.copy_(value)


@contextmanager
def following(module: nn.Module) -> Iterator[None]:
    """A step that edits weights is taken back within."""
    before, hardware = weights_digest(module), hardware_digest(module)
    yield
    follow(module, before, hardware)


def follow(module: nn.Module, weights: str, hardware: str) -> None:
    """After a step that is written down, or taken back, has edited a module: entries that belonged to what was there
    before, whose digests these are, belong to what is there now, since the step is taken back before those are."""
    now = weights_digest(module)
    for entry in [entry for entry in entries(module).values() if entry.weights == weights]:
        write(module, replace(entry, weights=now))
    sight = module.__dict__.get("witness")
    if sight is not None and sight.hardware == hardware:
        module.witness = Sight(sight.witness, hardware_digest(module), now)  # type: ignore[assignment]


def take_back(module: nn.Module, slot: str) -> None:
    """Undo one slot of one module: a step that replaces another starts from what was there before the first."""
    own = entries(module)
    if slot in own:
        put_back(module, own[slot])
        _keep(module, {name: entry for name, entry in entries(module).items() if name != slot})


def _keep(module: nn.Module, left: Mapping[str, Entry]) -> None:
    module.__dict__.pop(PLACE, None)
    if left:
        module.__dict__[PLACE] = dict(left)


def forget(module: nn.Module) -> None:
    """Take a module's entries away, and leave what they changed."""
    module.__dict__.pop(PLACE, None)
    forget_loading(module)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """All of a step or nothing: after an error extras, configs, statistics, weights that steps wrote and entries are as
    before."""
    modules = [m for m in model.modules() if isinstance(m, Emulated) or entries(m) or tracked(m)]
    kept = [(module, _attributes(module), _written(module), dict(entries(module))) for module in modules]
    first = next_number(model)
    try:
        yield
    except BaseException:
        with torch.no_grad():
            _take_back_since(model, first)
            for module, attributes, values, own in kept:
                for name, value in attributes.items():
                    setattr(module, name, value)
                for name, (held, value) in values.items():
                    held.copy_(value)
                    if name in module._parameters:  # taken away where the float network has none
                        module._parameters[name] = held  # type: ignore[assignment]
                _keep(module, own)
        raise


def _take_back_since(model: nn.Module, first: int) -> None:
    """Undo the steps from a number on, the last first: of tensors that nothing had written before, only they know."""
    steps = [(entry, module) for module in model.modules() for entry in entries(module).values()]
    for entry, module in sorted(steps, key=lambda step: -step[0].number):
        if entry.number < first:
            return
        for name in entry.after:
            if (held := tensor(module, name)) is not None:
                held.copy_(entry.before[name])
        _keep(module, {slot: other for slot, other in entries(module).items() if slot != entry.slot})


def _attributes(module: nn.Module) -> dict[str, Any]:
    names: Iterable[str] = ("config", "witness", *module.travelling) if isinstance(module, Emulated) else ()
    return {name: getattr(module, name, None) for name in names}


def _written(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Statistics, and what steps wrote in place: the tensors themselves with their values."""
    names = dict.fromkeys([*statistics(module), *(name for entry in entries(module).values() for name in entry.after)])
    found = {name: tensor(module, name) for name in names}
    return {name: (value, value.detach().clone()) for name, value in found.items() if value is not None}
