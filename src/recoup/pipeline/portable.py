"""A rank's state between two samples, parameter by parameter, so that a run can go on with them on other ranks.

After the update of sample k - 1, and before that of sample k, everything of a parameter is said by its versions, its
optimizer's state and k: samples under way are forwarded again from there, through the very weights that they saw.
Buffers that the forward pass moves are those that sample k found, since later samples have moved them on; those that
the backward pass moves are as they are now. Names are those of the whole model: the order of parameters within a stage
differs with the cut.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.pipeline.simulator import Simulator

State = dict[str, Any]
ALIKE = ("foreseen", "fixed")  # of the coming update's rate: the same on every rank


def buffers_of(part: nn.Module) -> dict[str, Tensor]:
    """By all of their names: a module that shares one may be on a rank without the other."""
    return dict(part.named_buffers(remove_duplicate=False))


def taken_apart(core: Simulator) -> State:
    """A simulator's state between two updates, its rings and its optimizer's state by the parameters' names."""
    state, layout = core.state_dict(), core.rings.layout
    slots = {name: vector.split(layout.sizes) for name, vector in state["optimizer"].items()}
    parameters = {}
    for place in layout.places:
        own = slice(place.start, place.end)
        kept = {name: parts[place.stage][own].clone() for name, parts in slots.items()}
        parameters[place.name] = {"ring": state["ring"][place.stage][:, own].clone(), **kept}
    kept = ("steps", "updates", *ALIKE, "frozen", "random")
    buffers = {name: buffer.clone() for name, buffer in buffers_of(core.model).items()}
    return {"parameters": parameters, "buffers": buffers, **{name: state[name] for name in kept}}


def needed(core: Simulator, part: Mapping[str, Any]) -> State:
    """Of what `taken_apart` gave on one rank, what a simulator takes up."""
    mine = {place.name for place in core.rings.layout.places}
    modules = {name for name, _ in core.model.named_modules(remove_duplicate=False)}

    def own(kind: str) -> dict[str, Any]:
        return {name: value for name, value in part[kind].items() if name.rpartition(".")[0] in modules}

    parameters = {name: value for name, value in part["parameters"].items() if name in mine}
    return {**part, "parameters": parameters, "buffers": own("buffers"), "frozen": own("frozen")}


def put_together(core: Simulator, parts: Sequence[Mapping[str, Any]], *, last: bool) -> None:
    """Load what `needed` left of all ranks' states. ``last``: whether the loss is on this rank, and may draw numbers.

    Raises:
        RecoupError: they lack a parameter or a buffer of this one, or have one more, or others in shape; nothing is
            changed.
    """
    every: dict[str, Mapping[str, Tensor]] = {n: value for part in parts for n, value in part["parameters"].items()}
    places, ours = core.rings.layout.places, core.state_dict()
    missing = [place.name for place in places if place.name not in every]
    if missing:
        raise RecoupError(f"pipeline.run: the checkpoint has no parameter {missing[0]}")
    first = next(
        part for part in parts if (part.get("losses") is not None if last else places[0].name in part["parameters"])
    )
    rings = [ring.clone() for ring in ours["ring"]]
    slots = {name: list(vector.clone().split(core.rings.layout.sizes)) for name, vector in ours["optimizer"].items()}
    for place in places:
        kept, own = every[place.name], slice(place.start, place.end)
        views = {"ring": rings[place.stage][:, own], **{n: parts_[place.stage][own] for n, parts_ in slots.items()}}
        for name, there in views.items():
            if name not in kept or kept[name].shape != there.shape:
                raise RecoupError(f"pipeline.run: the checkpoint has no {name} {list(there.shape)} of {place.name}")
            there.copy_(kept[name])
    loaded = {
        **ours,
        **{name: first[name] for name in ("steps", "updates", *ALIKE, "random")},
        "ring": rings,
        "optimizer": {name: torch.cat(parts) for name, parts in slots.items()},
        "frozen": {name: value for part in parts for name, value in part["frozen"].items()},
    }
    buffers = {name: value for part in parts for name, value in part["buffers"].items()}
    unlike = sorted(buffers.keys() ^ buffers_of(core.model).keys())
    if unlike:
        raise RecoupError(f"pipeline.run: {unlike[0]} is a buffer of the checkpoint or of the model alone")
    loaded["buffers"] = {name: buffers[name] for name in ours["buffers"]}
    core.load_state_dict(loaded)


class Moved:
    """Which buffers the passes of a part move: with the forward, or with the backward."""

    def __init__(self) -> None:
        self.forward: set[str] = set()
        self.backward: set[str] = set()

    def note(self, part: nn.Module, before: Mapping[str, Tensor], *, forward: bool) -> None:
        """After a pass that found these buffers.

        Raises:
            RecoupError: one that appeared or went; one that both passes move, whose value depends on how samples
                interleave, which differs with the ranks.
        """
        now = buffers_of(part)
        unlike = sorted(now.keys() ^ before.keys())
        if unlike:
            raise RecoupError(
                f"pipeline.run: the buffer {unlike[0]} appeared or went in a pass, which no checkpoint can hold; make "
                "it before training, or run without a folder"
            )
        moved = {name for name, value in before.items() if not _same(now[name], value)}
        (self.forward if forward else self.backward).update(moved)
        both = sorted(self.forward & self.backward)
        if both:
            raise RecoupError(
                f"pipeline.run: {both[0]} is moved in the forward and in the backward pass, so that its value depends "
                "on the number of ranks and no checkpoint can hold it; run without a folder"
            )

    def between(self, now: Mapping[str, Tensor], found: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Buffers between two samples: as now, but what the forward moves as the coming sample found it."""
        return dict(now) if found is None else {**now, **{name: found[name] for name in self.forward}}


def _same(one: Tensor, other: Tensor) -> bool:
    """NaN is like NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())  # noqa: PLR0124 -- NaN alone is unlike itself
