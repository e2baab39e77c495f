"""One-layer damages: every group on every option alone, and probes of whole networks to see how they add up."""

import csv
import io
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from recoup.costs import beside
from recoup.errors import RecoupError
from recoup.evaluation import Function
from recoup.fields import integer
from recoup.network.batches import prepared
from recoup.network.checks import instance, is_module
from recoup.network.meters import METERS
from recoup.network.replay import Outputs, memory
from recoup.network.sites import Map, survey
from recoup.search.bench import Bench, kept, metric_name, needing_scales
from recoup.search.pairing import half_of_damage
from recoup.search.records import FOLDER as RECORDS
from recoup.search.records import Records, Task
from recoup.search.spaces import FLOAT, Group, Space, policy_of, title, titles, uniform
from recoup.search.surrogate import Probe, Surrogate, fit
from recoup.storage.files import write_atomically, write_once
from recoup.storage.folder import make
from recoup.storage.statefile import differences
from recoup.tasks.performing import Progress, check_division, perform
from recoup.tasks.shards import IncompleteError, Shard

FILE = "scores.json"
TABLE = "scores.csv"
CLAIM = "identity.json"
"""Written before the first measurement: whose folder it is."""
SCHEMA = 1
PROBES = 8


@dataclass(frozen=True)
class Scores:
    """What a search knows: damages of single groups, probes, and sizes, from which every budget is answered.

    Attributes:
        groups: with their options.
        damages: of each group's options alone; 0 or more, the float network or the reference being 0.
        raw: the metric itself, before the reference was subtracted.
        seconds: CPU time of each measurement; 0 where nothing was measured.
        base: the metric of the network that the others are compared with.
        reference: the option of each group in that network; None: all in float.
        metric: what was measured; ``rises``: whether more of it is better.
        surrogate: how damages add up.
        probes: whole policies, measured and predicted.
        sizes: of the layers for one image, from which costs follow.
        identity: weights, data, repair and versions.
        space: as plain values.
        made, total: measurements that this call made, and how many there are.
        notes: warnings of recoup's during measurements.
    """

    groups: tuple[Group, ...]
    damages: tuple[tuple[float, ...], ...]
    raw: tuple[tuple[float, ...], ...]
    seconds: tuple[tuple[float, ...], ...]
    base: float
    reference: tuple[int, ...] | None
    metric: str
    surrogate: Surrogate
    probes: tuple[Probe, ...]
    sizes: Map
    identity: Mapping[str, Any]
    space: Mapping[str, Any]
    rises: bool = False
    made: int = 0
    total: int = 0
    notes: tuple[str, ...] = ()
    most_units: int | None = None
    calibration: Any = field(default=None, repr=False)
    records: Records | None = field(default=None, repr=False)

    def predict(self, options: Sequence[int]) -> float:
        """The damage of a policy, as the surrogate foretells it."""
        return self.surrogate.predict(self.damages, options)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        names = ("damages", "raw", "seconds", "base", "reference", "metric", "rises", "most_units")
        groups = [{"name": g.name, "layers": list(g.layers), "options": g.titles()} for g in self.groups]
        return {
            "schema_version": SCHEMA,
            "groups": groups,
            **{name: getattr(self, name) for name in names},
            "surrogate": self.surrogate.to_dict(),
            "probes": [probe.to_dict() for probe in self.probes],
            "sizes": self.sizes.to_dict(),
            "identity": dict(self.identity),
            "space": dict(self.space),
            "notes": list(self.notes),
        }

    def save(self, folder: Path) -> list[Path]:
        """Write scores.json and scores.csv, each whole or not at all."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["group", "layers", "option", self.metric, "damage", "seconds"])
        for group, *rows in zip(self.groups, self.raw, self.damages, self.seconds, strict=True):
            for option, *numbers in zip(group.options, *rows, strict=True):
                writer.writerow(
                    [group.name, " ".join(group.layers), FLOAT if option is None else repr(option), *numbers]
                )
        write_atomically(folder / TABLE, out.getvalue())
        write_atomically(folder / FILE, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        return [folder / TABLE, folder / FILE]


@dataclass(frozen=True)
class Plan:
    """What there is to measure, in an order that every process shares.

    Attributes:
        groups: with their options.
        reference: the option of each group everywhere else, None being float.
        base: the network that damages are compared with.
        alone: for each group and option, its measurement; None where it is the base itself.
        probes: whole policies by label, with their measurements.
    """

    groups: tuple[Group, ...]
    reference: tuple[int, ...] | None
    base: Task
    alone: tuple[tuple[Task | None, ...], ...]
    probes: tuple[tuple[str, tuple[int, ...], Task], ...]

    @property
    def tasks(self) -> list[Task]:
        """All, each once."""
        every = [self.base, *(t for row in self.alone for t in row if t is not None), *(t for _, _, t in self.probes)]
        return list({json.dumps(task.policy, sort_keys=True): task for task in reversed(every)}.values())[::-1]


def plan(model: nn.Module, space: Space, *, reference: bool = False, probes: int = PROBES) -> Plan:
    """The measurements of a space: one a group and option, and ``probes`` of whole networks.

    Probes are the uniform policies, then random mixes, the same for the same space.

    Raises:
        RecoupError: see `recoup.search.spaces.Space.groups`.
    """
    is_module(model, "search.score")
    instance(space, Space, "search.score", "space", "Space({'re:conv.*': [None, ...]})")
    integer("search.score", "probes", probes, (0, 2**16))
    groups = space.groups(model)
    rest: dict[str, Any] = {}
    if reference:
        rest = {layer: group.options[0] for group in groups for layer in group.layers}
    alone = tuple(tuple(_alone(group, number, rest) for number in range(len(group.options))) for group in groups)
    chosen = dict(list(_probes(groups, probes))[:probes])
    measured = tuple(
        (label, options, Task.of(f"probe {label}", policy_of(groups, options))) for label, options in chosen.items()
    )
    first = (0,) * len(groups) if reference else None
    return Plan(groups, first, Task.of("reference", rest), alone, measured)


def _alone(group: Group, number: int, rest: Mapping[str, Any]) -> Task | None:
    option = group.options[number]
    if option == (rest[group.layers[0]] if rest else None):
        return None
    return Task.of(f"{group.name} on {title(option)}", {**rest, **dict.fromkeys(group.layers, option)})


def _probes(groups: Sequence[Group], count: int) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Uniform policies other than all in float, then random mixes."""
    seen = set()
    every = uniform(groups)
    names = titles(every)
    for option, options in every.items():
        if _any_hardware(groups, options) and options not in seen:
            seen.add(options)
            yield names[option], options
    draw = random.Random(0)  # noqa: S311 -- the same probes for the same space
    for number in range(20 * count):
        options = tuple(draw.randrange(len(group.options)) for group in groups)
        if options not in seen and _any_hardware(groups, options):
            seen.add(options)
            yield f"mix {number}", options


