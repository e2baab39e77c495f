"""Silicon's part of a report: area and energy of every config's hardware, and accuracy against both."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recoup.plots.palette import MARKERS
from recoup.report.chapters import Chapter, Table
from recoup.report.figures import SERIES, canvas, legend, plain, spoken, styled, svg, wrapped
from recoup.silicon.parts import NAMES
from recoup.study.measures.silicon import Joined
from recoup.study.quality import TOP1, Quality

COLUMNS = ("hardware", "module", "NAND2", "an operation")
SPENT = ("hardware", "module", "uJ an image", "drain gated", "fJ an operation")
TERMS = {
    "NAND2": "A module's cell area in two-input NANDs; wires, power grid and clock tree are not in it.",
    "an operation": "The area over the operations (multiply-accumulates, elements) that a module finishes in a cycle.",
}
ENERGY_TERMS = {
    "uJ an image": "Energy of one module that computes all emulated layers of an image, by toggles on the operands of "
    "test images, glitches included unless it says so; wires, memories and clock tree are not in it.",
}


def context(study: Joined) -> Mapping[str, Any]:
    """The rows, a picture a kind of hardware, what was left out, and what measured it; of areas and of energies."""
    energies = study.energies
    return {
        "rows": study.rows,
        "quality": study.quality,
        "column": column(study.quality),
        "figures": [area_figure(kind, rows, study.quality) for kind, rows in _kinds(study.rows)],
        "parts": parts_figure(divided) if (divided := [row for row in study.rows if row.parts]) else "",
        "left": study.left,
        "made": _made(study.tool, study.liberty),
        "spent": study.spent,
        "spent_figures": [energy_figure(kind, rows, study.quality) for kind, rows in _kinds(study.spent)],
        "unspent": study.unspent,
        "energies": energies,
        "figures_of": figures,
        "spent_made": _made(energies.tool, energies.liberty) if energies else "",
    }


def _kinds(rows: Sequence[Any]) -> list[tuple[str, list[Any]]]:
    kinds = dict.fromkeys(row.kind for row in rows)
    return [(kind, [row for row in rows if row.kind == kind]) for kind in kinds]


def _made(tool: str, liberty: Sequence[tuple[str, str]]) -> str:
    files = ", ".join(f"{name} (sha256 {digest[:12]})" for name, digest in liberty)
    return f"{tool}; {files or 'plain gates'}" if tool else ""


@styled
def area_figure(kind: str, rows: Sequence[Any], quality: Quality = TOP1) -> str:
    """Accuracy or nats over the area of an operation."""
    points = [(row, row.per_operation) for row in rows]
    figure, said = _points(points, "area an operation, NAND2", "{:,.0f} NAND2 an operation", quality)
    return svg(figure, f"area-{kind.lower()}", f"{quality.heading} by area, {kind}. {said}.")


@styled
def energy_figure(kind: str, rows: Sequence[Any], quality: Quality = TOP1) -> str:
    """Accuracy over the energy of an image, or nats over that of a window."""
    label, told = (quality.worded(text) for text in ("energy an image, uJ", "{:,.4g} uJ an image"))
    figure, said = _points([(row, row.image) for row in rows], label, told, quality)
    return svg(figure, f"energy-{kind.lower()}", f"{quality.heading} by energy, {kind}. {said}.")


def _points(points: Sequence[tuple[Any, float]], label: str, told: str, quality: Quality) -> tuple[Any, str]:
    """Configs as full marks, counterparts as open ones; the figure, and the configs in words."""
    figure, (axis,) = canvas(1, 3.0, [1])
    said = []
    for index, config in enumerate(dict.fromkeys(row.title for row, _ in points)):
        colour, marker = SERIES[(index + 1) % len(SERIES)], MARKERS[(index + 1) % len(MARKERS)]
        for row, x in points:
            if row.title != config or row.reached is None:
                continue
            name = None if row.counterpart else plain(config)
            fill = "none" if row.counterpart else colour
            axis.plot(x, row.reached, color=colour, marker=marker, mfc=fill, ls="none", ms=6, label=name)
            if not row.counterpart:
                said.append(f"{config}: {told.format(x)}, {spoken(quality, row.reached)}")
    axis.set_xlim(left=0)
    axis.set_xlabel(label)
    axis.set_ylabel(quality.axis)
    if not quality.rises:
        axis.invert_yaxis()
    legend(figure, axis)
    return figure, "; ".join(said)


@styled
def parts_figure(rows: Sequence[Any]) -> str:
    """A bar a module, stacked by its parts; a counterpart that stands beside several configs is drawn once."""
    bars = list({(row.kind, row.module, row.nand2): row for row in rows}.values())
    kinds = [kind for kind in NAMES if any(kind in row.parts for row in bars)]
    figure, (axis,) = canvas(1, 0.9 + 0.3 * len(bars), [1])
    for index, kind in enumerate(kinds):
        before = [sum(row.parts.get(other, 0.0) for other in kinds[:index]) for row in bars]
        width = [row.parts.get(kind, 0.0) for row in bars]
        axis.barh(range(len(bars)), width, 0.62, left=before, color=SERIES[index], label=kind)
    axis.set_yticks(range(len(bars)), [plain(wrapped(row.module, 44)) for row in bars])
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("area of a module by kind of part, NAND2")
    legend(figure, axis)
    said = "; ".join(f"{row.module}: {', '.join(f'{k} {row.parts.get(k, 0.0):,.0f}' for k in kinds)}" for row in bars)
    return svg(figure, "area-parts", f"Area by kind of part, NAND2. {said}.")


def totals(study: Joined) -> list[Table]:
    """A terminal table of areas and one of energies; counterparts stand below their config."""
    quality, last = study.quality, column(study.quality)
    areas = [
        (*_labels(row), f"{row.nand2:,.0f}", f"{row.per_operation:,.0f}", _reached(row, quality)) for row in study.rows
    ]
    areas += [(config, reason, "", "", "") for config, reason in study.left.items()]
    spent = [
        (*_labels(row), figures(row.image), figures(row.gated), f"{row.operation:,.0f}", _reached(row, quality))
        for row in study.spent
    ]
    spent += [(config, reason, "", "", "", "") for config, reason in study.unspent.items()]
    bound = ", without glitches: a lower bound" if study.energies and study.energies.lower_bound else ""
    tables = (
        Table("Area beside conventional counterparts", (*COLUMNS, last), tuple(areas)),
        Table(f"Energy beside conventional counterparts{bound}", (*map(quality.worded, SPENT), last), tuple(spent)),
    )
    return [table for table in tables if table.rows]


def figures(value: float) -> str:
    """Four figures, zeros at the end too."""
    return f"{value:#,.4g}".rstrip(".")


def _labels(row: Any) -> tuple[str, str]:
    return "" if row.counterpart else row.title, row.module


def column(quality: Quality) -> str:
    """How the last column is called: ``top-1, %``, or ``nats``."""
    return f"{quality.label}, {quality.suffix}" if quality.rises else quality.label


def _reached(row: Any, quality: Quality) -> str:
    return "" if row.counterpart or row.reached is None else quality.number(row.reached)


def terms(study: Joined) -> Mapping[str, str]:
    """Of what there is."""
    found = {**TERMS, **(ENERGY_TERMS if study.spent else {})}
    return {study.quality.worded(term): study.quality.worded(meaning) for term, meaning in found.items()}


CHAPTER = Chapter(
    template=Path(__file__).with_name("silicon.html.j2"),
    context=context,
    totals=totals,
    terms=terms,
    costs=("Cell area of one module of each hardware. `recoup silicon verify` says whether it equals the emulation.",),
)
