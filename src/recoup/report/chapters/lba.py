"""LBA's part of a report: bits of the accumulator beside accuracy; what it does to the sums of every layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recoup.lba.config import LBA
from recoup.network.wing import FLOAT
from recoup.report.chapters import Chapter, Table, layer_tables, measured
from recoup.report.figures import MUTED, SERIES, canvas, layer_ticks, legend, name_space, plot_line, spoken, styled, svg
from recoup.report.lines import Line
from recoup.report.summary import summarize
from recoup.study.measures.lba import UnitRow
from recoup.study.quality import TOP1, Quality
from recoup.study.repairs import NONE
from recoup.study.results import Results

COLUMNS = ("layer", "K", "underflow %", "swamped %", "overflow %", "slope", "residual")
TERMS = {
    "underflowed": "Products that fell below the product format's smallest number, of all that were not zero.",
    "swamped": "Products that reached the accumulator and left its sum as it was, of all that were not zero by then.",
    "overflowed": "Sums that reached the accumulator's largest number, of all sums.",
    "slope": "Least-squares factor from the exact sums to the accumulator's; truncation makes it less than 1.",
    "residual": "What the slope leaves: root mean square, relative to the exact sums'. A gain cannot remove it.",
}


AREA = "area"
"""The table of silicon areas, whose rows have ``area`` in square micrometres; where there is none it is not shown."""


@dataclass(frozen=True, slots=True)
class Width:
    """An accumulator beside the accuracy that it allows: bits, without repair, and with the repair a verdict quotes."""

    title: str
    bits: int
    bare: Line | None
    repaired: Line | None
    area: float | None


def widths_of(results: Results) -> list[Width]:
    """Every hardware with narrow accumulators, of several the narrowest; the widest first."""
    summary = summarize(results)
    found = []
    for one in results.present:
        bits = min((config.accumulator.bits for config in one.of(LBA)), default=None)
        if bits is None or not summary.of(one.name):
            continue
        repaired = next((line for state in one.quoted if (line := summary.line(one.name, state))), None)
        area = next((row.area for row in results.rows(AREA, one.name)), None)
        found.append(Width(one.title, bits, summary.line(one.name, NONE), repaired, area))
    return sorted(found, key=lambda width: -width.bits)


def context(results: Results) -> Mapping[str, Any] | None:
    """Accuracy by width, the picture, and the rows of every config."""
    units, widths = measured(results, "units"), widths_of(results)
    if not units and not widths:
        return None
    summary = summarize(results)
    floating = summary.line(FLOAT.name, NONE)
    several = len({width.bits for width in widths}) > 1
    return {
        "widths": widths,
        "areas": any(width.area is not None for width in widths),
        "width_figure": width_figure(widths, floating, summary.quality) if several else None,
        "figure": unit_figure(units) if units else None,
        "tables": units,
    }


@styled
def width_figure(widths: Sequence[Width], floating: Line | None, quality: Quality = TOP1) -> str:
    """Accuracy or nats over the accumulator's bits, without and with repair; above is better."""
    figure, (axis,) = canvas(1, 2.6, [1])
    for index, name in enumerate(("bare", "repaired")):
        lines = [(width.bits, line) for width in widths if (line := getattr(width, name)) is not None]
        if lines:
            means = [line.reached.mean for _, line in lines]
            spread = [
                [line.reached.mean - line.reached.low for _, line in lines],
                [line.reached.high - line.reached.mean for _, line in lines],
            ]
            places = [bits + (0.06 if index else -0.06) for bits, _ in lines]
            label = ("without repair", "repaired")[index]
            axis.errorbar(
                places,
                means,
                spread,
                color=SERIES[index + 1],
                marker="so"[index],
                ls="none",
                ms=5,
                capsize=2.5,
                label=label,
            )
    if floating is not None:
        axis.axhline(floating.reached.mean, color=MUTED, lw=1, ls="--", label="float")
    axis.set_xticks(sorted({width.bits for width in widths}))
    axis.set_xlabel("accumulator, bits")
    axis.set_ylabel(quality.axis)
    if not quality.rises:
        axis.invert_yaxis()
    legend(figure, axis)
    bare = ((width.title, width.bare) for width in widths if width.bare is not None)
    said = "; ".join(f"{title}: {spoken(quality, line.reached.mean)} without repair" for title, line in bare)
    return svg(figure, "widths", f"{quality.heading} by the accumulator's bits. {said}.")


def totals(results: Results) -> list[Table]:
    """One terminal table, a row an accumulator."""
    widths, quality = widths_of(results), results.quality
    areas = any(width.area is not None for width in widths)
    rows = []
    for width in widths:
        numbers = ("" if line is None else quality.number(line.reached.mean) for line in (width.bare, width.repaired))
        area = ("" if width.area is None else f"{width.area:,.0f}",) if areas else ()
        rows.append(
            (width.title, str(width.bits), *numbers, "" if width.repaired is None else width.repaired.state, *area)
        )
    columns = ("hardware", "bits", "bare", "repaired", "by", *(("area, um2",) if areas else ()))
    return [Table(f"Accumulators: bits beside {quality.axis}", columns, tuple(rows))] if rows else []


@styled
def unit_figure(units: list[tuple[str, list[UnitRow]]]) -> str:
    """Slope and residual of every layer on a narrow accumulator, by the config's title."""
    names = list(dict.fromkeys(row.name for _, rows in units for row in rows))
    figure, axes = canvas(3, 5.4 + name_space(names), [1, 1, 1])
    said = []
    for index, (title, rows) in enumerate(units):
        places = [names.index(row.name) for row in rows]
        plot_line(axes[0], places, [row.slope for row in rows], index, title)
        plot_line(axes[1], places, [row.residual for row in rows], index, title)
        plot_line(axes[2], places, [100 * row.swamped for row in rows], index, title)
        worst = min(rows, key=lambda row: row.slope)
        said.append(f"{title}: least slope {worst.slope:.3f} in {worst.name}")
    axes[0].axhline(1, color=MUTED, lw=1)
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(bottom=0)
    axes[0].set_title("Slope of the accumulator's sums on the exact ones (1: no shrink)")
    axes[1].set_title("Residual after the slope, relative to the exact sums")
    axes[2].set_title("Products that leave the sum as it was, %")
    legend(figure, axes[0])
    layer_ticks(axes, names)
    return svg(figure, "units", f"Slope, residual and swamped products of {len(names)} layers. {'; '.join(said)}.")


def layers(results: Results) -> list[Table]:
    """A terminal table a config."""
    return layer_tables(results, "units", COLUMNS, _cells)


def _cells(row: UnitRow) -> tuple[str, ...]:
    shares = (f"{100 * share:.2f}" for share in (row.underflowed, row.swamped, row.overflowed))
    return (row.name, str(row.terms), *shares, f"{row.slope:.3f}", f"{row.residual:.3f}")


def terms(results: Results) -> Mapping[str, str]:
    """The columns, where there are any."""
    return TERMS if results.rows("units") else {}


CHAPTER = Chapter(
    template=Path(__file__).with_name("lba.html.j2"),
    context=context,
    layers=layers,
    totals=totals,
    terms=terms,
    modelled=(
        "Narrow accumulators: every product and every sum, truncated from its exact value, in the hardware's order.",
    ),
)
