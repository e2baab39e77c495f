"""A search's part of a report: the front against uniform policies, damages layer by layer, and how they add up."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recoup.report.chapters import Chapter, Table
from recoup.report.search_figures import (
    additivity_figure,
    damage_of,
    front_figure,
    heat_figure,
    metric_title,
    strip_figure,
)
from recoup.search.fronts import TUNED
from recoup.search.results import PointRow, SearchResults
from recoup.study.intervals import difference, most_changed
from recoup.study.quality import NATS, TOP1, Quality

UNITS = {"cycles": "cycles", "traffic": "bytes", "bits": "bits", "energy": "pJ", "area": "um2"}


def verdict(study: SearchResults) -> str:
    """The cheapest policy within the budget, what it saves and loses, and whether the test images can tell."""
    where = f"{study.model} on {study.data}"
    if study.budget is None or study.floating is None:
        return f"{where}: the front has {len(_front(study))} policies; none was measured against a budget."
    allowed = f"{study.budget:g} {_lost_unit(study)}"
    float_text = _reached(study, study.floating)
    if study.chosen is None:
        least = min((p for p in study.points if p.reached is not None and p.allowed), key=lambda p: lost(study, p))
        return (
            f"{where}: no policy stays within {allowed} of float ({float_text}); the best loses "
            f"{lost_text(study, least)}, at {share(study, least, study.costs[0])}."
        )
    point = study.points[study.chosen]
    saved = ", ".join(share(study, point, cost) for cost in study.costs)
    text = f"{where}: within {allowed} of float ({float_text}) {point.name} takes {saved} and reaches "
    text += f"{_reached(study, point.reached or 0.0)}"
    return f"{text}; {_certainty(study, point)}."


def quality_of(study: SearchResults) -> Quality:
    """How the natural measure is written; of a front that was not measured, as for images."""
    return NATS if study.quality == NATS.name else TOP1


def lost(study: SearchResults, point: PointRow) -> float:
    """What a measured point loses against float."""
    change = (study.floating or 0.0) - (point.reached or 0.0)
    return change if study.quality == "top1" else -change


def share(study: SearchResults, point: PointRow, cost: str) -> str:
    """A cost against the first option everywhere: ``0.41 of the cycles``."""
    first = study.first[cost]
    return (
        f"{point.costs[cost] / first:.2f} of the {cost}"
        if first
        else f"{point.costs[cost]:,.4g} {'NAND2' if cost == 'area' and not study.liberty else UNITS.get(cost, cost)}"
    )


def lost_text(study: SearchResults, point: PointRow) -> str:
    """What a measured point loses, and its interval: ``0.0082 (+0.0071 to +0.0093)``."""
    quality = quality_of(study)
    text, found = quality.number(lost(study, point)), left_open(study, point)
    return text if found is None else f"{text} ({quality.signed(found[0])} to {quality.signed(found[1])})"


def _between(study: SearchResults, point: PointRow) -> str:
    """The interval of what a point loses alone, for a narrow column."""
    found = left_open(study, point) if point.reached is not None else None
    return "" if found is None else " to ".join(map(quality_of(study).signed, found))


def left_open(study: SearchResults, point: PointRow) -> tuple[float, float] | None:
    """The interval of what a point loses; of older results, which kept no answers, the widest that the accuracies
    allow, and of nats none."""
    known = None if point.lost_low is None or point.lost_high is None else (point.lost_low, point.lost_high)
    if study.quality != TOP1.name or study.count is None or point.flips:
        return known
    changed = most_changed(study.floating or 0.0, point.reached or 0.0, study.count)
    found = difference([lost(study, point)], study.count, [changed])
    low, high = known or (found.low, found.high)
    return min(low, found.low), max(high, found.high)


def _certainty(study: SearchResults, point: PointRow) -> str:
    """Whether the loss lies within the budget as far as the samples can tell."""
    assert study.budget is not None
    quality = quality_of(study)
    found = left_open(study, point)
    if found is None:
        return f"over {study.count:,} {_counted(study)}"
    low, high = map(quality.signed, found)
    told = f"{study.count:,} test {_counted(study)} leave a loss of {low} to {high} {quality.unit} open"
    if study.quality == TOP1.name and not point.flips:
        told += " (the widest that the accuracies allow: answers were not kept)"
    return told if found[1] > study.budget else f"{told}, all within the budget"


def _counted(study: SearchResults) -> str:
    return "tokens" if study.quality == NATS.name else "images"


def _lost_unit(study: SearchResults) -> str:
    return quality_of(study).unit


def _reached(study: SearchResults, value: float) -> str:
    return quality_of(study).text(value)


def _front(study: SearchResults) -> list[PointRow]:
    return study.front


def apart(study: SearchResults) -> dict[str, bool]:
    """Of each point of the front, whether its measured damage lies outside the interval of the next cheaper one."""
    front = _front(study)
    told = {}
    for cheaper, point in zip([None, *front], front, strict=False):
        clear = cheaper is None or cheaper.low is None or point.high is None or point.high < cheaper.low
        told[point.name] = clear
    return told


def context(study: SearchResults) -> Mapping[str, Any]:
    """Pictures and the front's table."""
    distinct = apart(study)
    return {
        "setting": setting_text(study),
        "fronts": [front_figure(study, cost) for cost in study.costs],
        "heat": heat_figure(study),
        "additivity": additivity_figure(study),
        "strip": strip_figure(study),
        "surrogate": surrogate_text(study),
        "metric": metric_title(study.metric),
        "costs": [_headed(study, cost) for cost in study.costs],
        "quality": study.quality,
        "sample": study.sample,
        "lost_on": "windows, window by window" if study.quality == NATS.name else "test images, image by image",
        "rows": [_cells(study, number, distinct) for number in range(len(study.points))],
        "uncounted": study.uncounted,
        "notes": study.notes,
        "tuned": tuned_text(study),
        "better": _better_text(study),
    }


