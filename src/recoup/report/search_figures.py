"""Pictures of a search: the front, damages layer by layer, how they add up, and the policies as strips."""

import math
from collections.abc import Sequence
from typing import Any

from recoup.plots.palette import MARKERS
from recoup.report.figures import INK, MUTED, PAGE, SERIES, canvas, clear, legend, name_space, plain, styled, svg
from recoup.search.results import PointRow, SearchResults
from recoup.study.quality import NATS

FRONT, UNIFORM, TUNED = 1, 2, 3  # the series of points, of which each has a colour and a marker
SIZES, ASIDE = {TUNED: 6.5}, {TUNED: 7}  # of markers, of which diamonds look smaller, and to their right; in points
FAINT = 0.06  # of a cell without damage
NAMES = {
    "kl": "KL from float, nats",
    "mse": "squared error of outputs",
    "nats": "nats lost",
    "top1": "points of top-1 lost",
}
QUALITY = {"top1": "top-1 accuracy, %", "nats": "nats a token; less is better; bars: of the difference from float"}


def metric_title(metric: str) -> str:
    """How axes call a damage."""
    return NAMES.get(metric, f"loss of {metric}")


@styled
def front_figure(study: SearchResults, cost: str) -> str:
    """Damage, and accuracy where it was measured, against a cost relative to the first option everywhere."""
    panels = 2 if study.floating is not None else 1
    figure, axes = canvas(panels, 3.1 * panels + 0.5, [1] * panels)
    shown = study.front
    others = [point for point in study.points if point.kind == "uniform"]
    _damages(axes[0], study, cost, shown, others)
    if study.floating is not None:
        _reached(axes[1], study, cost, shown, others)
    axes[-1].set_xlabel(f"{cost}, relative to the first option everywhere")
    legend(figure, axes[0])
    told = [*shown, *study.tuned]
    said = "; ".join(f"{p.name}: {p.costs[cost] / _first(study, cost):.2f} of {cost}, {damage_of(p):.3g}" for p in told)
    return svg(figure, f"front-{cost}", f"The front: {metric_title(study.metric)} against {cost}. {said}.")


def _damages(axis: Any, study: SearchResults, cost: str, shown: Sequence[PointRow], others: Sequence[PointRow]) -> None:
    measured = [point for point in shown if point.damage is not None]
    swept = sorted((p for p in study.points if p.kind == "front"), key=lambda p: p.costs[cost])
    axis.plot(_at(study, cost, swept), [p.predicted for p in swept], color=MUTED, ls=":", lw=1.2, label="predicted")
    if measured:
        _errors(axis, study, cost, measured, FRONT, "front, measured")
    _errors(axis, study, cost, [p for p in others if p.damage is not None], UNIFORM, "one option everywhere")
    _errors(axis, study, cost, study.tuned, TUNED, "fine-tuned, measured")
    for point in others:
        if point.damage is not None:
            place = (point.costs[cost] / _first(study, cost), point.damage)
            axis.annotate(plain(point.name), place, (5, 4), textcoords="offset points", fontsize=8, color=MUTED)
    positive = [value for p in study.points for value in (p.predicted, p.damage) if value is not None and value > 0]
    if positive:
        axis.set_yscale("log")
    axis.set_title(metric_title(study.metric))


def _errors(axis: Any, study: SearchResults, cost: str, points: Sequence[PointRow], series: int, label: str) -> None:
    if not points:
        return
    damages = [damage_of(point) for point in points]
    # On a logarithmic axis an interval that reaches 0 is cut a decade below.
    below = [max(min(d - (p.low or 0.0), 0.9 * d), 0.0) for d, p in zip(damages, points, strict=True)]
    above = [max((p.high or d) - d, 0.0) for d, p in zip(damages, points, strict=True)]
    _marks(axis, series, _at(study, cost, points), damages, [below, above], label)


def _marks(axis: Any, series: int, x: Sequence[float], y: Sequence[float], spread: Any, label: str = "") -> None:
    """Filled marks of a series, with their intervals; those of fine-tuned points stand a little to the right, for they
    have the costs of others."""
    look = {"color": SERIES[series], "marker": MARKERS[series], "ms": SIZES.get(series, 5.5)}
    found = axis.errorbar(x, y, yerr=spread, label=label, ls="none", capsize=2.5, lw=1.2, **look)
    for part in found.get_children():  # not as an argument: the axes would not be as wide as these points need
        part.set_transform(_aside(axis, series))


