"""Fine-tuned networks join a front: priced as its points are, and each measured beside them once."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from recoup.costs import PRICED, assigned
from recoup.errors import RecoupError
from recoup.evaluation import Function
from recoup.network.checks import instance, is_module
from recoup.network.emulated import emulated_layers
from recoup.network.replay import Outputs
from recoup.policy import Policy
from recoup.search.bench import Bench, built, needing_scales
from recoup.search.fronts import TUNED, Front, Point, Tuned
from recoup.search.prices import Program
from recoup.search.records import Records, Task
from recoup.search.spaces import Group, title
from recoup.tasks.bench import Value, Workbench
from recoup.tasks.performing import Progress, perform
from recoup.tasks.shards import Shard

Choice = tuple[tuple[Group, ...], tuple[int, ...]]
"""Groups, and the option of each."""


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
    worse than that one in float, on the same test batches; scales are of each draw of calibration images. No repair by
    default: norms and weights learnt with the hardware in place.

    Args:
        front: from `recoup.search.front`, `recoup.search.refine` or `recoup.search.verify`.
        model: in float, built as the one that was scored, with weights of its own; it is not touched.
        policy: what it was trained on; layers outside the space may be on hardware too.
        repair: a plan of `recoup.repair_`, applied before it is measured.
        weights: where the weights are from, for tables.

    Returns:
        The front with one point more, kind ``tuned``, the policy's name and ", tuned".

    Raises:
        RecoupError: a network that is emulated, or built otherwise; a policy that names no layer of it, or hardware
            whose cost is not known; energy or area of layers outside the space, which the other points do not count.
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
    assert front.program is not None
    chosen, priced, options = placed(front.program, front.scores.groups, model, policy)
    inside = {layer: chosen.get(layer) for group in front.scores.groups for layer in group.layers}
    name = _free(f"{getattr(policy, 'name', '') or 'a policy'}, tuned", [point.policy.name for point in front.points])
    point = Point(
        Policy(inside | chosen, name),
        options if priced is front.program else (),
        priced.priced.of(options),
        float("nan"),
        TUNED,
        priced.allows(options),
        tuned=Tuned(model, repair, weights),
    )
    return replace(front, points=(*front.points, point))


def placed(
    program: Program, groups: Sequence[Group], model: nn.Module, policy: Policy | Mapping[str, Any]
) -> tuple[dict[str, Any], Program, tuple[int, ...]]:
    """Which layer runs on what under a policy; the program of a space that holds it, the given one if that does; and
    its options there.

    Raises:
        RecoupError: a key of the policy that names no layer, a cost that is not known or that no other point counts.
    """
    chosen = assigned(model, policy, "search: join")
    held, options = _holding(groups, chosen)
    if held == tuple(groups):
        return chosen, program, options
    inside = {layer for group in groups for layer in group.layers}
    outside = next((layer for layer in chosen if layer not in inside), None)
    uneven = [name for name in program.priced.quantities if name in PRICED]
    if outside is not None and uneven:
        raise RecoupError(
            f"search: join: {title(chosen[outside])} on layer {outside!r}, which is outside the space: no other point "
            f"counts its {' and '.join(uneven)}; add it to the space"
        )
    return chosen, replace(program, priced=program.count(held)), options


def _holding(groups: Sequence[Group], chosen: Mapping[str, Any]) -> Choice:
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
    points: Sequence[Point],
    model: nn.Module,
    test: Iterable[Any],
    metrics: Sequence[str | Function],
    draws: Sequence[Iterable[Any]],
    outputs: Outputs,
    *,
    out: Path | None,
    any_cpu: bool = False,
    executor: Executor | None = None,
    workers: int = 1,
    shard: Shard | None = None,
    progress: Progress | None = None,
) -> tuple[list[list[Own]], int]:
    """Measure fine-tuned points, each with its own network and as often as there are draws; what is kept is not again.

    Returns:
        The measurements of each point, and how many of them were made.
    """
    plan = []
    for point in points:
        assert point.tuned is not None
        found, repair = point.tuned.network, point.tuned.repair
        task = Task.of(point.policy.name, dict(point.policy))
        scaled = needing_scales({layer: [config] for layer, config in task.hardware.items()})
        benches = [Bench(found, test, metrics, images, repair, scaled, outputs, model) for images in draws]
        plan.append([Own(one, task, Records(out, one.identity(), any_cpu=any_cpu)) for one in benches])
    keeper = Each(any_cpu, "in memory" if out is None else f"in {out}")
    every = [own for row in plan for own in row]
    how: dict[str, Any] = {"executor": executor, "workers": workers, "shard": shard, "progress": progress}
    return plan, perform(OwnBench(), every, keeper, **how) if every else 0
