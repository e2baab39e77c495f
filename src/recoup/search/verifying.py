"""Every point of a front measured on test batches, after repair, with intervals."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.evaluation import Function
from recoup.network.batches import call, count, device_of, split
from recoup.network.checks import instance, is_module
from recoup.network.meters import METERS
from recoup.network.modes import evaluating
from recoup.network.replay import Outputs, memory
from recoup.search.bench import Bench, kept, laid_out, metric_name, needing_scales
from recoup.search.fronts import Front, Measured
from recoup.search.joining import measure_tuned
from recoup.search.pairing import flips, half_of, loss
from recoup.search.records import Records, Task
from recoup.storage.digest import of_batches, of_state
from recoup.study.intervals import accuracy, of_windows
from recoup.tasks.bench import Value
from recoup.tasks.performing import Progress, check_division, perform
from recoup.tasks.shards import IncompleteError, Shard

Draw = Callable[[int], Iterable[Any]]
"""A seed -> calibration batches."""

Made = tuple[str, Value | None]
"""A measurement's key, and its numbers if it was made."""


def verify(
    front: Front,
    model: nn.Module,
    test: Iterable[Any],
    *,
    seeds: int | Sequence[int] = 3,
    calibration: Iterable[Any] | Draw | None = None,
    metric: str | Function | None = None,
    out: str | Path | None = None,
    executor: Executor | None = None,
    workers: int = 1,
    shard: Shard | None = None,
    any_cpu: bool = False,
    progress: Progress | None = None,
) -> Front:
    """Measure every point of a front, uniform policies too, on batches that the scores did not see.

    Args:
        front: from `recoup.search.front`, with what `recoup.search.refine` and `recoup.search.join` added.
        model: in float, the one that was scored.
        test: labelled, to say what is won or lost in top-1 or nats.
        seeds: draws of calibration images, or their seeds. From ``calibration`` batches the first draw is the batches
            as they are, whatever its seed; each further one takes as many samples with replacement.
        calibration: a function seed -> batches, or batches; None: those of the scores.
        metric: the scores' own, needed again only where that is a callable.
        out, executor, workers, shard, any_cpu, progress: as in `recoup.search.score`.

    Returns:
        The front with what was measured; its `Front.front` is that of the measured points.

    Raises:
        RecoupError: another network, test batches that were scored on, seeds that are none or given twice, a metric
            that gives NaN.
    """
    instance(front, Front, "search.verify", "front", "what recoup.search.front returned")
    is_module(model, "search.verify")
    check_division("search.verify", workers, executor, shard)
    test = laid_out(model, kept(test))
    _check(front, model, test)
    numbers, scores = _seeds(seeds), front.scores
    named = named_metric(scores.metric, metric, "verify")
    quality = _quality(model, test)
    metrics = list(dict.fromkeys([named, quality])) if quality else [named]
    scaled = needing_scales({layer: group.options for group in scores.groups for layer in group.layers})
    made, tasks = 0, _tasks(front)
    kept_in, outputs, folder = list[Records](), Outputs(memory(workers)), None if out is None else Path(out)
    tuned, stores = list[list[Made]](), dict[str, Records]()
    how: dict[str, Any] = {"executor": executor, "workers": workers, "shard": shard, "progress": progress}
    for images in _draws(scores.calibration if calibration is None else calibration, numbers):
        bench = Bench(model, test, metrics, images, scores.identity["repair"], scaled, outputs)
        kept_in.append(Records(folder, bench.identity(), any_cpu=any_cpu))
        made += perform(bench, tasks, kept_in[-1], **how)
        owns, more = measure_tuned(front.tuned, model, bench, stores, folder, any_cpu=any_cpu, **how)
        made, tuned = made + more, [*tuned, [(own.key, own.value) for own in owns]]
    total = len(numbers) * len({json.dumps(task.policy) for task in tasks}) + len({k for row in tuned for k, _ in row})
    found = _by_point(front, tasks, kept_in, tuned)
    told = [_measured(values, found[0], metric_name(named), quality, rises=scores.rises) for values in found]
    points = tuple(replace(point, measured=one) for point, one in zip(front.points, told[1:], strict=True))
    notes = (*front.notes, *_notes(found))
    return replace(front, points=points, floating=told[0], seeds=len(numbers), made=made, total=total, notes=notes)


def _tasks(front: Front) -> list[Task]:
    """Of the float network, and of every point of the network that was scored."""
    scored = [point for point in front.points if point.tuned is None]
    return [Task.of("float", {}), *(Task.of(point.policy.name, dict(point.policy)) for point in scored)]


def _by_point(
    front: Front, tasks: Sequence[Task], kept_in: Sequence[Records], tuned: Sequence[Sequence[Made]]
) -> list[list[Value]]:
    """What was measured of the float network, which is the first task, and of every point, draw by draw."""
    floats, *rest = [_values(task.label, [records.get(task.policy) for records in kept_in]) for task in tasks]
    own = zip(front.tuned, zip(*tuned, strict=True), strict=True) if front.tuned else ()
    ordinary, others = iter(rest), iter([_values(point.policy.name, [v for _, v in made]) for point, made in own])
    return [floats, *(next(ordinary if point.tuned is None else others) for point in front.points)]


