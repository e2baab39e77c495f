"""What was done to a network: entries on its modules, which repairs read, replace, refuse and take back.

An entry lies in a module's ``__dict__`` and in no state_dict, so it travels with deepcopy, pickle, sub-modules and
wrappers. It holds what a step changed and what was there before the first step into its slot. Stages, in the order of
the signal: structure (a slot per kind) -> gain -> bias -> statistics (one slot each); every stage is measured on the
network with the earlier ones in place. All rules here are our own definition.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError, RecoupWarning
from recoup.network.emulated import Emulated
from recoup.storage.digest import of_tensors

PLACE = "_recoup_ledger"
STAGES = ("structure", "gain", "bias", "statistics")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, slots=True)
class Entry:
    """One slot of one module.

    Attributes:
        stage, slot: where it belongs; a structure step has a slot per kind, such as ``order``.
        verb: the function that did it.
        number: of the step, counted over the network.
        images: that decided it, None where none did.
        before: attribute -> value before the first step into the slot.
        after: for statistics, what the step wrote.
        weights: a digest of the module's weight and bias at that time.
        config: the repr of its hardware at that time.
    """

    stage: str
    slot: str
    verb: str
    number: int
    images: int | None
    before: Mapping[str, Any]
    after: Mapping[str, Tensor] = field(default_factory=dict)
    weights: str = ""
    config: str = ""


def entries(module: nn.Module) -> dict[str, Entry]:
    """A module's own entries by slot."""
    return module.__dict__.get(PLACE, {})


def found(model: nn.Module, first: str = "structure") -> dict[str, tuple[nn.Module, list[Entry]]]:
    """The modules of a model with entries from a stage on, by name, with those entries."""
    least = STAGES.index(first)
    kept = {
        name: (module, [e for e in entries(module).values() if STAGES.index(e.stage) >= least and _there(module, e)])
        for name, module in model.named_modules()
    }
    return {name: (module, own) for name, (module, own) in kept.items() if own}


def _there(module: nn.Module, entry: Entry) -> bool:
    """Whether what a step fitted is still on the module: other weights, or the user, may have taken it away."""
    return entry.stage not in ("gain", "bias") or any(getattr(module, name, None) is not None for name in entry.before)


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
) -> None:
    """Write a finished step down on each of ``modules``; what was there before the first step into the slot stays."""
    slot, number = slot or stage, 1 + max((e.number for _, own in found(model).values() for e in own), default=0)
    for name, module in modules.items():
        own = entries(module)
        first = own[slot].before if slot in own else before[name]
        after = statistics(module) if stage == "statistics" else {}
        entry = Entry(stage, slot, verb, number, images, first, after, weights_digest(module), config_text(module))
        module.__dict__[PLACE] = {**own, slot: entry}
        if isinstance(module, Emulated):
            module.trained = False


def write(module: nn.Module, entry: Entry) -> None:
    """Put an entry on a module, in its slot."""
    module.__dict__[PLACE] = {**entries(module), entry.slot: entry}


def restorable(model: nn.Module) -> dict[str, tuple[nn.Module, Entry]]:
    """The norms whose statistics go back when the float network does: all that were repaired, if nothing has changed
    since, neither the weights of any module with an entry nor the statistics; else none."""
    repaired = {name: (norm, own[-1]) for name, (norm, own) in found(model, "statistics").items()}
    both = [(module, entry) for module, own in found(model).values() for entry in own]
    untouched = all(entry.weights == weights_digest(module) for module, entry in both)
    return repaired if untouched and all(same_statistics(*pair) for pair in repaired.values()) else {}


def undo(model: nn.Module, first: str) -> dict[str, int]:
    """Take every step from a stage on back.

    Returns:
        stage -> how many modules had an entry there.
    """
    counted: dict[str, int] = {}
    for module, own in found(model, first).values():
        for entry in sorted(own, key=lambda entry: -entry.number):
            put_back(module, entry)
            counted[entry.stage] = counted.get(entry.stage, 0) + 1
        left = {slot: entry for slot, entry in entries(module).items() if entry not in own}
        forget(module)
        if left:
            module.__dict__[PLACE] = left
    if STAGES.index(first) <= 1:
        for module in model.modules():  # extras that were set by hand have no entry
            for name in module.fitted if isinstance(module, Emulated) else ():
                setattr(module, name, None)
    return {stage: counted[stage] for stage in STAGES if stage in counted}


def begin_structure(model: nn.Module, verb: str) -> None:
    """Before a step that changes the hardware: repairs were fitted for it as it was, so they go, and it is said.

    Warns:
        RecoupWarning: which repairs went.
    """
    gone = undo(model, "gain")
    if gone:
        kinds = {"gain": "layers", "bias": "layers", "statistics": "norms"}
        said = " and ".join(
            f"{stage} ({n} {kinds[stage] if n > 1 else kinds[stage][:-1]})" for stage, n in gone.items()
        )
        warnings.warn(f"{verb}: undid {said}, fitted for other hardware; run rc.repair_", RecoupWarning, stacklevel=3)


