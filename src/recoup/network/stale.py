"""Which repairs were fitted for other weights or other hardware than are there now, and when that is said.

It is looked at where a verb starts, after load_state_dict, and when training ends; never in a forward.
"""

import copy
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from recoup.errors import RecoupWarning
from recoup.network.emulated import Emulated, emulated_layers
from recoup.network.entries import (
    Entry,
    config_text,
    entries,
    found,
    hardware_digest,
    trained_with,
    unchanged,
    weights_digest,
    write,
)


def changed(module: nn.Module, entry: Entry) -> str | None:
    """Why an entry is stale, as in "fitted for other weights", or None."""
    if trained_with(module, entry):
        return None
    if entry.stage == "statistics" and not unchanged(module, entry):
        return None  # training, or a checkpoint, wrote others
    if entry.weights != weights_digest(module):
        return "other weights"
    if entry.stage != "structure" and entry.config != config_text(module):
        return "another config"
    return None


def stale(model: nn.Module) -> dict[tuple[str, str], list[str]]:
    """(stage, why) -> the layers, of repairs that were fitted for something else.

    Statistics depend on all emulated layers: they are stale if the weights, config or extras of any have changed since,
    or if it was not there.
    """
    told: dict[tuple[str, str], list[str]] = {}
    for layer in emulated_layers(model).values():
        _settle(layer)
    for name, (module, own) in found(model, "gain").items():
        for entry in own:
            why = changed(module, entry)
            if why is not None:
                told.setdefault((entry.stage, why), []).append(name)
    if any(unchanged(norm, own[-1]) for norm, own in found(model, "statistics").values() if own[-1].after):
        for name, layer in emulated_layers(model).items():
            known = layer.witness is not None and layer.witness.hardware == hardware_digest(layer)
            if not known and name not in told.get(("statistics", "other weights"), ()):
                told.setdefault(("statistics", "other hardware or weights"), []).append(name)
    return told


def warn_stale(model: nn.Module, verb: str) -> None:
    """Say which repairs were fitted for other weights or another config.

    Warns:
        RecoupWarning: one a stage and reason, naming the layers.
    """
    for (stage, why), names in stale(model).items():
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        warnings.warn(
            f"{verb}: {stage} fitted for {why} in {len(names)} layers: {shown}; run rc.repair_(model, batches)",
            RecoupWarning,
            stacklevel=3,
        )


def _settle(layer: Emulated) -> None:
    """Gains and corrections that came with a state_dict belong to the weights that came with them."""
    if layer.__dict__.pop("extras_came", False):
        weights, config = weights_digest(layer), config_text(layer)
        for entry in entries(layer).values():
            if entry.stage in ("gain", "bias"):
                write(layer, replace(entry, weights=weights, config=config))


class Witness:
    """The norms of one repair of statistics, for the layers that were in place: it says once that training changed
    weights under statistics that it left as they were. Pickles leave the norms out, and do without."""

    def __init__(self, norms: list[nn.Module]) -> None:
        self.norms, self.said = norms, False

    def __reduce__(self) -> tuple[Any, ...]:
        return Witness, ([],)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Witness":
        memo[id(self)] = other = Witness([])
        other.norms, other.said = copy.deepcopy(self.norms, memo), self.said
        return other

    def trained(self, layer: Emulated, digest: str) -> None:
        """A layer's training ends; ``digest`` was its hardware's at the repair."""
        if self.said or digest == hardware_digest(layer):
            return
        own = [(norm, entries(norm).get("statistics")) for norm in self.norms]
        kept = [entry for norm, entry in own if entry is not None and unchanged(norm, entry)]
        if kept:
            self.said = True
            warnings.warn(
                f"train(False): statistics of {len(kept)} batch norms were repaired ({kept[0].verb}) for other weights "
                "than training left, and stayed as they were; run rc.repair_(model, batches)",
                RecoupWarning,
                stacklevel=4,
            )


class Sight(NamedTuple):
    """What a layer was when statistics were repaired: who is to be told, digests of its hardware and of its weights."""

    witness: Witness
    hardware: str
    weights: str


def watch_loading(model: nn.Module) -> None:
    """From now on, load_state_dict of this module says which repairs were fitted for other weights."""
    if not any(hook is _loaded for hook in model._load_state_dict_post_hooks.values()):
        model.register_load_state_dict_post_hook(_loaded)


def forget_loading(model: nn.Module) -> None:
    """Undo `watch_loading`."""
    hooks = model._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _loaded]:
        del hooks[key]


def _loaded(module: nn.Module, _: Any) -> None:
    warn_stale(module, "load_state_dict")
