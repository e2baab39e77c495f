"""Coordinate moves where damages do not add up: from one policy to cheaper ones, every step measured."""

import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

from torch import nn

from recoup.errors import RecoupError, RecoupWarning
from recoup.evaluation import Function
from recoup.network.checks import instance, is_module
from recoup.network.replay import Outputs, memory
from recoup.search.bench import Bench, kept, needing_scales
from recoup.search.fronts import Front, Point
from recoup.search.records import Task
from recoup.search.scoring import Scores
from recoup.search.spaces import policy_of
from recoup.search.verifying import named_metric
from recoup.tasks.performing import Progress, check_division, perform

BESIDE = 4
"""Moves that a step measures: those that the damages of single groups say are best."""
ENOUGH = 40
"""Networks that are measured where nobody says how many."""
STUCK = (
    "search: refine: no change of one group lowers the {cost} of {start} within the limits, so nothing was measured; "
    "an area falls only when the last layer leaves a unit: refine by another cost"
)

Options = tuple[int, ...]


def refine(
    front: Front,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    start: Point | None = None,
    moves: int = ENOUGH,
    metric: str | Function | None = None,
    executor: Executor | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Front:
    """Walk from a policy to ever cheaper ones, a group at a time, by measured damage.

    A knapsack trusts that damages add up. Here a step measures whole networks on the batches that were scored on: of
    the changes of one group that lower the first cost and keep the limits, the four whose one-group damage rises least
    per cost saved; the one whose *measured* damage rises least per cost saved is taken, and is a point. The walk ends
    where no change is left or ``moves`` networks were measured. (The rule is ours.)

    A step depends on the one before, so the work has no shards; the four of a step may be made at once.

    Args:
        front: from `recoup.search.front` or `recoup.search.verify`; its limits hold here.
        model: in float, the one that was scored.
        batches: those that were scored on.
        start: where the walk begins, such as ``front.within(0.5)``; None: the least harmful of the uniform policies
            that keep the limits, of equals the cheapest.
        moves: networks that may be measured, finished ones of an earlier run among them.
        metric: the scores' own, needed again only where that is a callable.
        executor, workers, progress: as in `recoup.search.score`.

    Returns:
        The front with the points of the walk, kind ``refined``, behind the others; their ``scored`` is what was
        measured. `recoup.search.verify` measures them on test batches like all others.

    Raises:
        RecoupError: moves that are none, another network, other batches or another metric than the scores', a start
            that was fine-tuned, no start and no uniform policy within the limits.
    """
    instance(front, Front, "search.refine", "front", "what recoup.search.front returned")
    is_module(model, "search.refine")
    check_division("search.refine", workers, executor)
    if isinstance(moves, bool) or not isinstance(moves, int) or moves < 1:
        raise RecoupError(f"search: refine: moves={moves!r} must be a whole number of 1 or more")
    begin = (
        _least_harmful(front) if start is None else instance(start, Point, "search.refine", "start", "front.front[0]")
    )
    if begin.tuned is not None:
        raise RecoupError(
            f"search: refine: start={begin.policy.name!r} is fine-tuned, another network than the one that was scored"
        )
    walk = _Walk(front, _bench(front.scores, model, batches, metric, workers), moves)
    how = {"executor": executor, "workers": workers, "progress": progress}
    if not walk.near(begin.options):
        told = STUCK.format(cost=walk.cost, start=begin.policy.name)
        warnings.warn(told, RecoupWarning, stacklevel=2)
        return replace(front, notes=(*front.notes, told))
    steps = [step for step in walk.path(begin.options, how) if step not in {point.options for point in front.points}]
    points = (*front.points, *(walk.point(options, number) for number, options in enumerate(steps, 1)))
    return replace(front, points=points, refined=len(walk.records) - front.scores.total)


def _least_harmful(front: Front) -> Point:
    able = [point for point in front.uniform if point.allowed]
    if not able:
        raise RecoupError("search: refine: no uniform policy keeps every limit: say which point to start from")
    return min(able, key=lambda point: [point.predicted, point.costs[front.costs[0]]])


def _bench(
    scores: Scores, model: nn.Module, batches: Iterable[Any], metric: str | Function | None, workers: int
) -> Bench:
    """What scored, again."""
    named = named_metric(scores.metric, metric, "refine")
    scaled = needing_scales({layer: group.options for group in scores.groups for layer in group.layers})
    outputs = Outputs(memory(workers))
    bench = Bench(model, kept(batches), (named,), scores.calibration, scores.identity["repair"], scaled, outputs)
    other = [name for name, value in bench.identity().items() if scores.identity[name] != value]
    if other:
        raise RecoupError(f"search: refine: not what was scored: {', '.join(other)} differ")
    return bench


class _Walk:
    """Measures policies on the scored batches, each once, and steps from one to the next."""

    def __init__(self, front: Front, bench: Bench, moves: int) -> None:
        assert front.program is not None
        assert front.scores.records is not None
        self.scores, self.program, self.records = front.scores, front.program, front.scores.records
        self.cost, self.bench, self.left = front.costs[0], bench, moves
        self.measured: dict[Options, float] = {}

    def path(self, options: Options, how: dict[str, Any]) -> list[Options]:
        """Where the walk comes by, the beginning first."""
        self._measure([options], how)
        found = [options]
        while near := self.near(found[-1])[: self.left]:
            self._measure(near, how)
            here = found[-1]
            found.append(min(near, key=lambda step: self._rise(here, step)))
        return found

    def point(self, options: Options, number: int) -> Point:
        """A step as a point of the front."""
        policy = policy_of(self.scores.groups, options, f"refined {number:02}")
        priced = self.program.priced.of(options)
        return Point(policy, options, priced, self.scores.predict(options), "refined", scored=self.measured[options])

    def near(self, here: Options) -> list[Options]:
        """The most promising changes of one group."""
        every = (
            (group, option, (*here[:group], option, *here[group + 1 :]))
            for group, row in enumerate(self.scores.damages)
            for option in range(len(row))
        )
        costs, now = self._cost, self._cost(here)
        moves = [
            ((self.scores.damages[group][option] - self.scores.damages[group][here[group]]) / (now - costs(step)), step)
            for group, option, step in every
            if costs(step) < now
        ]
        allowed = (step for _, step in sorted(moves) if self.program.allows(step))
        return [step for step, _ in zip(allowed, range(BESIDE), strict=False)]

    def _cost(self, options: Options) -> float:
        return self.program.priced.one(self.cost, options)

    def _rise(self, here: Options, step: Options) -> float:
        return (self.measured[step] - self.measured[here]) / (self._cost(here) - self._cost(step))

    def _measure(self, policies: Sequence[Options], how: dict[str, Any]) -> None:
        new = [options for options in policies if options not in self.measured]
        tasks = [Task.of(f"move {self._told(options)}", policy_of(self.scores.groups, options)) for options in new]
        perform(self.bench, tasks, self.records, **how)
        self.left -= len(new)
        sign = -1 if self.scores.rises else 1
        for options, task in zip(new, tasks, strict=True):
            value = self.records.get(task.policy)
            assert value is not None
            raw = value[self.scores.metric]["value"]
            self.measured[options] = max(sign * (raw - self.scores.base), 0.0)

    def _told(self, options: Options) -> str:
        return f"to {self._cost(options):,.6g} {self.cost}"