def _aside(axis: Any, series: int) -> Any:
    """Where a series' marks stand."""
    from matplotlib.transforms import ScaledTranslation

    return axis.transData + ScaledTranslation(ASIDE.get(series, 0) / 72, 0, axis.figure.dpi_scale_trans)


def _around(study: SearchResults, point: PointRow) -> tuple[float, float]:
    """How far a point's interval goes below and above it: of nats that of the difference from float, window by window,
    for every network has the same hard windows."""
    low, mean, high = point.reached_low, point.reached or 0.0, point.reached_high
    if study.quality == NATS.name and point.lost is not None:
        low, mean, high = point.lost_low, point.lost, point.lost_high
    return max(mean - (mean if low is None else low), 0.0), max((mean if high is None else high) - mean, 0.0)


def _reached(axis: Any, study: SearchResults, cost: str, shown: Sequence[PointRow], others: Sequence[PointRow]) -> None:
    for points, series in ((shown, FRONT), (others, UNIFORM), (study.tuned, TUNED)):
        known = [point for point in points if point.reached is not None]
        if known:
            values = [point.reached or 0.0 for point in known]
            spread = list(zip(*(_around(study, point) for point in known), strict=True))
            _marks(axis, series, _at(study, cost, known), values, spread)
    assert study.floating is not None
    _level(axis, study.floating, "float", "--", "bottom")
    if study.budget is not None:
        floor = study.floating + (-study.budget if study.quality == "top1" else study.budget)
        _level(axis, floor, f"budget {study.budget:g}", ":", "top")
    if study.chosen is not None:
        point = study.points[study.chosen]
        place = (point.costs[cost] / _first(study, cost), point.reached or 0.0)
        axis.annotate(
            "chosen",
            place,
            (8, -14),
            xycoords=_aside(axis, TUNED if point in study.tuned else FRONT),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.8},
        )
    if study.quality == "nats":
        axis.invert_yaxis()  # above is better, as of accuracy
    axis.set_title(QUALITY.get(study.quality, study.quality))


def _level(axis: Any, value: float, text: str, dashes: str, side: str) -> None:
    """A line across, named right of the axes, where no mark is."""
    axis.axhline(value, color=MUTED, ls=dashes, lw=1)
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axis.annotate(text, (1, value), (4, 0), ha="left", va=side, fontsize=8, color=MUTED, **place)


@styled
def heat_figure(study: SearchResults) -> str:
    """Every group on every option: the stronger the colour, the larger the damage, on a logarithmic scale."""
    from matplotlib.patches import Rectangle

    options = list(dict.fromkeys(option for group in study.groups for option in group.options))
    names = [group.name for group in study.groups]
    figure, (axis,) = canvas(1, 0.32 * len(options) + 1.0 + name_space(names), [1])
    positive = [damage for group in study.groups for damage in group.damages if damage > 0]
    low, high = (math.log(min(positive)), math.log(max(positive))) if positive else (0.0, 1.0)
    worst = ("", "", 0.0)
    for x, group in enumerate(study.groups):
        for option, damage in zip(group.options, group.damages, strict=True):
            share = (math.log(damage) - low) / ((high - low) or 1.0) if damage > 0 else 0.0
            strength = FAINT + (1 - FAINT) * share if damage > 0 else 0.0
            place = (x - 0.5, options.index(option) - 0.5)
            axis.add_patch(Rectangle(place, 1, 1, facecolor=SERIES[2], alpha=strength, lw=0))
            axis.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor=PAGE, lw=1.2))
            worst = max(worst, (group.name, option, damage), key=lambda entry: entry[2])
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.set_ylim(len(options) - 0.5, -0.5)
    axis.set_yticks(range(len(options)), [plain(option) for option in options])
    _layer_names(axis, names)
    axis.grid(visible=False)
    span = f"{min(positive):.1e} to {max(positive):.1e}" if positive else "none"
    axis.set_title(f"{metric_title(study.metric)}, one layer alone: {span}, on a logarithmic scale")
    text = f"Damage of every layer on every option; the largest is {worst[2]:.3g}, {worst[0]} on {worst[1]}."
    return svg(figure, "heat", text)


