"""The front: for every budget the policy of least predicted damage, by a knapsack a point; nothing is measured."""

import csv
import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from recoup.errors import RecoupError, RecoupWarning
from recoup.knapsack import Quantity
from recoup.network.checks import instance
from recoup.network.systolic import Array
from recoup.policy import Policy
from recoup.search.prices import CostFunction, Program, affordable
from recoup.search.scoring import Scores
from recoup.search.spaces import policy_of, titles, uniform
from recoup.storage.files import write_atomically

TABLE = "front.csv"
TUNED = "tuned"
"""The kind of fine-tuned points."""
SAME = 1e-12  # relative: damages that differ by less are equal
FINEST = 2.0**-28  # of the largest damage: what the knapsack's solver, whose tolerance is 1e-9 of it, can tell apart


@dataclass(frozen=True, slots=True)
class Measured:
    """What a policy's networks did on the test batches.

    Attributes:
        damage: mean over draws of the score's metric (of a relative one; else of its loss against float).
        low, high: its 95 % interval: the test samples' and, with several draws, the draws'.
        values: of each draw.
        count: test samples or tokens.
        quality: name of the natural measure, ``top1`` or ``nats``; "" where the labels fit neither.
        reached, quality_low, quality_high: it and its interval.
        lost, lost_low, lost_high: what is worse than in float, on the same samples, and its interval: points of top-1,
            paired image by image, or nats, paired window by window.
        flips: of top-1, images that are right in float and wrong here, and the reverse, of each draw; none where
            answers were not kept: then the interval is the widest that the accuracies allow.
    """

    damage: float
    low: float
    high: float
    values: tuple[float, ...]
    count: int
    quality: str = ""
    reached: float = math.nan
    quality_low: float = math.nan
    quality_high: float = math.nan
    lost: float = math.nan
    lost_low: float = math.nan
    lost_high: float = math.nan
    flips: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Tuned:
    """The network of a fine-tuned point.

    Attributes:
        network: in float.
        repair: a plan of `recoup.repair_`, applied before it is measured.
        weights: where they are from, for tables.
    """

    network: nn.Module
    repair: str | Sequence[str] = "none"
    weights: str = ""


@dataclass(frozen=True, slots=True)
class Point:
    """A policy, what it costs, what damage is predicted and what was measured.

    Attributes:
        policy: every layer by name.
        options: of each group; none where a fine-tuned point's policy is not in the space.
        costs: totals of the network for one image.
        predicted: damage in the metric of the scores; NaN of a fine-tuned point, whose network was not scored.
        kind: ``front``; ``uniform``: the same option wherever there is one; ``refined``: of `recoup.search.refine`;
            ``tuned``: of `recoup.search.join`.
        allowed: whether it keeps every limit; a uniform policy that does not is there to compare with.
        measured: None before `recoup.search.verifying.verify`.
        scored: damage on the batches that were scored on, of the whole network; of refined points alone.
        tuned: the network of a fine-tuned point; None: the one that was scored.
    """

    policy: Policy
    options: tuple[int, ...]
    costs: Mapping[str, float]
    predicted: float
    kind: str = "front"
    allowed: bool = True
    measured: Measured | None = None
    scored: float | None = None
    tuned: Tuned | None = field(default=None, repr=False)

    @property
    def damage(self) -> float:
        """As measured on test batches, else on the scored ones, else as predicted."""
        if self.measured is not None:
            return self.measured.damage
        return self.predicted if self.scored is None else self.scored