def tuned_text(study: SearchResults) -> str:
    """What fine-tuned points are, and where their weights are from; nothing where there are none."""
    if not study.tuned:
        return ""
    named = [f"{point.name} ({point.weights})" if point.weights else point.name for point in study.tuned]
    judged = "what they lose against float" if study.quality else "it nevertheless"
    return (
        f"Fine-tuned, with weights of their own: {', '.join(named)}. Their damage is the distance to the network that "
        f"was scored, from which training moves away; what is better is told by {judged}."
    )


def _headed(study: SearchResults, cost: str) -> str:
    """A cost with the unit its numbers are in, where its name does not say it."""
    area = "um2" if study.liberty else "NAND2"
    unit = {"energy": "pJ", "area": area, "traffic": "bytes"}.get(cost)
    return cost if unit is None else f"{cost}, {unit}"


def setting_text(study: SearchResults) -> str:
    """What was measured, in a sentence."""
    options = sum(len(group.options) for group in study.groups)
    policies = 1
    for group in study.groups:
        policies *= len(group.options)
    samples = "tokens" if study.quality == NATS.name else "samples"
    drawn = f", each point on {study.count:,} test {samples} after repair, {study.seeds} draws" if study.seeds else ""
    cells = " and ".join(study.liberty) or "plain gates, in NAND2-equivalents"
    priced = f" Energies and areas: {cells}." if {"energy", "area"} & set(study.costs) else ""
    return (
        f"{len(study.groups)} groups of layers with {options} options: {policies:.3g} policies, answered from "
        f"{study.measurements:,} measured networks{drawn} (repair: {study.repair}).{priced}"
    )


def surrogate_text(study: SearchResults) -> str:
    """How far predictions may be trusted."""
    if study.error is None:
        return _without_error(study)
    rank = "" if study.rank is None else f", rank correlation {study.rank:.2f}"
    text = (
        f"On {len(study.probes)} whole networks measured / predicted, with what their samples leave open, lies within "
        f"[{1 / study.error:.2f}, {study.error:.2f}]{rank} (exponent {study.power:g})."
    )
    seen = [(p.damage, p.predicted) for p in study.front if p.damage is not None and p.predicted]
    inside = sum(1 / study.error <= damage / predicted <= study.error for damage, predicted in seen)
    if seen:
        text += f" So it does for {inside} of {len(seen)} policies of the front on the test samples."
    if not study.trusted:
        return f"{text} The damages do not add up well: trust the measured points alone, or refine."
    return f"{text} Trust the measured points alone." if 2 * inside < len(seen) else text


