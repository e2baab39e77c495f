"""The report's plots as inline SVG whose colours follow the page, light or dark.

matplotlib draws with stand-in colours; `svg` replaces them by the page's CSS variables. Series differ in colour (Okabe
and Ito's palette, distinct for colour-blind readers) and in marker.
"""

import functools
import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, ParamSpec, TypeVar, cast

from recoup.network.wing import FLOAT, Baseline
from recoup.plots.palette import MARKERS, Palette
from recoup.report.summary import Summary, baselines
from recoup.study.quality import SPACE, Quality
from recoup.study.repairs import NONE
from recoup.study.results import Results

P = ParamSpec("P")
R = TypeVar("R")

INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = tuple(f"#{number:02x}{number:02x}{number:02x}" for number in range(4, 15))
PAGE = "#0f0f0f"
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--rule", PAGE: "--page"} | {
    c: f"--series-{i + 1}" for i, c in enumerate(SERIES)
}

COLOURS = Palette(INK, MUTED, GRID, SERIES, PAGE)
STYLE: dict[str, Any] = {"svg.fonttype": "none", **COLOURS.style()}
WIDTH = 9.2  # inches; scaled to the page by the browser


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw in the report's style, whatever the user's matplotlib settings, and leave those alone."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        from matplotlib import rc_context

        with rc_context(cast("Any", {**STYLE, "svg.hashsalt": draw.__name__})):
            return draw(*args, **kwargs)

    return drawn


@styled
def accuracy_figure(results: Results, summary: Summary) -> str:
    """Top-1 accuracy or nats per state, one panel a config, with those of the baselines as lines; right is better."""
    quality = summary.quality
    hardware = {baseline.name: baseline for baseline in baselines(results)[1:]}
    names = [*hardware, *(one.name for one in results.present)]
    panels = [(name, summary.of(name)) for name in names if summary.of(name)]
    titles = [wrapped(_panel_title(hardware[n]) if n in hardware else lines[0].title, 92) for n, lines in panels]
    heights = [len(lines) + 0.9 + 0.6 * title.count("\n") for (_, lines), title in zip(panels, titles, strict=True)]
    figure, axes = canvas(len(panels), 0.30 * sum(heights) + 0.7, heights)
    for index, (axis, (_, lines)) in enumerate(zip(axes, panels, strict=True)):
        _references(axis, [FLOAT, *hardware.values()], summary, labelled=index == 0)
        colour, marker = _series(index if hardware else index + 1)  # the first is the baselines'
        for y, line in enumerate(lines):
            reached = line.reached
            spread = [[reached.mean - reached.low], [reached.high - reached.mean]]
            axis.errorbar(reached.mean, y, xerr=spread, color=colour, marker=marker, ms=5.5, capsize=2.5, lw=1.3)
            # In a column of their own the values run into no line and no interval.
            value = quality.number(reached.mean)
            axis.text(1.055, y, value, transform=axis.get_yaxis_transform(), ha="right", va="center")
        axis.set_yticks(range(len(lines)), [plain(line.state) for line in lines])
        axis.set_ylim(len(lines) - 0.45, -0.55)
        axis.grid(visible=False, axis="y")
        crowded = index == 0 and max(map(len, titles[0].split("\n"))) > 60  # the lines' labels stand above the panel
        axis.set_title(plain(titles[index]), pad=18 if crowded else 6)
        axis.tick_params(labelbottom=index == len(panels) - 1)
    axes[-1].set_xlabel(quality.axis)
    if not quality.rises:
        axes[-1].invert_xaxis()
    said = "; ".join(f"{line.title}, {line.state}: {spoken(quality, line.reached.mean)}" for line in summary.lines)
    what = quality.title.removesuffix(", %")
    return svg(figure, "accuracy", f"{what} per state with 95 % confidence intervals. {said}.")


def spoken(quality: Quality, value: float) -> str:
    """A value in a picture's description."""
    return quality.text(value).replace(SPACE, " ")


@styled
def shift_figure(results: Results) -> str | None:
    """How far every BatchNorm layer's statistics moved; None where that was not measured."""
    if not results.shifts:
        return None
    names = list(dict.fromkeys(row.layer for row in results.shifts))
    figure, axes = canvas(2, 4.0 + name_space(names), [1, 1])
    said = []
    for index, hardware in enumerate(results.present):
        title = hardware.title
        rows = [row for row in results.shifts if row.config == hardware.name]
        places = [names.index(row.layer) for row in rows]
        plot_line(axes[0], places, [row.mean for row in rows], index, title)
        plot_line(axes[1], places, [row.variance for row in rows], index, title)
        worst = max(rows, key=lambda row: row.mean, default=None)
        if worst is not None:
            said.append(f"{title}: largest shift {worst.mean:.2g} standard deviations in {worst.layer}")
    axes[0].set_ylim(bottom=0)
    axes[1].axhline(1, color=MUTED, lw=1)
    axes[0].set_title("Shift of the mean, in standard deviations of the channel")
    axes[1].set_title("Variance on the hardware / variance off it")
    legend(figure, axes[0])
    layer_ticks(axes, names)
    return svg(figure, "shift", f"Shift of BatchNorm statistics in {len(names)} layers. {'; '.join(said)}.")