def _any_hardware(groups: Sequence[Group], options: Sequence[int]) -> bool:
    return any(group.options[option] is not None for group, option in zip(groups, options, strict=True))


def score(
    model: nn.Module,
    batches: Iterable[Any],
    space: Space,
    *,
    repair: str | Sequence[str] = "default",
    metric: str | Function = "kl",
    rises: bool | None = None,
    calibration: Iterable[Any] | None = None,
    reference: bool = False,
    probes: int = PROBES,
    out: str | Path | None = None,
    executor: Executor | None = None,
    workers: int = 1,
    shard: Shard | None = None,
    any_cpu: bool = False,
    progress: Progress | None = None,
) -> Scores:
    """Measure every group of a space on every option, alone, after repair; and some whole networks.

    The damage of (group, option) is the metric of the network with that group on that option, everything else in float
    (or, with ``reference``, on its own first option), less the metric of the network without it; 0 at least. Scores
    do not depend on each other, so one set of them serves every budget.

    Every number is made on one thread from the float checkpoint: the same to the bit however the work was divided.

    Args:
        model: in float; it is not touched, a copy is measured.
        batches: what the metric is measured on: training or validation images, not those of the final test.
        space: the options.
        repair: a plan of `recoup.repair_`, applied before every measurement: score what will be shipped.
        metric: ``kl`` (from the float network; ranks best [measured]), ``mse``, ``nats``, ``top1`` or a callable.
        rises: whether more of a callable metric is better; the others know.
        calibration: what scales and repairs are computed from; None: ``batches``.
        reference: whether everything else runs its first option instead of float.
        probes: how many whole networks to measure for the error bar; 0: none.
        out: a folder for records and scores; None: in memory.
        executor, workers, shard, progress: where to measure, and which part; see `recoup.tasks.performing.perform`.
        any_cpu: take records of processors with another vector width, whose last bits may differ.

    Raises:
        RecoupError: a space that does not fit the network, a metric that is none or gives NaN (which policy), a folder
            of another search: of other weights, data, repair, metric or versions.
    """
    check_division("search.score", workers, executor, shard)
    made = plan(model, space, reference=reference, probes=probes)
    batches = kept(batches)
    sizes = sizes_of(model, batches)
    scaled = needing_scales({layer: group.options for group in made.groups for layer in group.layers})
    _check_metric(metric, rises)
    images, outputs = batches if calibration is None else calibration, Outputs(memory(workers))
    bench = Bench(model, batches, (metric,), images, repair, scaled, outputs)
    records = _records(bench, None if out is None else Path(out), any_cpu)
    new = perform(bench, made.tasks, records, executor=executor, workers=workers, shard=shard, progress=progress)
    found = _scores(made, records, metric_name(metric), _rises(metric, rises))
    about: dict[str, Any] = {"space": space.to_dict(), "most_units": space.most_units, "identity": records.identity}
    scores = Scores(**found, **about, sizes=sizes, made=new, calibration=bench.calibration, records=records)
    if out is not None:
        scores.save(Path(out))
    return scores