def _notes(found: Sequence[Sequence[Value]]) -> tuple[str, ...]:
    """Warnings of all measurements, each once."""
    return tuple(dict.fromkeys(note for values in found for value in values for note in value["notes"]))


def _seeds(seeds: Any) -> tuple[int, ...]:
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        seeds = range(seeds)
    listed: tuple[Any, ...] = tuple(seeds) if isinstance(seeds, Sequence) else ()
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) for seed in listed)
    if not listed or not whole or len(set(listed)) < len(listed):
        raise RecoupError(
            f"search: verify: seeds={seeds!r}: seeds must be one draw or more, or a list of whole numbers that differ"
        )
    return listed


def _values(label: str, values: Sequence[Value | None]) -> list[Value]:
    """A policy's measurements, one a draw, if all are there."""
    if None in values:
        raise IncompleteError(
            f"search: measurements of the front are not made yet, such as {label!r}: run the other shards, then "
            "this again without a shard"
        )
    return [value for value in values if value is not None]


def _check(front: Front, model: nn.Module, test: Iterable[Any]) -> None:
    if of_state(model) != front.scores.identity["weights"]:
        raise RecoupError("search: verify: the model's weights are not those that were scored")
    if of_batches(test) == front.scores.identity["data"]:
        raise RecoupError(
            "search: verify: the test batches are those that were scored on; take samples not seen before"
        )


def named_metric(scored: str, metric: str | Function | None, what: str) -> str | Function:
    """The metric that some scores are of; a callable must be given again.

    Raises:
        RecoupError: another, or none where a callable is needed, headed by ``what``.
    """
    if metric is not None and metric_name(metric) != scored:
        raise RecoupError(f"search: {what}: the scores' metric is {scored}, not {metric_name(metric)}")
    if metric is None and scored not in METERS:
        raise RecoupError(f"search: {what}: the scores' metric {scored} is a function: pass it as metric= again")
    return scored if metric is None else metric


def _quality(model: nn.Module, test: Iterable[Any]) -> str:
    """The natural measure of the first batch: labels of classes, of following tokens, or neither."""
    inputs, label = split(next(iter(test)))
    device = device_of(model)
    with evaluating(model), torch.no_grad():
        moved = {k: v.to(device) for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs.to(device)
        output = call(model, moved)
    if not isinstance(label, Tensor) or not isinstance(output, Tensor) or label.is_floating_point():
        return ""
    return "" if output.shape[:-1] != label.shape else "top1" if output.dim() == 2 else "nats"


def _draws(calibration: Iterable[Any] | Draw, seeds: Sequence[int]) -> list[Iterable[Any]]:
    if callable(calibration):
        return [calibration(seed) for seed in seeds]
    batches = kept(calibration)
    return [batches if number == 0 else resampled(batches, seed) for number, seed in enumerate(seeds)]


def resampled(batches: Iterable[Any], seed: int) -> list[Any]:
    """As many inputs drawn with replacement, in batches of the same sizes, without labels.

    Raises:
        RecoupError: inputs whose shapes differ, which cannot be drawn from together.
    """
    inputs = [split(batch)[0] for batch in batches]
    sizes = [count(one) for one in inputs]
    drawn = torch.randint(sum(sizes), (sum(sizes),), generator=torch.Generator().manual_seed(seed))

    def of(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        try:
            return torch.cat(list(parts))[drawn].split(sizes)
        except RuntimeError:
            raise RecoupError(
                "search: verify: calibration batches of several shapes cannot be resampled: pass calibration as a "
                "function of the seed, or seeds=1"
            ) from None

    if isinstance(inputs[0], Mapping):
        columns = {name: of([one[name] for one in inputs]) for name in inputs[0]}
        return [{name: column[number] for name, column in columns.items()} for number in range(len(sizes))]
    return list(of(inputs))


def _measured(values: Sequence[Value], floats: Sequence[Value], name: str, quality: str, *, rises: bool) -> Measured:
    """A policy's measurements, one a draw, beside the float network's."""
    ones, others = ([value[name] for value in part] for part in (values, floats))
    damage = loss(name, ones, others, rises=rises)
    sign = -1 if rises else 1
    damages = tuple(sign * (one["value"] - other["value"]) for one, other in zip(ones, others, strict=True))
    about: dict[str, Any] = {"damage": fmean(damages), "low": damage.low, "high": damage.high, "values": damages}
    if not quality:
        return Measured(**about, count=ones[0]["count"])
    ones, others = ([value[quality] for value in part] for part in (values, floats))
    numbers, samples = [one["value"] for one in ones], ones[0]["count"]
    top1 = quality == "top1"
    found = accuracy(numbers, samples) if top1 else of_windows(numbers, [half_of(one) for one in ones])
    lost = loss(quality, ones, others, rises=top1)
    reached: dict[str, Any] = {"reached": fmean(numbers), "quality_low": found.low, "quality_high": found.high}
    told: dict[str, Any] = {"lost": lost.mean, "lost_low": lost.low, "lost_high": lost.high}
    told["flips"] = tuple((one.lost, one.won) for one in flips(ones, others)) if top1 else ()
    return Measured(**about, quality=quality, **reached, **told, count=samples)