def svg(figure: Any, name: str, description: str) -> str:
    """A figure as one self-contained ``<svg>`` element, described for screen readers, coloured by CSS variables."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = _renamed(text, name)
    text = re.sub(r"font: ([^;\"]*?)(\d[\d.]*px) [^;\"]*", r"font: \1\2 var(--sans)", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    label = escape(description, quote=True)
    return re.sub(r"<svg ([^>]*)>", rf'<svg role="img" aria-label="{_literal(label)}" \1>', text, count=1)


def wrapped(text: str, width: int) -> str:
    """Text on as many lines as it needs, words whole."""
    return "\n".join(textwrap.wrap(text, width)) or text


def plain(text: str) -> str:
    """Text as matplotlib draws it unchanged: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def _renamed(text: str, name: str) -> str:
    """Ids unique on a page of several figures, and the same in every run: matplotlib's hold memory addresses."""
    names: dict[str, str] = {}

    def new(match: re.Match[str]) -> str:
        return match[1] + names.setdefault(match[2], f"{name}-{len(names)}") + match[3]

    return re.sub(r'(\bid="|\bhref="#|url\(#)([^")]*)("|\))', new, text)


def _literal(text: str) -> str:
    return text.replace("\\", r"\\")  # a replacement template would read backslashes


def canvas(rows: int, height: float, ratios: Sequence[float]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": list(ratios)})
    clear(figure)
    return figure, list(axes[:, 0])


def clear(figure: Any) -> None:
    """The page shows through."""
    for part in (figure, *figure.axes):
        part.patch.set_alpha(0)


def _series(index: int) -> tuple[str, str]:
    return SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]


def _panel_title(baseline: Baseline) -> str:
    return ", ".join(part for part in (baseline.title, baseline.hardware) if part)


def _references(axis: Any, shown: Sequence[Baseline], summary: Summary, labelled: bool) -> None:
    """The baselines' results as vertical lines; the labels of the worst two go apart, for they lie close."""
    lines = [(summary.line(baseline.name, NONE), baseline.title) for baseline in shown]
    dashes = ["--", *("-" for _ in lines[1:])]  # the first is the float network
    found = sorted(
        (line.reached.mean, name, d) for (line, name), d in zip(lines, dashes, strict=True) if line is not None
    )
    if not summary.quality.rises:  # the axis runs down
        found.reverse()
    for index, (mean, name, dash) in enumerate(found):
        axis.axvline(mean, color=MUTED, lw=1, ls=dash, zorder=0.9)
        if labelled:
            side = "left" if index else "right"
            place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            offset = (-3 if side == "right" else 3, 2)
            axis.annotate(plain(name), (mean, 1), offset, ha=side, va="bottom", fontsize=8, color=MUTED, **place)


def plot_line(axis: Any, places: Sequence[int], values: Sequence[float], index: int, label: str) -> None:
    colour, marker = _series(index + 1)  # the first is the baselines' in every plot
    again = (index + 1) // len(SERIES)  # colours and markers come round: hollow and dashed, then dotted
    fill, dashes = ("none" if again else colour), ("-", "--", ":", "-.")[min(again, 3)]
    axis.plot(places, values, color=colour, marker=marker, mfc=fill, ls=dashes, ms=4, lw=1.2, label=plain(label))


def legend(figure: Any, axis: Any) -> None:
    """Above the plots, where it covers neither data nor titles however many series there are."""
    handles, labels = axis.get_legend_handles_labels()
    columns = 3 if max(map(len, labels), default=0) <= 44 else 1
    labels = [label if columns == 3 else wrapped(label, 120) for label in labels]
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, columnspacing=1.6, borderaxespad=0.2)


def name_space(names: Sequence[str]) -> float:
    return 0.075 * min(max(map(len, names)), 30)


def layer_ticks(axes: Sequence[Any], names: Sequence[str]) -> None:
    step = math.ceil(len(names) / 60)
    shown = range(0, len(names), step)
    short = [plain(name if len(name) <= 30 else "…" + name[-29:]) for name in names]
    axes[-1].set_xticks(list(shown), [short[i] for i in shown], rotation=90, fontsize=7.5)
    axes[-1].set_xlim(-0.6, len(names) - 0.4)
    for axis in axes:
        axis.grid(visible=False, axis="x")
