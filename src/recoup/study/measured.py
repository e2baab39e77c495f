"""Rows of results from stored measurements: accuracy or nats, and what they differ by sample by sample."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from recoup.errors import RecoupError
from recoup.network.answers import Answers
from recoup.network.wing import FLOAT, Baseline
from recoup.study.repairs import NONE
from recoup.study.results import AccuracyRow
from recoup.study.rows import DifferenceRow, FlipsRow, NatsRow
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
        flips = [row for pairs in _compared(told, compared) for row in _flips(pairs, values)]
        return {"accuracy": tuple(rows), "flips": tuple(flips)}
    nats = tuple(NatsRow(**own, **numbers_of(values[task.key])) for own, task in named)
    differences = [_row(one, other, values) for pairs in _compared(told, compared) for one, other in pairs]
    return {"nats": nats, "differences": tuple(differences)}


def unpaired(tasks: Sequence[Measurement], store: Stored) -> list[str]:
    """Why accuracies are not compared image by image, as far as they are not: notes for the results."""
    measured = {task.key: store[task.key] for task in tasks if task.state is not None}
    kept = [answers.samples for key in measured if (answers := _answers(key, measured)) is not None]
    found, bare = [], sum("top1" in value and "answers" not in value for value in measured.values())
    if bare:
        found.append(
            f"{bare} of {len(measured)} measurements were made by an older recoup, which kept no answers image by "
            "image: differences from them have the widest interval that the accuracies allow. --overwrite measures "
            "them again."
        )
    if len(set(kept)) > 1:
        found.append(
            "The test images, or their order, changed while this was measured, so not all answers can be compared "
            "image by image: differences have the widest interval that the accuracies allow. --overwrite measures all "
            "again."
        )
    return found


def _compared(told: Sequence[T], compared: Mapping[str, Baseline]) -> Iterator[list[tuple[T, T]]]:
    """Every state with float, with its baseline, and repaired with bare, seed by seed."""
    groups: dict[tuple[str, str | None], list[T]] = {}
    for task in told:
        groups.setdefault((task.config, task.state), []).append(task)
    for (config, state), tasks in groups.items():
        baseline = compared[config].name if config in compared else FLOAT.name
        others = dict.fromkeys([(FLOAT.name, NONE), (baseline, NONE), (config, NONE)])
        for against in others:
            if against != (config, state) and against in groups:
                yield pairs(tasks, groups[against])


def _row(one: Measurement, other: Measurement, values: Stored) -> DifferenceRow:
    found = difference_of(values[one.key]["windows"], values[other.key]["windows"])
    return DifferenceRow(**{**_named(one, other), **found})


def _flips(together: Sequence[tuple[T, T]], values: Stored) -> list[FlipsRow]:
    """A row a seed; none where the answers of a seed were not kept, or are not to the same images."""
    rows = []
    for one, other in together:
        now, before = (_answers(task.key, values) for task in (one, other))
        if now is None or before is None or not now.samples or now.samples != before.samples:
            return []
        found = now.flips(before)
        low, high = found.interval
        numbers = {"lost": found.lost, "won": found.won, "count": found.count, "low": low, "high": high}
        rows.append(FlipsRow(**_named(one, other), **numbers))
    return rows


def _answers(key: str, values: Stored) -> Answers | None:
    """What a measurement kept of every image; None of an older recoup's."""
    if "answers" not in values[key]:
        return None
    try:
        return Answers.from_dict(values[key]["answers"])
    except RecoupError as error:
        raise RecoupError(f"study: measurement {key!r}: {error}") from None


def _named(one: Measurement, other: Measurement) -> dict[str, Any]:
    own = {"config": one.config, "state": str(one.state), "seed": one.seed}
    return own | {"against": other.config, "against_state": str(other.state)}


def pairs(ones: Sequence[S], others: Sequence[S]) -> list[tuple[S, S]]:
    """Measurements with the same seed; one that no seed decides is beside all."""
    theirs = {other.seed: other for other in others}
    if len(theirs) == 1:
        only = next(iter(theirs.values()))
        return [(one, only) for one in ones]
    if len(ones) == 1 and ones[0].seed is None:
        return [(ones[0], other) for other in theirs.values()]
    return [(one, theirs[one.seed]) for one in ones if one.seed in theirs]
