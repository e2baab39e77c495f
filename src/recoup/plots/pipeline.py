"""Plots of training under delay: curves, delay sweeps and half-lives, as matplotlib figures for any back end.

No function touches pyplot or leaves a matplotlib setting changed. A run that diverged is NaN from there on: it has no
part in means and spans, and methods that lost runs are marked.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from recoup.errors import RecoupError
from recoup.plots.palette import LIGHT, Palette, styled

WIDTH = 9.2  # inches
BAND = 0.14  # opacity: bands of several series lie on each other
SPREAD = 0.035  # side by side, in the sweep: the widest offset, a share of a step

Runs = Sequence[Sequence[float]]


@styled
def curves_figure(
    x: Sequence[float],
    losses: Mapping[str, Runs],
    accuracies: Mapping[str, Runs],
    *,
    xlabel: str = "training images seen",
    palette: Palette = LIGHT,
) -> Any:
    """Training loss (log scale) and test accuracy of several methods: mean line, and the span of the runs as a band.

    Args:
        x: where the curves were measured, P places.
        losses: label -> one row of P values a run; not finite: diverged.
        accuracies: the same labels -> accuracies in percent; not finite: diverged.
        xlabel: what ``x`` is.
        palette: colours.

    Returns:
        A matplotlib Figure with two panels.

    Raises:
        RecoupError: no method; labels that differ; a method without runs; a run of another length than ``x``.
    """
    _check_curves(x, losses, accuracies)
    figure, (loss, accuracy) = _canvas(2, 3.7)
    for axis, curves in ((loss, losses), (accuracy, accuracies)):
        for index, (label, runs) in enumerate(curves.items()):
            _band(axis, x, np.array(runs, dtype=np.float64), palette.look(index), _plain(label))
        axis.set_xlabel(xlabel)
    loss.set_yscale("log")
    _plain_ticks(loss.yaxis)
    loss.set_title("Training loss (log scale): mean and span of the runs")
    accuracy.set_title("Test accuracy, %")
    best = np.array([value for runs in accuracies.values() for run in runs for value in run], dtype=np.float64)
    finite = best[np.isfinite(best)]
    if finite.size:
        low = float(np.percentile(finite, 12))  # the first points of slow methods would leave the rest no room
        accuracy.set_ylim(max(0.0, low - 1), min(100.0, float(finite.max()) + 1))
    _legend(figure, loss)
    return figure


@styled
def delay_figure(
    sweeps: Mapping[str, Mapping[float, Sequence[float]]],
    *,
    reference: tuple[str, Sequence[float]] | None = None,
    measure: str = "Test accuracy, %",
    log: bool = False,
    xlabel: str = "largest delay, updates",
    palette: Palette = LIGHT,
) -> Any:
    """A measure against the delay, a line per mitigation: mean of the runs that did not diverge, whiskers their span.

    A hollow point has lost runs; where all diverged, a cross at the panel's worse edge ends the line.

    Args:
        sweeps: label -> delay -> one value a run; not finite: diverged.
        reference: the label and values of runs without delay, a level line with a band.
        measure: what is measured; with ``log`` on a logarithmic axis, and less is better.
        xlabel: what the delay is.
        palette: colours.

    Returns:
        A matplotlib Figure.

    Raises:
        RecoupError: no mitigation, or one without runs at some delay.
    """
    if not sweeps or not all(row and all(len(runs) for runs in row.values()) for row in sweeps.values()):
        raise RecoupError("pipeline delay_figure: name a mitigation or more, each with runs at every delay")
    figure, (axis,) = _canvas(1, 4.2)
    delays = sorted({delay for row in sweeps.values() for delay in row})
    step = min((b - a for a, b in pairwise(delays)), default=1.0)
    if reference is not None:
        _level(axis, *reference, palette.series[0])
    others = replace(palette, series=palette.series[1:] or palette.series)  # the first is the reference's
    lost: dict[int, list[float]] = {}
    for index, (label, row) in enumerate(sweeps.items()):
        look, shift = others.look(index), SPREAD * step * (index - (len(sweeps) - 1) / 2)
        places = sorted(delay for delay in row if _finite(row[delay]).size)
        lost[index] = [delay + shift for delay in row if delay not in places]
        kept = [_finite(row[delay]) for delay in places]
        means, at = [float(k.mean()) for k in kept], [delay + shift for delay in places]
        axis.plot(at, means, lw=1.2, label=_plain(label), ms=5, **look)
        for delay, position, values, mean in zip(places, at, kept, means, strict=True):
            hollow = {"mfc": palette.page} if len(values) < len(row[delay]) else {}
            whiskers = {**look, **hollow, "ms": 5, "lw": 0.9, "capsize": 1.8}
            axis.errorbar(position, mean, yerr=[[mean - values.min()], [values.max() - mean]], **whiskers)
    if log:
        axis.set_yscale("log")
        _plain_ticks(axis.yaxis)
    worst = axis.get_ylim()[1 if log else 0]
    for index, places in lost.items():
        colour = others.look(index)["color"]
        axis.plot(places, [worst] * len(places), color=colour, marker="x", ms=7, mew=1.6, ls="none", clip_on=False)
    axis.set_ylim(**{"top" if log else "bottom": worst})
    axis.set_xticks(delays, [f"{delay:g}" for delay in delays])
    axis.set_xlabel(xlabel + ("   (cross: every run diverged; hollow: some did)" if _any_lost(sweeps) else ""))
    axis.set_title(measure + (" (log scale)" if log else "") + ": mean and span of the runs")
    _legend(figure, axis)
    return figure


@styled
def timeline_figure(
    timelines: Mapping[str, Mapping[Any, tuple[float, float]]], *, palette: Palette = LIGHT, title: str = ""
) -> Any:
    """Who works on what, in real time: a panel a schedule, a row a rank, all on one axis of milliseconds.

    Args:
        timelines: what `pipeline.wallclock.timelines` found: (rank, (kind, number)) to begin and end in seconds.
        palette: light or dark.
        title: above all panels.

    Raises:
        RecoupError: no schedule, or one in which nobody works.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not timelines or not all(timelines.values()):
        raise RecoupError(f"pipeline timeline_figure: {list(timelines)}: every schedule must have an operation")
    figure = Figure(figsize=(WIDTH, 0.9 + 1.9 * len(timelines)), layout="constrained")
    colours = dict(zip(("forward", "backward", "update"), palette.series, strict=False))
    panels = figure.subplots(len(timelines), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, done) in zip(panels, timelines.items(), strict=True):
        ranks = 1 + max(rank for rank, _ in done)
        for (rank, (kind, number)), (begin, end) in done.items():
            look = {"facecolors": colours[kind], "alpha": 0.5 + 0.4 * (number % 2), "lw": 0}
            axis.broken_barh([(begin * 1e3, (end - begin) * 1e3)], (rank - 0.42, 0.84), **look)
        busy, whole = sum(b - a for a, b in done.values()), ranks * max(b for _, b in done.values())
        axis.set_title(_plain(f"{name}: {busy / whole:.0%} busy" if whole else name), loc="left", fontsize=9)
        axis.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)], fontsize=8)
        axis.invert_yaxis()
    panels[-1].set_xlabel("milliseconds")
    figure.legend(
        [Patch(color=colour) for colour in colours.values()], list(colours), loc="outside upper right", ncols=3
    )
    figure.suptitle(_plain(title), fontsize=10, x=0.01, ha="left")
    return figure