def _without_error(study: SearchResults) -> str:
    """Why there is no error bar: too few probes, or one whose damage no factor explains."""
    telling = [p for p in study.probes if p.predicted > 0 or p.measured > 0]
    if len(telling) < 2:
        return (
            "How damages add up was not measured (fewer than two probes have damage): trust the measured points alone."
        )
    missed = sum((p.predicted > 0) != (p.measured > 0) for p in telling)
    return (
        f"Of {len(telling)} whole networks {missed} have damage where none was predicted, or none where some was: "
        "trust the measured points alone."
    )


def _cells(study: SearchResults, number: int, distinct: Mapping[str, bool]) -> dict[str, Any]:
    point, text = study.points[number], quality_of(study).number
    interval = "" if point.low is None or point.high is None else f"{point.low:.2g} to {point.high:.2g}"
    low, high = point.reached_low, point.reached_high
    return {
        "name": point.name,
        "file": f"policy-{number:02}.yaml",
        "kind": point.kind,
        "on_front": point.on_front,
        "mark": "" if point.on_front else _mark(study, point),
        "chosen": number == study.chosen,
        "costs": [f"{point.costs[cost]:,.6g}" for cost in study.costs],
        "shares": [f"{point.costs[c] / study.first[c]:.2f}" if study.first[c] else "" for c in study.costs],
        "predicted": "" if point.predicted is None else f"{point.predicted:.2e}",
        "damage": "" if point.damage is None else f"{point.damage:.2e}",
        "interval": interval,
        "same": not distinct.get(point.name, True),
        "reached": "" if point.reached is None else text(point.reached),
        "reached_interval": "" if low is None or high is None else f"{text(low)} to {text(high)}",
        "lost_interval": _between(study, point),
        "lost": "" if point.reached is None or not study.quality else lost_text(study, point),
    }


def _mark(study: SearchResults, point: PointRow) -> str:
    """Why a point is not on the front: a limit, or another that costs no more and does no more harm."""
    if not point.allowed:
        return "(over a limit)"
    trained = point.kind == TUNED and bool(study.quality)
    better = next(
        (other.name for other in study.points if other.on_front and _beats(study, other, point, trained)), None
    )
    return f"({better or 'another'} is better)"


def _beats(study: SearchResults, one: PointRow, other: PointRow, trained: bool) -> bool:
    """At least as good in every cost and in damage, or (``trained``) in what is lost, and better in one of them."""
    pairs = [(one.costs[cost], other.costs[cost]) for cost in study.costs]
    pairs.append((lost(study, one), lost(study, other)) if trained else (damage_of(one), damage_of(other)))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _better_text(study: SearchResults) -> str:
    """What the mark means, where there is one."""
    marked = any(not point.on_front and point.allowed for point in study.points)
    return "Better: costs no more and does no more damage, and one of the two is less." if marked else ""


def totals(study: SearchResults) -> list[Table]:
    """One terminal table, a row a policy."""
    columns = ("policy", *study.costs, "predicted", "measured")
    columns += (study.quality, "lost, 95 %") if study.quality else ()
    rows = []
    for number in range(len(study.points)):
        cells = _cells(study, number, apart(study))
        mark = " *" if cells["chosen"] else f" {cells['mark']}".rstrip()
        shares = [part or whole for part, whole in zip(cells["shares"], cells["costs"], strict=True)]
        row = (cells["name"] + mark, *shares, cells["predicted"], cells["damage"])
        rows.append((*row, cells["reached"], cells["lost_interval"]) if study.quality else row)
    said = [_better_text(study), surrogate_text(study), tuned_text(study), *_left_out(study)]
    name = f"Search: {study.model} on {study.data}; costs relative to the first option everywhere"
    return [Table(name, columns, tuple(rows), " ".join(filter(None, said)))]


def _left_out(study: SearchResults) -> list[str]:
    """What is in no cost, and the notes, as sentences."""
    said = [f"not counted in any cost: {', '.join(study.uncounted)}"] if study.uncounted else []
    return [f"{text[:1].upper()}{text[1:].rstrip('.')}." for text in (*said, *study.notes)]


CHAPTER = Chapter(
    template=Path(__file__).with_name("search.html.j2"),
    context=context,
    totals=totals,
    verdicts=lambda study: [verdict(study)],
)
