"""Silicon's part of a report: area of every config's hardware, and accuracy against it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recoup.plots.palette import MARKERS
from recoup.report.chapters import Chapter, Table
from recoup.report.figures import SERIES, canvas, legend, plain, styled, svg
from recoup.study.measures.silicon import Joined, Placed

COLUMNS = ("hardware", "module", "NAND2", "an operation", "top-1, %")
TERMS = {
    "NAND2": "A module's cell area in two-input NANDs; wires, power grid and clock tree are not in it.",
    "an operation": "The area over the operations (multiply-accumulates, elements) that a module finishes in a cycle.",
}


def context(study: Joined) -> Mapping[str, Any]:
    """The rows, a picture a kind of hardware, what was left out, and what measured it."""
    kinds = dict.fromkeys(row.kind for row in study.rows)
    files = ", ".join(f"{name} (sha256 {digest[:12]})" for name, digest in study.liberty)
    return {
        "rows": study.rows,
        "figures": [area_figure(kind, [row for row in study.rows if row.kind == kind]) for kind in kinds],
        "left": study.left,
        "made": f"{study.tool}; {files or 'plain gates'}" if study.rows else "",
    }


@styled
def area_figure(kind: str, rows: Sequence[Placed]) -> str:
    """Accuracy over the area of an operation: configs as full marks, counterparts as open ones."""
    figure, (axis,) = canvas(1, 3.0, [1])
    said = []
    for index, config in enumerate(dict.fromkeys(row.title for row in rows)):
        colour, marker = SERIES[(index + 1) % len(SERIES)], MARKERS[(index + 1) % len(MARKERS)]
        for row in (row for row in rows if row.title == config and row.top1 is not None):
            label = None if row.counterpart else plain(config)
            fill = "none" if row.counterpart else colour
            axis.plot(row.per_operation, row.top1, color=colour, marker=marker, mfc=fill, ls="none", ms=6, label=label)
            if not row.counterpart:
                said.append(f"{config}: {row.per_operation:,.0f} NAND2 an operation, {row.top1:.2f} %")
    axis.set_xlim(left=0)
    axis.set_xlabel("area an operation, NAND2")
    axis.set_ylabel("top-1 accuracy, %")
    legend(figure, axis)
    return svg(figure, f"area-{kind.lower()}", f"Accuracy by area, {kind}. {'; '.join(said)}.")


def totals(study: Joined) -> list[Table]:
    """One terminal table; counterparts stand below their config."""
    rows = [
        (
            "" if row.counterpart else row.title,
            row.module,
            f"{row.nand2:,.0f}",
            f"{row.per_operation:,.0f}",
            "" if row.counterpart or row.top1 is None else f"{row.top1:.2f}",
        )
        for row in study.rows
    ]
    rows += [(config, reason, "", "", "") for config, reason in study.left.items()]
    return [Table("Area beside conventional counterparts", COLUMNS, tuple(rows))] if rows else []


CHAPTER = Chapter(
    template=Path(__file__).with_name("silicon.html.j2"),
    context=context,
    totals=totals,
    terms=lambda _: TERMS,
    costs=("Cell area of one module of each hardware, from a netlist that equals the emulation.",),
)
