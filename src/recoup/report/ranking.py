"""Chips of one study, ranked: accuracy after repair against what they cost, in a table and a picture."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from recoup.network.wing import FLOAT
from recoup.plots.palette import MARKERS
from recoup.report.chapters import Table
from recoup.report.figures import MUTED, SERIES, canvas, legend, plain, spoken, styled, svg
from recoup.report.lines import Line, against_float
from recoup.report.summary import Summary, quoted_line
from recoup.study.intervals import Estimate
from recoup.study.quality import Quality
from recoup.study.repairs import NONE
from recoup.study.results import Results
from recoup.study.rows import CostRow, PricedRow

CAPTION = (
    "By {by}, each in the state that its verdict quotes; ~: not told apart from the one above. Lost: {unit} against "
    "float on the same {samples}, with its 95 % interval. Cycles and traffic: against the float network on the same "
    "array; bits: mean width of accumulators. Better: as {good} for fewer cycles, or {better} for as many."
)

INTERVAL = "95 % interval"
PRICED = ("uJ", "mm2")
PRICES = (
    "uJ of one {sample}, and mm2: of the layers and units that hardware is generated for; the notes name the others."
)


@dataclass(frozen=True, slots=True)
class Ranked:
    """A chip in the state that its verdict quotes.

    Attributes:
        line: its accuracy, or nats.
        cost: what it costs.
        cycles, traffic: against the float network.
        lost: points of top-1 or nats against the float network on the same samples, and its interval.
        beaten: by which other chip, the best of those that are as good for fewer cycles, or better for as many; or "".
        same: whether the test samples and seeds cannot tell it from the next better one.
    """

    line: Line
    cost: CostRow
    cycles: float
    traffic: float
    lost: Estimate
    beaten: str = ""
    same: bool = False

    @property
    def mark(self) -> str:
        """Behind its name."""
        return f"({self.beaten} is better)" if self.beaten else ""


def ranked(results: Results, summary: Summary) -> list[Ranked]:
    """The chips of a study with policies, the best first; none where a study has none."""
    quality = summary.quality
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
            lost = against_float(results, line.config, line.state)
            assert lost is not None
            found.append(Ranked(line, own, *shares, lost))
    found.sort(key=lambda chip: (-quality.better(chip.line.reached.mean), chip.cost.cycles))
    return [
        Ranked(
            *(chip.line, chip.cost, chip.cycles, chip.traffic, chip.lost),
            beaten=next((other.line.config for other in found if _beats(quality, other, chip)), ""),
            same=place > 0 and _alike(chip, found[place - 1]),
        )
        for place, chip in enumerate(found)
    ]


def _alike(one: Ranked, other: Ranked) -> bool:
    """Whether the intervals of what is lost against float overlap, for hard samples are hard for every chip."""
    return one.lost.high >= other.lost.low and other.lost.high >= one.lost.low


def _beats(quality: Quality, one: Ranked, other: Ranked) -> bool:
    better, than = (-quality.better(chip.line.reached.mean) for chip in (one, other))
    pairs = [(one.cost.cycles, other.cost.cycles), (better, than)]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def narrow(full: Table) -> Table:
    """The ranking without what the table of all states says too: the interval of what a chip reaches."""
    place = full.columns.index(INTERVAL)
    rows = tuple((*row[:place], *row[place + 1 :]) for row in full.rows)
    return replace(full, columns=(*full.columns[:place], *full.columns[place + 1 :]), rows=rows)


def table(chips: list[Ranked], quality: Quality) -> Table:
    """The ranking as text."""
    priced = any(isinstance(chip.cost, PricedRow) for chip in chips)
    columns = ("chip", "state", quality.label, INTERVAL, "lost", "cycles", "traffic", "bits")
    by, good, better = ("accuracy", "accurate", "more accurate") if quality.rises else ("nats", "good", "better")
    caption = CAPTION.format(by=by, unit=quality.unit, samples=quality.samples, good=good, better=better)
    if priced:
        columns, caption = (*columns, *PRICED), f"{caption} {PRICES.format(sample=quality.sample)}"
    return Table(f"Chips by {by}", columns, tuple((*_cells(chip, quality), *_priced(chip)) for chip in chips), caption)


def _priced(chip: Ranked) -> tuple[str, ...]:
    """Energy and area, where they were counted."""
    if not isinstance(chip.cost, PricedRow):
        return ()
    return tuple("" if value is None else f"{value / 1e6:.4g}" for value in (chip.cost.energy, chip.cost.area))


def _cells(chip: Ranked, quality: Quality) -> tuple[str, ...]:
    line, number = chip.line, quality.number
    return (
        f"{line.config} {chip.mark}".rstrip(),
        line.state,
        f"{'~ ' * chip.same}{number(line.reached.mean)}",
        f"{number(line.reached.low)} - {number(line.reached.high)}",
        f"{quality.signed(chip.lost.mean)} ({quality.signed(chip.lost.low)} to {quality.signed(chip.lost.high)})",
        f"{chip.cycles:.2f}",
        f"{chip.traffic:.2f}",
        f"{chip.cost.bits:.1f}",
    )


def context(results: Results, summary: Summary) -> Mapping[str, Any] | None:
    """The table's parts and the picture; None where there is nothing to rank."""
    chips = ranked(results, summary)
    if not chips:
        return None
    return {"table": table(chips, summary.quality), "figure": ranking_figure(results, summary, chips)}


@styled
def ranking_figure(results: Results, summary: Summary, chips: list[Ranked]) -> str:
    """Top-1 accuracy or nats against cycles, a mark a chip, with the float network's as a line; above is better."""
    quality = summary.quality
    figure, (axis,) = canvas(1, 3.8, [1])
    for index, chip in enumerate(chips):
        reached = chip.line.reached
        look = {"color": SERIES[(index + 1) % len(SERIES)], "marker": MARKERS[(index + 1) % len(MARKERS)]}
        spread = [[reached.mean - reached.low], [reached.high - reached.mean]]
        axis.errorbar(chip.cycles, reached.mean, spread, **look, ls="none", capsize=2.5, label=plain(chip.line.config))
    floating = summary.line(FLOAT.name, NONE)
    assert floating is not None
    axis.axhline(floating.reached.mean, color=MUTED, ls="--", lw=1, label="float")
    axis.set_xlabel("cycles, relative to the float network on the same array")
    axis.set_title("Top-1 accuracy after repair, %" if quality.rises else "Nats a token after repair; less is better")
    if not quality.rises:
        axis.invert_yaxis()
    legend(figure, axis)
    values = {chip: spoken(quality, chip.line.reached.mean) for chip in chips}
    said = "; ".join(f"{c.line.config}: {value} at {c.cycles:.2f} of the cycles" for c, value in values.items())
    what = quality.heading.removesuffix(" a token")
    return svg(figure, "ranking", f"{what} of {len(chips)} chips on {results.data_name} against cycles. {said}.")
