"""What the ledger is made of: entries on modules, by slot, and what tells whether they still belong there.

An entry lies in a module's ``__dict__`` and in no state_dict, so it travels with deepcopy, pickle, sub-modules and
wrappers. It holds what a step changed and what was there before the first step into its slot.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from recoup.network.emulated import Emulated
from recoup.storage.digest import of_tensors, of_text

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
        after: what the step wrote into tensors that the module held before: statistics, weights that a repair edits.
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


def write(module: nn.Module, entry: Entry) -> None:
    """Put an entry on a module, in its slot."""
    module.__dict__[PLACE] = {**entries(module), entry.slot: entry}


def found(model: nn.Module, first: str = "structure") -> dict[str, tuple[nn.Module, list[Entry]]]:
    """The modules of a model with entries from a stage on, by name, with those entries."""
    least = STAGES.index(first)
    kept = {
        name: (module, [e for e in entries(module).values() if STAGES.index(e.stage) >= least and there(module, e)])
        for name, module in model.named_modules()
    }
    return {name: (module, own) for name, (module, own) in kept.items() if own}


def there(module: nn.Module, entry: Entry) -> bool:
    """Whether what a step did is still on the module: other weights, an earlier checkpoint, or the user, may have taken
    it away."""
    if entry.after and entry.before.keys() <= entry.after.keys() and taken_away(module, entry):
        return unchanged(module, entry)  # a step that changed nothing is there still
    return entry.stage not in ("gain", "bias") or any(getattr(module, name, None) is not None for name in entry.before)


def next_number(model: nn.Module) -> int:
    """The running number of the next step."""
    return 1 + max((entry.number for module in model.modules() for entry in entries(module).values()), default=0)


def tensor(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of the module's own."""
    # A scripted module's tables have no `dict.get`.
    value = next((table[name] for table in (module._parameters, module._buffers) if name in table), None)
    return value if isinstance(value, Tensor) else None


def unchanged(module: nn.Module, entry: Entry) -> bool:
    """Whether the module still holds what a step wrote into its tensors, but for what later steps wrote over it."""
    later = {name for other in entries(module).values() if other.number > entry.number for name in other.after}
    now = {name: tensor(module, name) for name in entry.after.keys() - later}
    return all(t is not None and torch.equal(t.cpu(), entry.after[name].cpu()) for name, t in now.items())


def taken_away(module: nn.Module, entry: Entry) -> bool:
    """Whether the tensors that a step wrote hold what they held before it."""
    both = [(tensor(module, name), entry.before.get(name)) for name in entry.after]
    return all(isinstance(old, Tensor) and t is not None and torch.equal(t.cpu(), old.cpu()) for t, old in both)


def tracked(module: nn.Module) -> bool:
    """Whether a module stores running statistics."""
    return all(name in module._buffers and tensor(module, name) is not None for name in BUFFERS[:2])


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the statistics that a norm stores."""
    return {name: b.clone() for name in BUFFERS if (b := tensor(module, name)) is not None}


def weights_digest(module: nn.Module) -> str:
    """Of the module's own weight and bias; the copies leave the parameters' storage alone."""
    values = (getattr(module, name, None) for name in ("weight", "bias"))
    return of_tensors(*(value for value in values if isinstance(value, Tensor) and not value.is_meta))


def config_text(module: nn.Module) -> str:
    """The hardware of a module, as its config's repr."""
    return repr(module.config) if isinstance(module, Emulated) else ""


def hardware_digest(module: nn.Module) -> str:
    """Of an emulated layer's weights, config and extras; "" for any other module."""
    if not isinstance(module, Emulated):
        return ""
    extras = {name: of_tensors(value) for name, value in module.extra_tensors().items()}
    return of_text(repr((weights_digest(module), config_text(module), sorted(extras.items()))))


def trained_with(module: nn.Module, entry: Entry) -> bool:
    """Whether a layer was trained since a gain or a bias was fitted: they are part of the network then."""
    return entry.stage in ("gain", "bias") and isinstance(module, Emulated) and module.trained
