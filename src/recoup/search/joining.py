"""Fine-tuned networks join a front: priced as its points are, and each measured beside them once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from recoup.costs import PRICED, assigned
from recoup.errors import RecoupError
from recoup.network.checks import instance, is_module
from recoup.network.copies import copied
from recoup.network.emulated import emulated_layers
from recoup.policy import Policy
from recoup.repair import check_plan
from recoup.search.bench import Bench, built, needing_scales
from recoup.search.fronts import TUNED, Front, Point, Tuned
from recoup.search.prices import Program
from recoup.search.records import Records, Task
from recoup.search.spaces import Group, title
from recoup.tasks.bench import Value, Workbench
from recoup.tasks.performing import perform


def join(
    front: Front,
    model: nn.Module,
    policy: Policy | Mapping[str, Any],
    *,
    repair: str | Sequence[str] = "none",
    weights: str = "",
) -> Front:
    """Have a fine-tuned network join a front: `recoup.search.verify` then measures it beside the others, once.

    Its costs are counted as theirs are. Its damage is the distance to the network that was scored, its loss what it is
    worse than that one in float, on the same test batches. Activation scales that it has, such as it was trained with,
    stay; where it lacks one they are of each draw of calibration images. No repair by default: norms and weights learnt
    with the hardware in place.

    Args:
        front: from `recoup.search.front`, `recoup.search.refine` or `recoup.search.verify`.
        model: in float, built as the one that was scored, with weights of its own; it is copied.
        policy: what it was trained on; layers outside the space may be on hardware too.
        repair: a plan of `recoup.repair_`, applied before it is measured.
        weights: where the weights are from, for tables.

    Returns:
        The front with one point more, kind ``tuned``, the policy's name and ", tuned".

    Raises:
        RecoupError: a network that is emulated, or built otherwise; a policy that names no layer of it, or hardware
            whose cost is not known; energy or area of layers outside the space, which the other points do not count, or
            of a layer that it leaves in float; a repair that the hardware does not have.
    """
    instance(front, Front, "search.join", "front", "what recoup.search.front returned")
    is_module(model, "search.join")
    if emulated_layers(model):
        raise RecoupError("search: join: the model is emulated already: restore_ it first")
    if built(model) != front.scores.identity["network"]:
        raise RecoupError(
            "search: join: the network is not built as the one that was scored: a fine-tuned one has its layers and "
            "its code, and weights of its own"
        )
    instance(policy, Mapping, "search.join", "policy", "a Policy")
    assert front.program is not None
    chosen, priced, options = placed(front.program, front.scores.groups, model, policy, repair)
    inside = {layer: chosen.get(layer) for group in front.scores.groups for layer in group.layers}
    name = _free(f"{getattr(policy, 'name', '') or 'a policy'}, tuned", [point.policy.name for point in front.points])
    point = Point(
        Policy(inside | chosen, name),
        options if priced is front.program else (),
        priced.priced.of(options),
        float("nan"),
        TUNED,
        priced.allows(options),
        tuned=Tuned(copied(model, "search.join"), repair, weights),
    )
    outside = [layer for layer in chosen if layer not in inside]
    notes = (f"{name}: hardware runs {', '.join(outside)} too, outside the space.",) if outside else ()
    return replace(front, points=(*front.points, point), notes=(*front.notes, *notes))


def placed(
    program: Program,
    groups: Sequence[Group],
    model: nn.Module,
    policy: Policy | Mapping[str, Any],
    repair: str | Sequence[str],
) -> tuple[dict[str, Any], Program, tuple[int, ...]]:
    """Which layer runs on what under a policy; the program of a space that holds it, the given one if that does; and
    its options there.

    Raises:
        RecoupError: a key of the policy that names no layer, a cost that is not known or that no other point counts, a
            repair that the hardware does not have.
    """
    chosen = assigned(model, policy, "search: join")
    check_plan(chosen.values(), repair)
    held, options = _holding(groups, chosen)
    if held == tuple(groups):
        return chosen, program, options
    inside = {layer for group in groups for layer in group.layers}
    outside = next((layer for layer in chosen if layer not in inside), None)
    uneven = [name for name in program.priced.quantities if name in PRICED]
    floating = [layer for group in groups if None not in group.options for layer in group.layers if layer not in chosen]
    if floating and uneven:
        raise RecoupError(
            f"search: join: the policy leaves layer {floating[0]!r} in float, for which no hardware is generated, so "
            f"it has no {' and '.join(uneven)}"
        )
    if outside is not None and uneven:
        raise RecoupError(
            f"search: join: {title(chosen[outside])} on layer {outside!r}, which is outside the space: no other point "
            f"counts its {' and '.join(uneven)}; add it to the space"
        )
    return chosen, replace(program, priced=program.count(held)), options


def _holding(groups: Sequence[Group], chosen: Mapping[str, Any]) -> tuple[tuple[Group, ...], tuple[int, ...]]:
    """A space that holds a policy: groups that it divides in parts, options that it adds, its layers outside alone."""
    found: list[tuple[Group, Any]] = []
    for group in groups:
        configs = [chosen.get(layer) for layer in group.layers]
        whole = len(set(configs)) == 1
        parts = [group] if whole else [Group(layer, (layer,), group.options) for layer in group.layers]
        found += zip(parts, configs, strict=False)  # of a whole group the first stands for all
    inside = {layer for group in groups for layer in group.layers}
    found += [(Group(layer, (layer,), (o,)), o) for layer, o in chosen.items() if layer not in inside]
    held = [g if option in g.options else replace(g, options=(*g.options, option)) for g, option in found]
    return tuple(held), tuple(g.options.index(option) for g, (_, option) in zip(held, found, strict=True))


def _free(name: str, taken: Sequence[str]) -> str:
    """A name, numbered where it is taken."""
    number = 1 + sum(other == name or other.startswith(f"{name} ") for other in taken)
    return name if number == 1 else f"{name} {number}"


@dataclass(frozen=True)
class Own:
    """A measurement with a bench of its own, and where it is kept."""

    bench: Bench
    task: Task
    records: Records

    @property
    def label(self) -> str:
        """As users are told."""
        return self.task.label

    @property
    def record(self) -> "Own":
        """Itself: it knows what it is filed under."""
        return self

    @property
    def key(self) -> str:
        """The name of its file."""
        return self.records.key(self.task.policy)

    @property
    def value(self) -> Value | None:
        """Its numbers, if it was made."""
        return self.records.get(self.task.policy)


class OwnBench(Workbench):
    """Measures with the bench that comes with the task."""

    purpose = Bench.purpose

    def make(self, task: Any) -> Value:
        """The numbers of an `Own`."""
        return task.bench.make(task.task)


@dataclass
class Each:
    """The `recoup.tasks.bench.Keeper` of `Own` measurements."""

    any_cpu: bool
    place: str

    def key(self, own: Own, /) -> str:
        """The name of its file."""
        return own.key

    def get(self, own: Own, /) -> Value | None:
        """A finished one, or None."""
        return own.value

    def put(self, own: Own, /, value: Value, cpu: str) -> None:
        """Keep it."""
        own.records.put(own.task.policy, value, cpu)


def measure_tuned(
    points: Sequence[Point], model: nn.Module, ordinary: Bench, stores: dict[str, Records], out: Path | None,
    *, any_cpu: bool = False, **how: Any,
) -> tuple[list[Own], int]:  # fmt: skip
    """Measure fine-tuned points of one draw, each with its own network; what is kept is not measured again.

    Args:
        points: fine-tuned ones.
        model: the one that was scored.
        ordinary: what measures the other points of the draw.
        stores: of each identity its records; those of further draws are added.
        out, any_cpu: of `recoup.search.records.Records`.
        how: of `recoup.tasks.performing.perform`.

    Returns:
        The measurements, and how many of them were made.
    """
    owns = []
    for point in points:
        assert point.tuned is not None
        task = Task.of(point.policy.name, dict(point.policy))
        scaled = needing_scales({layer: [config] for layer, config in task.hardware.items()})
        images, shared = (ordinary.batches, ordinary.metrics, ordinary.calibration), (ordinary.outputs, model)
        bench = Bench(point.tuned.network, *images, point.tuned.repair, scaled, *shared)
        records = Records(out, bench.identity(), any_cpu=any_cpu)
        records = stores.setdefault(json.dumps(records.identity, sort_keys=True), records)
        owns.append(Own(bench, task, records))
    place = "in memory" if out is None else f"in {out}"
    return owns, perform(OwnBench(), owns, Each(any_cpu, place), **how) if owns else 0
