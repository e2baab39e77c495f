"""LBA's part of a report: what narrow accumulators do to the sums of every layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recoup.report.chapters import Chapter, Table, layer_tables, measured
from recoup.report.figures import MUTED, canvas, layer_ticks, legend, name_space, plot_line, styled, svg
from recoup.study.measures.lba import UnitRow
from recoup.study.results import Results

COLUMNS = ("layer", "K", "underflow %", "swamped %", "overflow %", "slope", "residual")
TERMS = {
    "underflowed": "Products that fell below the product format's smallest number, of all that were not zero.",
    "swamped": "Products that reached the accumulator and left its sum as it was, of all that were not zero by then.",
    "overflowed": "Sums that reached the accumulator's largest number, of all sums.",
    "slope": "Least-squares factor from the exact sums to the accumulator's; truncation makes it less than 1.",
    "residual": "What the slope leaves: root mean square, relative to the exact sums'. A gain cannot remove it.",
}


def context(results: Results) -> Mapping[str, Any] | None:
    """The picture, and the rows of every config."""
    units = measured(results, "units")
    return {"figure": unit_figure(units), "tables": units} if units else None


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
    terms=terms,
    modelled=(
        "Narrow accumulators: every product and every sum, truncated from its exact value, in the hardware's order.",
    ),
)