@styled
def additivity_figure(study: SearchResults) -> str | None:
    """Measured against predicted, with the band that the probes allow; None where there is nothing to show."""
    probes = [(p.predicted, p.measured) for p in study.probes if p.predicted > 0 and p.measured > 0]
    points = [
        (p.predicted, p.damage) for p in study.points if p.damage and p.predicted and p.damage > 0 and p.predicted > 0
    ]
    every = [value for pair in (*probes, *points) for value in pair]
    if not every:
        return None
    figure, (axis,) = canvas(1, 3.6, [1])
    low, high = min(every) / 1.5, max(every) * 1.5
    axis.plot([low, high], [low, high], color=MUTED, lw=1)
    title = "No band holds every probe"
    if study.error is not None:
        below, above = ([low * r, high * r] for r in (1 / study.error, study.error))
        axis.fill_between([low, high], below, above, color=MUTED, alpha=0.15, lw=0)
        title = f"The band holds every probe: measured / predicted from {1 / study.error:.2f} to {study.error:.2f}"
    for pairs, series, label in (
        (probes, 2, f"probes, on the scoring {study.sample}s"),
        (points, 1, f"policies, on the test {study.sample}s"),
    ):
        if pairs:
            axis.plot(
                *zip(*pairs, strict=True), color=SERIES[series], marker=MARKERS[series], ls="none", ms=5, label=label
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.set_xlabel("predicted from one-layer damages")
    axis.set_ylabel("measured")
    legend(figure, axis)
    axis.set_title(title)
    return svg(
        figure, "additivity", f"Measured against predicted damage of {len(probes)} probes and {len(points)} policies."
    )


@styled
def strip_figure(study: SearchResults) -> str:
    """The policies of the front, a row each, layers from input to output in the colours of their options."""
    from matplotlib.patches import Patch, Rectangle

    options = list(dict.fromkeys(option for group in study.groups for option in group.options))
    shown = [(study.points.index(point), point) for point in (*study.front, *study.tuned) if point.options]
    names = [group.name for group in study.groups]
    figure, (axis,) = canvas(1, 0.28 * len(shown) + 1.1 + name_space(names), [1])
    for y, (_, point) in enumerate(shown):
        for x, (group, option) in enumerate(zip(study.groups, point.options, strict=True)):
            colour, alpha = _look(options.index(group.options[option]))
            axis.add_patch(
                Rectangle((x - 0.5, y - 0.42), 1, 0.84, facecolor=colour, alpha=alpha, edgecolor=PAGE, lw=1.2)
            )
    labels = [f"{point.name}{' (chosen)' if number == study.chosen else ''}" for number, point in shown]
    axis.set_yticks(range(len(shown)), [plain(label) for label in labels])
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.grid(visible=False)
    _layer_names(axis, names)
    looks = [_look(index) for index in range(len(options))]
    patches = [Patch(color=c, alpha=a, label=plain(o)) for (c, a), o in zip(looks, options, strict=True)]
    figure.legend(handles=patches, loc="outside upper left", ncols=4, borderaxespad=0.2)
    clear(figure)
    text = "; ".join(f"{point.name}: " + ", ".join(_counts(study, point)) for _, point in shown)
    return svg(figure, "strip", f"The policies of the front, layer by layer. {text}.")


def _look(index: int) -> tuple[str, float]:
    """Colours of options: the series', then paler when they come round."""
    return SERIES[index % len(SERIES)], max(1.0 - 0.45 * (index // len(SERIES)), 0.25)


def _counts(study: SearchResults, point: PointRow) -> list[str]:
    taken = [group.options[option] for group, option in zip(study.groups, point.options, strict=True)]
    return [f"{taken.count(option)} on {option}" for option in dict.fromkeys(taken)]


def _layer_names(axis: Any, names: Sequence[str]) -> None:
    step = math.ceil(len(names) / 60)
    places = range(0, len(names), step)
    short = [plain(name if len(name) <= 30 else "…" + name[-29:]) for name in names]
    axis.set_xticks(list(places), [short[place] for place in places], rotation=90, fontsize=7.5)


def _first(study: SearchResults, cost: str) -> float:
    return study.first[cost] or 1.0


def _at(study: SearchResults, cost: str, points: Sequence[PointRow]) -> list[float]:
    return [point.costs[cost] / _first(study, cost) for point in points]


def damage_of(point: PointRow) -> float:
    return (point.predicted or 0.0) if point.damage is None else point.damage