def _records(bench: Bench, folder: Path | None, any_cpu: bool) -> Records:
    identity = bench.identity()
    if folder is not None:
        make(folder)
        _claim(folder, identity)
    return Records(folder, identity, any_cpu=any_cpu)


def sizes_of(model: nn.Module, batches: Iterable[Any]) -> Map:
    """The layers of a network in float for the first sample."""
    inputs = next(prepared(model, batches, "search"))[0]
    one = {name: value[:1] for name, value in inputs.items()} if isinstance(inputs, Mapping) else inputs[:1]
    sizes = survey(model, one, "search")
    return Map(sizes.sites, (*sizes.uncounted, *beside(model, sizes)))


def _scores(made: Plan, records: Records, metric: str, rises: bool) -> dict[str, Any]:
    missing = [task.label for task in made.tasks if records.get(task.policy) is None]
    if missing:
        raise IncompleteError(
            f"search: {len(missing)} of {len(made.tasks)} measurements are not made yet, the first of them "
            f"{missing[0]!r}: run the other shards, then this again without a shard"
        )

    def value(task: Task | None) -> tuple[float, float]:
        if task is None:
            return base, 0.0
        found = records.get(task.policy)
        assert found is not None
        return found[metric]["value"], found["seconds"]

    base = 0.0
    base = value(made.base)[0]
    sign = -1 if rises else 1
    rows = [[value(task) for task in row] for row in made.alone]
    raw = tuple(tuple(number for number, _ in row) for row in rows)
    damages = tuple(tuple(max(sign * (number - base), 0.0) for number in row) for row in raw)
    probes = [
        Probe(label, o, max(sign * (value(task)[0] - base), 0.0), half=_half(records, task, made.base, metric))
        for label, o, task in made.probes
    ]
    surrogate, predicted = fit(damages, probes)
    notes = [note for task in made.tasks for note in (records.get(task.policy) or {})["notes"]]
    return {
        "groups": made.groups,
        "damages": damages,
        "raw": raw,
        "seconds": tuple(tuple(seconds for _, seconds in row) for row in rows),
        "base": base,
        "reference": made.reference,
        "metric": metric,
        "rises": rises,
        "surrogate": surrogate,
        "probes": predicted,
        "notes": tuple(dict.fromkeys(notes)),
        "total": len(made.tasks),
    }


def _half(records: Records, task: Task, base: Task, metric: str) -> float:
    """Half of what the samples leave open of a probe's damage."""
    one, other = ((records.get(which.policy) or {})[metric] for which in (task, base))
    return half_of_damage(metric, one, other)


def _check_metric(metric: str | Function, rises: bool | None) -> None:
    if not callable(metric) and metric not in METERS:
        raise RecoupError(
            f"search: metric {metric!r} must be one of {', '.join(map(repr, METERS))}, or a callable(model, batches)"
        )
    if callable(metric) and rises is None:
        raise RecoupError(f"search: metric {metric_name(metric)}: say rises=True if more of it is better, else False")


def _rises(metric: str | Function, rises: bool | None) -> bool:
    return METERS[metric].rises if isinstance(metric, str) else bool(rises)


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make a folder this search's, from before its first measurement on; refuse one of another.

    Raises:
        RecoupError: another search's, and what differs; what is no search's.
    """
    _refuse_other(folder / FILE, identity)
    claim, text = folder / CLAIM, json.dumps({"identity": identity}, indent=1) + "\n"
    if write_once(claim, text):
        return
    if not any((folder / RECORDS).glob("*.json")):  # the other one measured nothing
        write_atomically(claim, text)
    _refuse_other(claim, identity)


def _refuse_other(path: Path, identity: Mapping[str, Any]) -> None:
    try:
        before = json.loads(path.read_text("utf-8"))["identity"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecoupError(f"{path}: no scores of a search ({error}); choose another folder, or delete it") from None
    told = [f"{part.name} was {part.before!r}, is {part.now!r}" for part in differences(before, identity)]
    if told:
        raise RecoupError(f"{path.parent} holds a search of another kind ({'; '.join(told)}): choose another folder")