def _level(axis: Any, name: str, values: Sequence[float], colour: str) -> None:
    """A level line at the mean of the finite values, and a band over their span."""
    kept = _finite(values)
    if kept.size:
        axis.axhspan(kept.min(), kept.max(), color=colour, alpha=BAND, lw=0)
        axis.axhline(kept.mean(), color=colour, lw=1.3, label=_plain(name))


@styled
def half_life_figure(
    by_condition: Mapping[str, Mapping[float, float]],
    by_delay: Mapping[str, Mapping[int, float]],
    *,
    delay: int,
    condition: float,
    palette: Palette = LIGHT,
) -> Any:
    """The least half-life of the error on a convex quadratic, against condition number and against delay, log axes.

    Args:
        by_condition: label -> condition number -> updates, all at ``delay``.
        by_delay: the same labels -> delay (from 1) -> updates, all at ``condition``.
        delay, condition: what each panel holds fixed.
        palette: colours.

    Returns:
        A matplotlib Figure with two panels that share their y axis.

    Raises:
        RecoupError: no method; labels that differ; a half-life that is not above 0 and finite; a delay below 1.
    """
    values = [v for table in (by_condition, by_delay) for row in table.values() for v in row.values()]
    if not by_condition or list(by_condition) != list(by_delay) or not all(0 < v < math.inf for v in values):
        raise RecoupError(
            f"pipeline half_life_figure: methods {list(by_condition)} and {list(by_delay)} must be the same, one or "
            "more, with half-lives above 0 and finite"
        )
    if any(d < 1 for row in by_delay.values() for d in row):
        raise RecoupError("pipeline half_life_figure: delays must be 1 or more for a logarithmic axis")
    figure, axes = _canvas(2, 3.8, sharey=True)
    tables: list[Mapping[str, Mapping[Any, float]]] = [by_condition, by_delay]
    for axis, table in zip(axes, tables, strict=True):
        for index, (label, row) in enumerate(table.items()):
            places, values = zip(*sorted(row.items()), strict=True)
            axis.plot(places, values, lw=1.3, ms=4.5, label=_plain(label), **palette.look(index))
        axis.set_xscale("log", base=10 if axis is axes[0] else 2)
        axis.set_yscale("log")
    ticks = sorted({d for row in by_delay.values() for d in row})
    axes[1].set_xticks(ticks, [str(d) for d in ticks])
    _plain_ticks(axes[0].yaxis)
    axes[0].set_xlabel("condition number")
    axes[1].set_xlabel("delay D, updates")
    axes[0].set_ylabel("half-life of the error, updates")
    axes[0].set_title(f"At delay {delay}")
    axes[1].set_title(f"At condition number {condition:g}")
    _legend(figure, axes[0])
    return figure