@dataclass(frozen=True)
class Front:
    """Policies from cheap to harmless.

    Attributes:
        points: of the front, cheapest first by the first cost, the uniform policies behind them, then refined and
            fine-tuned ones.
        scores: that they were found with.
        costs: names of the costs; the first is the one that was swept first.
        first: what the space's first option costs everywhere.
        limits: absolute.
        floating: what the float network reached on the test batches; None before they were measured.
        seeds: draws of calibration images.
        made, total: measurements that `recoup.search.verify` made, and how many there are.
        refined: networks of the walk of `recoup.search.refine`.
        notes: what is in no energy and no area, and warnings of recoup's during the measurements.
        program: costs and limits, for `recoup.search.refine`.
    """

    points: tuple[Point, ...]
    scores: Scores = field(repr=False)
    costs: tuple[str, ...]
    first: Mapping[str, float]
    limits: Mapping[str, float]
    floating: Measured | None = None
    seeds: int = 0
    made: int = 0
    total: int = 0
    refined: int = 0
    notes: tuple[str, ...] = ()
    program: Program | None = field(default=None, repr=False)

    @property
    def policies(self) -> list[Policy]:
        """Of the front, cheapest first."""
        return [point.policy for point in self.front]

    @property
    def front(self) -> list[Point]:
        """The points within the limits that no other of them beats in every cost and in damage, cheapest first; uniform
        policies among them, fine-tuned points, which are other networks, not."""
        names = list(self.costs)
        able = [point for point in self.points if point.allowed and point.tuned is None]
        left = [p for p in able if not any(_beats(q, p, names) for q in able)]
        unique = {p.options: p for p in reversed(left)}
        return sorted(unique.values(), key=lambda p: [*(p.costs[name] for name in names), p.damage])

    @property
    def uniform(self) -> list[Point]:
        """The policies with one option wherever there is one."""
        return [point for point in self.points if point.kind == "uniform"]

    @property
    def tuned(self) -> list[Point]:
        """The fine-tuned points."""
        return [point for point in self.points if point.tuned is not None]

    @property
    def standing(self) -> list[bool]:
        """Of every point, whether it is on the front; a fine-tuned one, if no other within the limits loses less at no
        more cost: training moves a network away from the float one, so that damage says nothing of it."""
        ordinary = {point.options for point in self.front}
        able = [point for point in self.points if point.allowed and point.measured is not None]

        def unbeaten(point: Point) -> bool:
            return point in able and not any(_beats(one, point, self.costs, self._harm) for one in able)

        return [p.options in ordinary if p.tuned is None else unbeaten(p) for p in self.points]

    def _harm(self, point: Point) -> float:
        return point.damage if point.measured is None or not point.measured.quality else self.lost(point)

    def within(self, budget: float) -> Point:
        """The cheapest measured point that loses at most ``budget``: points of top-1, or nats. Fine-tuned ones are
        among them; at equal cost one that was not is taken.

        Raises:
            RecoupError: a budget below 0 or NaN, nothing measured, no point within it; the best is named.
        """
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget >= 0:
            raise RecoupError(f"search: budget={budget!r} must be a number of 0 or more")
        shown = [*self.front, *(point for point in self.tuned if point.allowed)]
        able = [point for point in shown if point.measured is not None and point.measured.quality]
        if not able or self.floating is None:
            raise RecoupError("search: a budget is about measured points: verify the front first, on labelled batches")
        good = [point for point in able if self.lost(point) <= budget]
        if not good:
            best = min(able, key=self.lost)
            raise RecoupError(
                f"search: no policy loses at most {budget:g}; the least is {self.lost(best):.4g}, with "
                f"{_told(best.costs)}"
            )
        return min(good, key=lambda point: [*(point.costs[name] for name in self.costs), point.tuned is not None])

    def lost(self, point: Point) -> float:
        """What a measured point loses against float: points of top-1, or nats."""
        assert point.measured is not None
        assert self.floating is not None
        loss = self.floating.reached - point.measured.reached
        return loss if point.measured.quality == "top1" else -loss

    def save(self, folder: Path) -> list[Path]:
        """Write front.csv and policy-NN.yaml, numbered in the table's order."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        measured = ["damage", "low", "high", "quality", "reached", "quality_low", "quality_high"]
        measured += ["lost", "lost_low", "lost_high"]
        writer.writerow(["point", "kind", "on_front", *self.costs, "predicted", "scored", *measured])
        paths = []
        for number, (point, standing) in enumerate(zip(self.points, self.standing, strict=True)):
            found = [] if point.measured is None else [getattr(point.measured, name) for name in measured]
            costs = [point.costs[name] for name in self.costs]
            predicted = None if point.tuned is not None else point.predicted
            row = [number, point.kind, standing, *costs, predicted, point.scored, *found]
            writer.writerow(row)
            paths.append(folder / f"policy-{number:02}.yaml")
            point.policy.save(paths[-1])
        write_atomically(folder / TABLE, out.getvalue())
        return [folder / TABLE, *paths]


def front(
    scores: Scores,
    cost: str | CostFunction | Sequence[str | CostFunction] = "cycles",
    *,
    limits: Mapping[str, Any] | None = None,
    points: int = 12,
    array: Array | None = None,
    liberty: str | Path | Sequence[str | Path] | None = None,
) -> Front:
    """The policies of least predicted damage for a sweep of budgets, and the uniform ones beside them.

    For every cost asked for, budgets run evenly from the cheapest policy to the cheapest of least damage, and through
    the costs of the uniform policies; each is one knapsack, and a second one takes the cheapest of the policies with
    that damage.

    Args:
        scores: from `recoup.search.score`.
        cost: names (cycles, traffic, bits, energy, area) or functions ``cost(site, config)``; several: a sweep of
            each. Energy and area are those of `recoup.cost`; an area has every unit of the die once.
        limits: cost -> the most it may be, relative to the first option everywhere (for area: its die), or absolute
            with a unit ("2e6 cycles", "1.2 mm2", "3 uJ"; areas without ``liberty`` in "NAND2").
        points: budgets a cost.
        array: that cycles are counted on, and whose elements have area; 16 x 16 by default.
        liberty: cell library of energies and areas, as in `recoup.cost`.

    Raises:
        RecoupError: a cost or a limit that is none; an option without energy or area where that is asked for; limits
            that no policy keeps: the cheapest is named.
    """
    instance(scores, Scores, "search.front", "scores", "what recoup.search.score returned")
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise RecoupError(f"search: points={points!r} must be a whole number of 2 or more")
    program = affordable(scores.groups, scores.sizes, cost, limits, array, scores.most_units, liberty)
    priced = program.priced
    solver = _Solver(scores, program)
    found: dict[tuple[int, ...], str] = {}
    for name in priced.quantities:
        for options in solver.sweep(name, points):
            found.setdefault(options, "front")
    ordered = sorted(found, key=lambda options: [*priced.of(options).values()])
    named = [(options, "front", "") for options in ordered]
    same = uniform(scores.groups)
    named += [(same[option], "uniform", label) for option, label in titles(same).items()]
    made = tuple(_point(scores, program, *one, number) for number, one in enumerate(named))
    about = {"notes": priced.notes, "program": program}
    return Front(made, scores, tuple(priced.quantities), priced.first, program.most, **about)


def _point(scores: Scores, program: Program, options: tuple[int, ...], kind: str, label: str, number: int) -> Point:
    policy = policy_of(scores.groups, options, label or f"point {number:02}")
    allowed = kind != "uniform" or program.allows(options)
    return Point(policy, options, program.priced.of(options), scores.predict(options), kind, allowed)


class _Solver:
    """Knapsacks over the groups of some scores."""

    def __init__(self, scores: Scores, program: Program) -> None:
        self.scores, self.priced, self.choose = scores, program.priced, program.choose
        self.damage = _told_apart(scores.surrogate.quantity(scores.damages))

    def sweep(self, name: str, points: int) -> list[tuple[int, ...]]:
        """Choices for budgets of one cost."""
        cost = self.priced.quantities[name]
        cheapest = self.choose(cost)
        best = self._cheapest_of_least_damage(cost, None)
        assert cheapest is not None
        assert best is not None
        low, high = cheapest.value, self.priced.one(name, best)
        budgets = [low + (high - low) * step / (points - 1) for step in range(points)]
        budgets += [self.priced.one(name, options) for options in uniform(self.scores.groups).values()]
        found = (self._cheapest_of_least_damage(cost, min(b, high)) for b in sorted(set(budgets)) if b >= low)
        return list(dict.fromkeys(options for options in found if options is not None))

    def _cheapest_of_least_damage(self, cost: Quantity, budget: float | None) -> tuple[int, ...] | None:
        bound = [] if budget is None else [(cost, budget)]
        least = self.choose(self.damage, bound)
        if least is None:
            return None
        try:
            cheap = self.choose(cost, [*bound, (self.damage, least.value * (1 + SAME))])
        except RecoupError as error:  # the solver cannot tell what has this damage, or not in time
            warnings.warn(
                f"search: a point of the front has the least damage, but may not be the cheapest with it: {error}",
                RecoupWarning,
                stacklevel=4,
            )
            cheap = None
        return least.options if cheap is None else cheap.options


def _told_apart(damage: Quantity) -> Quantity:
    """Rounded to what the solver can tell apart, so that options of negligible damage have the same."""
    grid = FINEST * max(map(max, damage.each))
    return Quantity([[round(value / grid) * grid for value in row] for row in damage.each]) if grid else damage


def _beats(
    one: Point, other: Point, costs: Sequence[str], harm: Callable[[Point], float] = lambda point: point.damage
) -> bool:
    """At least as good in everything and better in something."""
    pairs = [(one.costs[name], other.costs[name]) for name in costs] + [(harm(one), harm(other))]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _told(costs: Mapping[str, float]) -> str:
    return ", ".join(f"{value:,.6g} {name}" for name, value in costs.items())
