"""A rank's state between two samples, stage by stage, so that a run can go on with its stages on other ranks.

After the update of sample k - 1, and before that of sample k, everything of a stage is said by its versions of the
weights, its optimizer's state, its buffers and k: samples under way are forwarded again from there, through the very
weights that they saw. Buffers that the forward pass moves are those that sample k found, since later samples have
moved them on; those that the backward pass moves are as they are now.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.pipeline.simulator import Simulator

State = dict[str, Any]
ALIKE = ("foreseen", "fixed")  # of the coming update's rate: the same on every rank


def taken_apart(core: Simulator) -> State:
    """A simulator's state between two updates, its stages' weights and optimizer by the numbers of the stages."""
    state, sizes = core.state_dict(), core.rings.layout.sizes
    slots = {name: vector.split(sizes) for name, vector in state["optimizer"].items()}
    stages = {
        core.first + i: {"ring": ring, **{name: parts[i].clone() for name, parts in slots.items()}}
        for i, ring in enumerate(state["ring"])
    }
    kept = ("steps", "updates", *ALIKE, "buffers", "frozen", "random")
    return {"stages": stages, **{name: state[name] for name in kept}}


def needed(core: Simulator, part: Mapping[str, Any]) -> State:
    """Of what `taken_apart` gave on one rank, what a simulator takes up."""
    buffers = {name for name, _ in core.model.named_buffers()}
    frozen = core.rings.layout.frozen
    mine = range(core.first, core.first + len(core.delays))
    return {
        **part,
        "stages": {number: stage for number, stage in part["stages"].items() if number in mine},
        "buffers": {name: value for name, value in part["buffers"].items() if name in buffers},
        "frozen": {name: value for name, value in part["frozen"].items() if name in frozen},
    }


def put_together(core: Simulator, parts: Sequence[Mapping[str, Any]]) -> None:
    """Load what `taken_apart` gave on all ranks together into one of these or other ranks.

    Raises:
        RecoupError: they lack a stage, a buffer or a parameter of this one, or are of other shapes; nothing is changed.
    """
    stages = {number: stage for part in parts for number, stage in part["stages"].items()}
    mine = range(core.first, core.first + len(core.delays))
    missing = [number for number in mine if number not in stages]
    if missing:
        raise RecoupError(f"pipeline.run: the checkpoint has no stage {missing[0]}")
    first = next(part for part in parts if mine[0] in part["stages"])
    ours = core.state_dict()
    own = [stages[number] for number in mine]
    loaded = {
        **ours,
        **{name: first[name] for name in ("steps", "updates", *ALIKE, "random")},
        "ring": [stage["ring"] for stage in own],
        "optimizer": {name: torch.cat([stage[name] for stage in own]) for name in ours["optimizer"]},
    }
    for kind in ("buffers", "frozen"):
        every: dict[str, Tensor] = {name: value for part in parts for name, value in part[kind].items()}
        loaded[kind] = {name: every[name] for name in ours[kind] if name in every}
    core.load_state_dict(loaded)


class Moved:
    """Which buffers the passes of a part move: with the forward, or with the backward.

    Raises:
        RecoupError: a buffer that both move; its value depends on how samples interleave, which differs with the ranks.
    """

    def __init__(self) -> None:
        self.forward: set[str] = set()
        self.backward: set[str] = set()

    def note(self, part: torch.nn.Module, before: Mapping[str, Tensor], *, forward: bool) -> None:
        """After a pass that found these buffers."""
        now = dict(part.named_buffers())
        moved = {name for name, value in before.items() if not torch.equal(now[name], value.to(now[name].device))}
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