def _check_curves(x: Sequence[float], losses: Mapping[str, Runs], accuracies: Mapping[str, Runs]) -> None:
    if not losses or list(losses) != list(accuracies):
        raise RecoupError(
            f"pipeline curves_figure: losses of {list(losses)}, accuracies of {list(accuracies)}; there must be a "
            "method, and the same for both"
        )
    for label in losses:
        for what, runs in (("loss", losses[label]), ("accuracy", accuracies[label])):
            if not runs or any(len(run) != len(x) for run in runs):
                lengths = [len(run) for run in runs]
                raise RecoupError(
                    f"pipeline curves_figure: {label}: {what} curves of lengths {lengths}; there must be one or more, "
                    f"each of {len(x)} points"
                )


def _canvas(columns: int, height: float, **options: Any) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, **options)[0])


def _band(axis: Any, x: Sequence[float], runs: np.ndarray, look: dict[str, Any], label: str) -> None:
    """Mean, least and greatest of the runs that are finite at each place; nothing where none is."""
    finite = np.isfinite(runs)
    some = finite.any(0)
    at = np.asarray(x, dtype=np.float64)[some]
    kept, mask = runs[:, some], finite[:, some]
    mean = np.where(mask, kept, 0).sum(0) / mask.sum(0)
    low, high = np.where(mask, kept, np.inf).min(0), np.where(mask, kept, -np.inf).max(0)
    axis.fill_between(at, low, high, color=look["color"], alpha=BAND, lw=0)
    axis.plot(at, mean, lw=1.4, ms=4, label=label, **look)


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]


def _any_lost(sweeps: Mapping[str, Mapping[float, Sequence[float]]]) -> bool:
    return any(_finite(runs).size < len(runs) for row in sweeps.values() for runs in row.values())


def _plain_ticks(axis: Any) -> None:
    """1, 2 and 5 of every decade as plain numbers; 10^n leaves a narrow range without a label."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(figure: Any, axis: Any) -> None:
    """Above the panels, where it covers no data however many series there are."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 5), borderaxespad=0.2)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # a dollar sign would begin a formula
