"""Rows of results from stored measurements: accuracy, or nats and what they differ by window by window."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from recoup.network.wing import FLOAT, Baseline
from recoup.study.repairs import NONE
from recoup.study.results import AccuracyRow
from recoup.study.rows import DifferenceRow, NatsRow
from recoup.study.sources import difference_of, numbers_of


class Seeded(Protocol):
    """What a seed may decide."""

    @property
    def seed(self) -> int | None: ...


class Measurement(Seeded, Protocol):
    """What was measured: `recoup.study.runner.Task`."""

    @property
    def config(self) -> str: ...
    @property
    def state(self) -> str | None: ...
    @property
    def key(self) -> str: ...


S = TypeVar("S", bound=Seeded)
T = TypeVar("T", bound=Measurement)
Stored = Mapping[str, Any] | Any
"""Key -> plain values."""


def measured_rows(tasks: Sequence[Measurement], store: Stored, compared: Mapping[str, Baseline]) -> dict[str, Any]:
    """The fields of `recoup.study.Results` that hold what networks were judged by.

    Args:
        tasks: in the order of the rows; those without a state are no such rows.
        store: what was measured, by the tasks' keys.
        compared: what each hardware is compared with, as `recoup.study.hardware.references` gives it.
    """
    told = [task for task in tasks if task.state is not None]
    values = {task.key: store[task.key] for task in told}
    named = [
        ({"config": task.config, "state": task.state, "seed": task.seed, "seconds": values[task.key]["seconds"]}, task)
        for task in told
    ]
    if all("windows" not in value for value in values.values()):
        numbers = ("top1", "top5", "count")
        rows = [AccuracyRow(**own, **{name: values[task.key][name] for name in numbers}) for own, task in named]
        return {"accuracy": tuple(rows)}
    nats = tuple(NatsRow(**own, **numbers_of(values[task.key])) for own, task in named)
    return {"nats": nats, "differences": tuple(_differences(told, values, compared))}


def _differences(told: Sequence[T], values: Stored, compared: Mapping[str, Baseline]) -> list[DifferenceRow]:
    """Of every state against float, against its baseline, and repaired against bare."""
    groups: dict[tuple[str, str | None], list[T]] = {}
    for task in told:
        groups.setdefault((task.config, task.state), []).append(task)
    rows = []
    for (config, state), tasks in groups.items():
        baseline = compared[config].name if config in compared else FLOAT.name
        others = dict.fromkeys([(FLOAT.name, NONE), (baseline, NONE), (config, NONE)])
        for against in others:
            if against != (config, state) and against in groups:
                rows += [_row(one, other, values) for one, other in pairs(tasks, groups[against])]
    return rows


def _row(one: Measurement, other: Measurement, values: Stored) -> DifferenceRow:
    found = difference_of(values[one.key]["windows"], values[other.key]["windows"])
    named: dict[str, Any] = {"config": one.config, "state": str(one.state), "seed": one.seed, **found}
    return DifferenceRow(**named, against=other.config, against_state=str(other.state))


def pairs(ones: Sequence[S], others: Sequence[S]) -> list[tuple[S, S]]:
    """Measurements with the same seed; one that no seed decides is beside all."""
    theirs = {other.seed: other for other in others}
    if len(theirs) == 1:
        only = next(iter(theirs.values()))
        return [(one, only) for one in ones]
    if len(ones) == 1 and ones[0].seed is None:
        return [(ones[0], other) for other in theirs.values()]
    return [(one, theirs[one.seed]) for one in ones if one.seed in theirs]
