"""The tensor cores' part of a report: what their adders cut from the sums of every layer."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recoup.report.chapters import Chapter, Table, layer_tables, measured
from recoup.report.figures import MUTED, canvas, layer_ticks, legend, name_space, plot_line, styled, svg
from recoup.study.measures.tensorcore import AdderRow
from recoup.study.results import Results

COLUMNS = ("layer", "K", "cut %", "lost %", "overflow %", "slope", "error")
TERMS = {
    "cut": "Products that lost bits when they were shifted to the largest exponent, of all that were not zero.",
    "lost": "Products of which nothing was left, of all that were not zero.",
    "adder overflow": "Sums that ended infinite, of all that were looked at.",
    "adder error": "Root mean square of what the unit's sums are off, relative to the exact sums of the same operands.",
}


def context(results: Results) -> Mapping[str, Any] | None:
    """The picture, and the rows of every config."""
    adders = measured(results, "adders")
    return {"figure": adder_figure(adders), "tables": adders} if adders else None


@styled
def adder_figure(adders: list[tuple[str, list[AdderRow]]]) -> str:
    """Slope, error and cut products of every layer on a tensor core, by the config's title."""
    names = list(dict.fromkeys(row.name for _, rows in adders for row in rows))
    figure, axes = canvas(3, 5.4 + name_space(names), [1, 1, 1])
    said = []
    for index, (title, rows) in enumerate(adders):
        for axis, found in ((axes[0], [row.slope for row in rows]), (axes[1], [row.error for row in rows])):
            shown = [(names.index(row.name), v) for row, v in zip(rows, found, strict=True) if v is not None]
            plot_line(axis, [place for place, _ in shown], [v for _, v in shown], index, title)
        plot_line(axes[2], [names.index(row.name) for row in rows], [100 * row.cut for row in rows], index, title)
        said.append(f"{title}: largest error {_worst(rows)}")
    axes[0].axhline(1, color=MUTED, lw=1)
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(bottom=0)
    axes[0].set_title("Slope of the unit's sums on the exact ones (1: no shrink)")
    axes[1].set_title("Error of the sums, relative to the exact ones")
    axes[2].set_title("Products that lose bits to the alignment, %")
    legend(figure, axes[0])
    layer_ticks(axes, names)
    return svg(figure, "adders", f"Slope, error and cut products of {len(names)} layers. {'; '.join(said)}.")


def _worst(rows: list[AdderRow]) -> str:
    """The largest error and its layer; a layer without a finite sum is worse than all."""
    worst = max(rows, key=lambda row: math.inf if row.error is None else row.error)
    return f"{'infinite' if worst.error is None else f'{worst.error:.2g}'} in {worst.name}"


def layers(results: Results) -> list[Table]:
    """A terminal table a config."""
    return layer_tables(results, "adders", COLUMNS, _cells)


def _cells(row: AdderRow) -> tuple[str, ...]:
    shares = (f"{100 * share:.2f}" for share in (row.cut, row.lost, row.overflowed))
    if row.slope is None:
        return (row.name, str(row.terms), *shares, "-", "-")
    return (row.name, str(row.terms), *shares, f"{row.slope:.4f}", f"{row.error:.2g}")


def terms(results: Results) -> Mapping[str, str]:
    """The columns, where there are any."""
    return TERMS if results.rows("adders") else {}


CHAPTER = Chapter(
    template=Path(__file__).with_name("tensorcore.html.j2"),
    context=context,
    layers=layers,
    terms=terms,
    modelled=(
        "Tensor cores: every group of products aligned, cut and added as in the unit, in the order of k; not the order "
        "in which a library splits long sums over thread blocks.",
    ),
)
