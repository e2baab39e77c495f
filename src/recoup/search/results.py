"""What a search found, as search.json holds it and its chapter of a report shows it."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from recoup.errors import RecoupError
from recoup.search.fronts import TUNED, Front, Measured, Point
from recoup.search.scoring import Scores
from recoup.search.surrogate import finite
from recoup.study.beside import Beside
from recoup.study.rows import Frozen

SCHEMA = 1


class GroupRow(Frozen):
    """Layers that decide together: the damage of each option alone."""

    name: str
    layers: tuple[str, ...]
    options: tuple[str, ...]
    damages: tuple[float, ...]


class ProbeRow(Frozen):
    """A whole network: predicted and measured damage."""

    label: str
    predicted: float
    measured: float


class PointRow(Frozen):
    """A policy of the front, or a uniform one; the measured numbers are null before it was verified.

    ``predicted``: null of a fine-tuned point, kind ``tuned``, which is another network and whose ``weights`` are named.
    ``lost``: points of top-1 or nats against float, on the same samples, with its interval; ``flips``: of top-1, how
    many images of each draw are right in float and wrong here, and the reverse; none where they are not known, by an
    older recoup: then the interval says less than it seems to. ``allowed``: whether it keeps every limit.
    """

    name: str
    kind: str
    on_front: bool
    options: tuple[int, ...]
    costs: Mapping[str, float]
    predicted: float | None
    damage: float | None = None
    low: float | None = None
    high: float | None = None
    reached: float | None = None
    reached_low: float | None = None
    reached_high: float | None = None
    lost: float | None = None
    lost_low: float | None = None
    lost_high: float | None = None
    flips: tuple[tuple[int, int], ...] = ()
    allowed: bool = True
    weights: str = ""


class SearchResults(Beside):
    """Everything a search found.

    Attributes:
        model, data: as the recipe names them.
        metric, repair: what damage is, and the plan applied before it is measured.
        groups: in the network's order.
        probes: whole networks, and ``error``: measured / predicted lies in [1/error, error] for all of them; null where
            it is infinite or fewer than two of them have damage.
        power, rank: of the surrogate.
        first: what the space's first option costs everywhere, for one image.
        points: cheapest first; uniform policies behind them.
        quality: ``top1`` or ``nats``, "" where neither was measured; ``floating``: the float network's.
        count: test samples or tokens; ``seeds``: draws of calibration images.
        budget, chosen: what may be lost, and the number of the cheapest point within it, null where there is none.
        uncounted: what multiplies and is in no cost.
        measurements, seconds: how many there are, and their CPU time.
        notes: what is in no energy and no area, and warnings.
        liberty: names of the cell library's files; none: areas are NAND2-equivalents.
    """

    file: ClassVar[str] = "search.json"
    what: ClassVar[str] = "the results of a search"
    chapter: ClassVar[str] = "recoup.report.chapters.search"
    name: ClassVar[str] = "search"

    schema_version: Literal[1] = SCHEMA
    date: str
    model: str
    data: str
    metric: str
    repair: str
    groups: tuple[GroupRow, ...]
    probes: tuple[ProbeRow, ...]
    power: float
    error: float | None
    rank: float | None
    trusted: bool
    costs: tuple[str, ...]
    first: Mapping[str, float]
    limits: Mapping[str, float]
    points: tuple[PointRow, ...]
    quality: str = ""
    sample: str = "image"
    floating: float | None = None
    count: int | None = None
    seeds: int = 0
    budget: float | None = None
    chosen: int | None = None
    uncounted: tuple[str, ...] = ()
    measurements: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    liberty: tuple[str, ...] = ()

    @property
    def front(self) -> list[PointRow]:
        """The points of the network that was scored that no other beats, each policy once."""
        found: dict[tuple[int, ...], PointRow] = {}
        for point in self.points:
            if point.on_front and point.kind != TUNED:
                found.setdefault(point.options, point)
        return list(found.values())

    @property
    def tuned(self) -> list[PointRow]:
        """The fine-tuned points."""
        return [point for point in self.points if point.kind == TUNED]


RESULTS = SearchResults
"""What `recoup.study.measures.beside` looks for."""


def results_of(
    found: Front,
    *,
    model: str,
    data: str,
    repair: str,
    budget: float | None,
    date: str,
    sample: str = "image",
    liberty: tuple[str, ...] = (),
) -> SearchResults:
    """A front with its scores as rows."""
    scores = found.scores
    floating = found.floating
    quality = "" if floating is None else floating.quality
    return SearchResults(
        date=date,
        model=model,
        data=data,
        metric=scores.metric,
        repair=repair,
        groups=tuple(_groups(scores)),
        probes=tuple(ProbeRow(label=p.label, predicted=p.predicted, measured=p.measured) for p in scores.probes),
        error=finite(scores.surrogate.error),
        **{name: getattr(scores.surrogate, name) for name in ("power", "rank", "trusted")},
        costs=found.costs,
        first=dict(found.first),
        limits=dict(found.limits),
        points=tuple(map(_row, found.points, found.standing)),
        quality=quality,
        sample=sample,
        floating=floating.reached if floating is not None and quality else None,
        count=None if floating is None else floating.count,
        seeds=found.seeds,
        budget=budget if quality else None,
        chosen=_chosen(found, budget) if quality and budget is not None else None,
        uncounted=tuple(f"{part.name} ({part.kind})" for part in scores.sizes.uncounted),
        measurements=scores.total + found.refined + found.total,
        seconds=round(sum(map(sum, scores.seconds)), 3),
        notes=tuple(dict.fromkeys((*scores.notes, *found.notes))),
        liberty=liberty,
    )


def _chosen(found: Front, budget: float) -> int | None:
    try:
        return found.points.index(found.within(budget))
    except RecoupError:
        return None


def _groups(scores: Scores) -> list[GroupRow]:
    rows = zip(scores.groups, scores.damages, strict=True)
    return [GroupRow(name=g.name, layers=g.layers, options=tuple(g.titles()), damages=damages) for g, damages in rows]


def _row(point: Point, on_front: bool) -> PointRow:
    named: dict[str, Any] = {
        "name": point.policy.name,
        "kind": point.kind,
        "on_front": on_front,
        "allowed": point.allowed,
        "options": point.options,
        "predicted": point.predicted if point.tuned is None else None,
        "weights": "" if point.tuned is None else point.tuned.weights,
    }
    return PointRow(**named, costs=dict(point.costs), **_numbers(point.measured))


def _numbers(found: Measured | None) -> dict[str, Any]:
    if found is None:
        return {}
    numbers = {"damage": found.damage, "low": found.low, "high": found.high}
    reached = {"reached": found.reached, "reached_low": found.quality_low, "reached_high": found.quality_high}
    reached |= {name: getattr(found, name) for name in ("lost", "lost_low", "lost_high")}
    return numbers | {name: value for name, value in reached.items() if not math.isnan(value)} | {"flips": found.flips}
