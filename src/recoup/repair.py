"""Repairs in their order, undone and described: `repair_`, `undo_`, `describe`."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from recoup.errors import RecoupError, RecoupWarning
from recoup.network import ledger
from recoup.network.applied import applied
from recoup.network.batches import reread
from recoup.network.checks import is_module
from recoup.network.emulated import Emulated, emulated_layers
from recoup.network.norms import check_changeable, has_norms
from recoup.network.saturation import watching_sums
from recoup.network.wing import STAGES, Card, Repair
from recoup.wings import wing_of

M = TypeVar("M", bound=nn.Module)
LATER = STAGES[1:]


def repair_(model: M, batches: Iterable[Any], plan: str | Sequence[str] = "default") -> M:
    """Repair a network afresh, stage by stage: gain, then bias, then statistics. The hardware stays as it is.

    What these stages hold is undone first, so the result does not depend on earlier repairs.

    Args:
        model: after `emulate_`.
        batches: calibration data; passed over once a repair (the batches of a generator are kept in memory).
        plan: ``default``: what the cards of the wings present name (NB-SMT: paired, or bias without batch norm; LBA:
            gain, then paired; LightNorm: gain where it took a layer or RMS norm, paired where it took a batch norm; a
            mix: all of them); ``none``; names joined by ``+`` or in a list,
            such as ``gain+paired``.

    Returns:
        The same model. After an error or an interrupt it is as before.

    Raises:
        RecoupError: no emulated layer, an unknown name, a repair that the hardware does not have.

    Warns:
        RecoupWarning: a plan that has nothing to do for this network; layers whose sums saturate, which no repair
            brings back.
    """
    present = _wings(model, "repair_")
    check_changeable(model, "repair_")
    steps = _planned(model, present, plan)
    if not steps and plan != "none":
        warnings.warn(
            "repair_: there is nothing to repair this network with: no batch norm tracks running statistics, and its "
            "hardware has no other repair",
            RecoupWarning,
            stacklevel=2,
        )
    kept = batches if len(steps) < 2 else reread(batches, "repair_")
    with ledger.whole(model), watching_sums(model, "repair_"):
        ledger.undo(model, "gain")
        for step in steps:
            applied(model, step, kept)
    return model


def undo_(model: M, stage: str | None = None) -> M:
    """Take repairs back, in place: those of a stage and of the later ones.

    Args:
        model: any module.
        stage: ``structure`` (channel orders, threads, chunks), ``gain``, ``bias`` or ``statistics``; None: gain, bias
            and statistics. The hardware stays.

    Raises:
        RecoupError: no such stage.
    """
    is_module(model, "undo_")
    if stage is not None and stage not in STAGES:
        raise RecoupError(f"undo_(stage={stage!r}): stage must be one of {', '.join(STAGES)}, or None for all repairs")
    with ledger.whole(model):
        ledger.undo(model, stage or LATER[0])
    return model


@dataclass(frozen=True, slots=True)
class Line:
    """One module: its hardware ("" for a norm without any), what was done to it, and in which it does not run as its
    hardware's config says ("" if it does)."""

    name: str
    hardware: str
    repairs: tuple[str, ...]
    note: str = ""

    def __str__(self) -> str:
        parts = [self.hardware + (f" ({self.note})" if self.note else ""), *self.repairs]
        return f"{self.name}: " + "; ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Description:
    """What was done to a network, one line a layer; print it, or take `to_dict`."""

    lines: tuple[Line, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.lines)) or "a float network: nothing was done to it"

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Layer -> its hardware, the note beside it and its repairs, as plain values."""
        return {
            line.name: {"hardware": line.hardware, "note": line.note, "repairs": list(line.repairs)}
            for line in self.lines
        }


def describe(model: nn.Module) -> Description:
    """What was done to a network: hardware, repairs and the images they used, layer by layer.

    >>> print(describe(nn.Linear(2, 2)))
    a float network: nothing was done to it
    """
    is_module(model, "describe")
    lines, elsewhere = [], any(stage == "statistics" for stage, _ in ledger.stale(model))
    for name, module in model.named_modules():
        own = sorted(ledger.entries(module).values(), key=lambda entry: entry.number)
        if own or isinstance(module, Emulated):
            repairs = tuple(_said(module, entry, elsewhere) for entry in own)
            note = module.note() if isinstance(module, Emulated) else ""
            lines.append(Line(name or type(module).__name__, ledger.config_text(module), repairs, note))
    return Description(tuple(lines))


def _said(module: nn.Module, entry: ledger.Entry, elsewhere: bool) -> str:
    """``elsewhere``: whether statistics are stale for what happened to other layers."""
    text = f"{entry.slot} ({entry.verb}" + ("" if entry.images is None else f", {entry.images} images") + ")"
    if ledger.trained_with(module, entry):
        return f"{text}, trained with"
    if entry.stage == "statistics" and not ledger.unchanged(module, entry):
        return f"{text}, {'taken back' if ledger.taken_away(module, entry) else 'written over'} since"
    why = ledger.changed(module, entry)
    if why is None and entry.stage == "statistics" and elsewhere:
        why = "other hardware or weights"
    return text if why is None else f"{text}, stale: fitted for {why}"


def _wings(model: nn.Module, verb: str) -> dict[type, Card]:
    is_module(model, verb)
    present = {type(layer.config): wing_of(layer.config, verb) for layer in emulated_layers(model).values()}
    if not present:
        raise RecoupError(f"{verb}: the model has no emulated layer: emulate_ it first")
    return present


def _planned(model: nn.Module, present: dict[type, Card], plan: str | Sequence[str]) -> list[Repair]:
    """The repairs of a plan, each once, in the order of the stages."""
    norms = has_norms(model)
    steps: list[Repair] = []
    if plan == "default":
        for card in present.values():
            for name in card.plan if norms else card.plan_without_norms:
                repair = card.repair(name)
                assert repair is not None
                steps += [repair] if repair.applies(model) else []
    else:
        for found in _asked(present, plan):
            # Of wings that call theirs alike those with something to do; where none has, each says why.
            steps += [repair for repair in found if repair.applies(model)] or found
    parts = [part for repair in steps for part in (repair.parts or (repair,))]
    flat = {(part.name, part.apply): part for part in parts}  # wings may call different repairs alike: each is done
    return sorted(flat.values(), key=lambda repair: STAGES.index(repair.stage))


def check_plan(configs: Iterable[Any], plan: Any) -> None:
    """Refuse a plan that hardware of these configs does not have, before a network is on it.

    Raises:
        RecoupError: as `repair_`.
    """
    present = {type(config): wing_of(config, "repair_") for config in configs}
    if plan != "default":
        _asked(present, plan)


def _asked(present: dict[type, Card], plan: Any) -> list[list[Repair]]:
    """The repairs that each name of a plan stands for."""
    if plan == "none":
        return []
    names = plan.split("+") if isinstance(plan, str) else plan
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise RecoupError(f"repair_(plan={plan!r}): plan must be 'default', 'none', or names of repairs")
    return [_named(name.strip(), present, plan) for name in names]


def _named(name: str, present: dict[type, Card], plan: Any) -> list[Repair]:
    able = [repair for card in present.values() for repair in card.repairs if _plannable(repair)]
    found = [repair for repair in able if name in (repair.name, repair.short)]
    if found:
        return found
    legal = ", ".join(dict.fromkeys(repair.short or repair.name for repair in able))
    raise RecoupError(f"repair_(plan={plan!r}): {name!r} is no repair of this hardware; it has {legal or 'none'}")


def _plannable(repair: Repair) -> bool:
    """Structure is a choice, and what is measured on a baseline is a study's control."""
    return repair.stage != "structure" and not repair.on_baseline
