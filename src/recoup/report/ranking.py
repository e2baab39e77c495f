"""Chips of one study, ranked: accuracy after repair against what they cost, in a table and a picture."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recoup.network.wing import FLOAT
from recoup.plots.palette import MARKERS
from recoup.report.chapters import Table
from recoup.report.figures import MUTED, SERIES, canvas, legend, plain, styled, svg
from recoup.report.summary import Line, Summary, quoted_line
from recoup.study.repairs import NONE
from recoup.study.results import Results
from recoup.study.rows import CostRow, PricedRow

COLUMNS = ("chip", "state", "top-1", "95 % interval", "lost", "cycles", "traffic", "bits")
CAPTION = (
    "By accuracy, each in the state that its verdict quotes; ~: not told apart from the one above. Lost: points "
    "against float. Cycles and traffic: against the float network on the same array; bits: mean width of "
    "accumulators. Beaten: another chip is as accurate for fewer cycles, or more accurate for as many."
)

PRICED = ("uJ", "mm2")
PRICES = "uJ an image, and mm2: of the layers and units that hardware is generated for; the notes name the others."


@dataclass(frozen=True, slots=True)
class Ranked:
    """A chip in the state that its verdict quotes.

    Attributes:
        line: its accuracy.
        cost: what it costs.
        cycles, traffic: against the float network.
        lost: points against the float network.
        beaten: whether another chip has its accuracy for fewer cycles, or a better one for as many.
        same: whether the test images and seeds cannot tell it from the next better one.
    """

    line: Line
    cost: CostRow
    cycles: float
    traffic: float
    lost: float
    beaten: bool = False
    same: bool = False

    @property
    def mark(self) -> str:
        """Behind its name."""
        return "(beaten)" if self.beaten else ""


def ranked(results: Results, summary: Summary) -> list[Ranked]:
    """The chips of a study with policies, the most accurate first; none where a study has none."""
    costs = {row.config: row for row in results.costs}
    floating = summary.line(FLOAT.name, NONE)
    if FLOAT.name not in costs or floating is None:
        return []
    first = costs[FLOAT.name]
    found = []
    for one in results.present:
        if summary.of(one.name) and one.name in costs:
            line, own = quoted_line(summary, one), costs[one.name]
            shares = (own.cycles / (first.cycles or 1), own.traffic / (first.traffic or 1))
            found.append(Ranked(line, own, *shares, floating.top1.mean - line.top1.mean))
    found.sort(key=lambda chip: (-chip.line.top1.mean, chip.cost.cycles))
    return [
        Ranked(
            *(chip.line, chip.cost, chip.cycles, chip.traffic, chip.lost),
            beaten=any(_beats(other, chip) for other in found),
            same=place > 0 and chip.line.top1.high >= found[place - 1].line.top1.low,
        )
        for place, chip in enumerate(found)
    ]


def _beats(one: Ranked, other: Ranked) -> bool:
    pairs = [(one.cost.cycles, other.cost.cycles), (-one.line.top1.mean, -other.line.top1.mean)]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def table(chips: list[Ranked]) -> Table:
    """The ranking as text."""
    priced = any(isinstance(chip.cost, PricedRow) for chip in chips)
    columns, caption = ((*COLUMNS, *PRICED), f"{CAPTION} {PRICES}") if priced else (COLUMNS, CAPTION)
    return Table("Chips by accuracy", columns, tuple((*_cells(chip), *_priced(chip)) for chip in chips), caption)


def _priced(chip: Ranked) -> tuple[str, ...]:
    """Energy and area, where they were counted."""
    if not isinstance(chip.cost, PricedRow):
        return ()
    return tuple("" if value is None else f"{value / 1e6:.4g}" for value in (chip.cost.energy, chip.cost.area))


def _cells(chip: Ranked) -> tuple[str, ...]:
    line = chip.line
    return (
        f"{line.config} {chip.mark}".rstrip(),
        line.state,
        f"{'~ ' * chip.same}{line.top1.mean:.2f}",
        f"{line.top1.low:.2f} - {line.top1.high:.2f}",
        f"{chip.lost:+.2f}",
        f"{chip.cycles:.2f}",
        f"{chip.traffic:.2f}",
        f"{chip.cost.bits:.1f}",
    )


def context(results: Results, summary: Summary) -> Mapping[str, Any] | None:
    """The table's parts and the picture; None where there is nothing to rank."""
    chips = ranked(results, summary)
    if not chips:
        return None
    return {"table": table(chips), "figure": ranking_figure(results, summary, chips)}


@styled
def ranking_figure(results: Results, summary: Summary, chips: list[Ranked]) -> str:
    """Top-1 accuracy against cycles, a mark a chip, with the float network's as a line."""
    figure, (axis,) = canvas(1, 3.8, [1])
    for index, chip in enumerate(chips):
        top1 = chip.line.top1
        look = {"color": SERIES[(index + 1) % len(SERIES)], "marker": MARKERS[(index + 1) % len(MARKERS)]}
        spread = [[top1.mean - top1.low], [top1.high - top1.mean]]
        axis.errorbar(chip.cycles, top1.mean, spread, **look, ls="none", capsize=2.5, label=plain(chip.line.config))
    floating = summary.line(FLOAT.name, NONE)
    assert floating is not None
    axis.axhline(floating.top1.mean, color=MUTED, ls="--", lw=1, label="float")
    axis.set_xlabel("cycles, relative to the float network on the same array")
    axis.set_title("Top-1 accuracy after repair, %")
    legend(figure, axis)
    said = "; ".join(f"{c.line.config}: {c.line.top1.mean:.2f} % at {c.cycles:.2f} of the cycles" for c in chips)
    return svg(figure, "ranking", f"Accuracy of {len(chips)} chips on {results.data_name} against cycles. {said}.")