def put_back(module: nn.Module, entry: Entry) -> None:
    """Set what an entry's step changed to what was there before.

    Statistics that something else has written since (training, another checkpoint) are not the step's: they stay.

    Warns:
        RecoupWarning: statistics that stay.
    """
    if entry.stage == "statistics" and not same_statistics(module, entry):
        warnings.warn(
            f"statistics of a batch norm changed since {entry.verb}, so they are not taken back",
            RecoupWarning,
            stacklevel=4,
        )
        return
    with torch.no_grad():
        for name, value in entry.before.items():
            old = module._buffers.get(name)
            if entry.stage == "statistics" and isinstance(old, Tensor) and isinstance(value, Tensor):
                old.copy_(value)  # in place: wrappers hold the buffer itself
            else:
                setattr(module, name, value)


@contextmanager
def unrepaired_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms with the statistics from before their repair, of those that still hold what it wrote; then as now."""
    repaired = [(norm, own[-1]) for norm, own in found(model, "statistics").values()]
    now = [(norm, statistics(norm)) for norm, entry in repaired if same_statistics(norm, entry)]
    try:
        for norm, entry in repaired:
            if any(norm is other for other, _ in now):
                put_back(norm, entry)
        yield
    finally:
        with torch.no_grad():
            for norm, values in now:
                for name, value in values.items():
                    buffer = norm._buffers[name]
                    assert buffer is not None
                    buffer.copy_(value)


def take_back(module: nn.Module, slot: str) -> None:
    """Undo one slot of one module: a step that replaces another starts from what was there before the first."""
    own = entries(module)
    if slot in own:
        put_back(module, own[slot])
        left = {name: entry for name, entry in own.items() if name != slot}
        forget(module)
        if left:
            module.__dict__[PLACE] = left


def forget(module: nn.Module) -> None:
    """Take a module's entries away, and leave what they changed."""
    module.__dict__.pop(PLACE, None)


def tracked(module: nn.Module) -> bool:
    """Whether a module stores running statistics."""
    return all(isinstance(module._buffers.get(name), Tensor) for name in BUFFERS[:2])


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the statistics that a norm stores."""
    return {name: b.clone() for name in BUFFERS if isinstance(b := module._buffers.get(name), Tensor)}


def weights_digest(module: nn.Module) -> str:
    """Of the module's own weight and bias; the copies leave the parameters' storage alone."""
    values = (getattr(module, name, None) for name in ("weight", "bias"))
    return of_tensors(*(value for value in values if isinstance(value, Tensor) and not value.is_meta))


def config_text(module: nn.Module) -> str:
    """The hardware of a module, as its config's repr."""
    return repr(module.config) if isinstance(module, Emulated) else ""


def same_statistics(module: nn.Module, entry: Entry) -> bool:
    """Whether a norm still holds what a step wrote."""
    now = {name: module._buffers.get(name) for name in entry.after}
    return all(isinstance(b, Tensor) and torch.equal(b.cpu(), entry.after[name].cpu()) for name, b in now.items())


def trained_with(module: nn.Module, entry: Entry) -> bool:
    """Whether a layer was trained since a gain or a bias was fitted: they are part of the network then."""
    return entry.stage in ("gain", "bias") and isinstance(module, Emulated) and module.trained


def changed(module: nn.Module, entry: Entry) -> str | None:
    """Why an entry is stale, as in "fitted for other weights", or None."""
    if trained_with(module, entry):
        return None
    if entry.weights != weights_digest(module):
        return "other weights"
    if entry.stage != "structure" and entry.config != config_text(module):
        return "another config"
    return None


def warn_stale(model: nn.Module, verb: str) -> None:
    """Say which repairs were fitted for other weights or another config.

    Warns:
        RecoupWarning: one a stage and reason, naming the layers.
    """
    stale: dict[tuple[str, str], list[str]] = {}
    for name, (module, own) in found(model, "gain").items():
        for entry in own:
            why = changed(module, entry)
            if why is not None:
                stale.setdefault((entry.stage, why), []).append(name)
    for (stage, why), names in stale.items():
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        warnings.warn(
            f"{verb}: {stage} fitted for {why} in {len(names)} layers: {shown}; run rc.repair_(model, batches)",
            RecoupWarning,
            stacklevel=3,
        )


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """All of a step or nothing: after an error the extras, configs, statistics and entries are as before."""
    modules = [m for m in model.modules() if isinstance(m, Emulated) or entries(m) or tracked(m)]
    kept = [(module, _attributes(module), statistics(module), dict(entries(module))) for module in modules]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for module, attributes, values, own in kept:
                for name, value in attributes.items():
                    setattr(module, name, value)
                for name, value in values.items():
                    buffer = module._buffers[name]
                    assert buffer is not None
                    buffer.copy_(value)
                forget(module)
                if own:
                    module.__dict__[PLACE] = own
        raise


def _attributes(module: nn.Module) -> dict[str, Any]:
    names: Iterable[str] = ("config", *module.travelling) if isinstance(module, Emulated) else ()
    return {name: getattr(module, name, None) for name in names}
