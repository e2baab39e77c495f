"""A card's repair, applied: what it changes without writing it down is found out and written down for it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.network import ledger
from recoup.network.emulated import Emulated
from recoup.network.wing import Repair


def applied(model: nn.Module, repair: Repair, batches: Iterable[Any]) -> None:
    """Do a repair, or each part of a combination, all or nothing, and leave it in the ledger.

    Raises:
        RecoupError: a repair of an earlier stage than what was done already; and what the repair raises.
    """
    with ledger.whole(model):
        for part in repair.parts:
            applied(model, part, batches)
        if not repair.parts:
            _applied_alone(model, repair, batches)


def _applied_alone(model: nn.Module, repair: Repair, batches: Iterable[Any]) -> None:
    if repair.records:
        repair.apply(model, batches)
        return
    _check_order(model, repair)
    seen: set[int] = set()
    before = [_Kept.of(name, module, seen) for name, module in model.named_modules()]
    number = ledger.next_number(model)
    try:
        repair.apply(model, batches)
    except BaseException:
        for kept in before:
            kept.put()
        raise
    changed = {kept.name: values for kept in before if (values := kept.changed(number))}
    modules = {kept.name: kept.module for kept in before if kept.name in changed}
    tensors = {name: [n for n in values if n not in _extras(modules[name])] for name, values in changed.items()}
    if modules:
        ledger.record(model, modules, repair.stage, repair.name, changed, slot=_slot(repair), edited=tensors)
    for kept in before:
        if kept.name in changed:
            ledger.follow(kept.module, kept.weights, kept.hardware)


def _check_order(model: nn.Module, repair: Repair) -> None:
    """As of any repair: structure takes later repairs back, and nothing is fitted under what a later stage has written.

    Raises:
        RecoupError: statistics, or tensors that a repair of a later stage edited.
    """
    if repair.stage == "structure":
        ledger.begin_structure(model, repair.name)
        return
    own = ledger.STAGES.index(repair.stage)
    if repair.stage != "statistics":
        ledger.refuse_after_statistics(model, repair.name)
    for _, _, entry in ledger.held(model):
        if ledger.STAGES.index(entry.stage) > own:
            raise RecoupError(
                f"{repair.name}: {entry.verb} edited the network with the hardware as it was; undo it with "
                f"rc.undo_(model, {entry.stage!r}), or use rc.repair_(model, batches), which does all in order"
            )


def _slot(repair: Repair) -> str | None:
    """A structure step has a slot a kind; the other stages one each."""
    return repair.name if repair.stage == "structure" else None


@dataclass(slots=True)
class _Kept:
    """What a module held before a repair: its own tensors, each of the network once, and its config and extras."""

    name: str
    module: nn.Module
    tensors: Mapping[str, Tensor | None]
    extras: Mapping[str, Any]
    weights: str
    hardware: str

    @classmethod
    def of(cls, name: str, module: nn.Module, seen: set[int]) -> "_Kept":
        tensors: dict[str, Tensor | None] = {}
        for own, value in (*module._parameters.items(), *module._buffers.items()):
            if own not in _extras(module) and id(value) not in seen:
                tensors[own] = None if value is None else value.detach().clone()
                seen |= set() if value is None else {id(value)}
        extras = {own: getattr(module, own, None) for own in _extras(module)}
        return cls(name, module, tensors, extras, ledger.weights_digest(module), ledger.hardware_digest(module))

    def changed(self, number: int) -> dict[str, Any]:
        """Name -> the value before, of what differs now and no step from ``number`` on has written down."""
        told = {n for entry in ledger.entries(self.module).values() if entry.number >= number for n in entry.before}
        tensors = {n: v for n, v in self.tensors.items() if not _same(v, ledger.tensor(self.module, n))}
        extras = {n: v for n, v in self.extras.items() if not _same(v, getattr(self.module, n, None))}
        return {n: v for n, v in (tensors | extras).items() if n not in told}

    def put(self) -> None:
        """Back as it was, after an error."""
        with torch.no_grad():
            for name, value in self.tensors.items():
                now = ledger.tensor(self.module, name)
                if now is not None and value is not None:
                    now.copy_(value)
                elif now is not None:
                    setattr(self.module, name, None)


def _extras(module: nn.Module) -> tuple[str, ...]:
    return ("config", *module.travelling) if isinstance(module, Emulated) else ()


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one.to(other.device), other.detach())
    return one is other or (type(one) is type(other) and not isinstance(one, Tensor) and one == other)
