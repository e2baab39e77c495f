"""LightNorm's part of a report: what norms move to and from memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.cost import Widths, widths
from recoup.plots.lightnorm import traffic_figure as draw_traffic
from recoup.plots.ratio import times
from recoup.report.chapters import Chapter, Limit, Table, measured
from recoup.report.figures import COLOURS, clear, styled, svg
from recoup.study.configs import title
from recoup.study.hardware import name_of
from recoup.study.measures.lightnorm import TrafficRow
from recoup.study.results import Results

COUNTED = (
    "read from and write to memory in a training step, counted from shapes, a pass over a feature map at its stored "
    "width: a model, our own count. "
)
PASSES = {
    "batch": "Conventional: 7 reads and 2 writes in float32; range: 5 reads and 2 writes.",
    "rows": "Layer and RMS norms: 3 reads and 2 writes, conventional and by ranges.",
}
TERMS = {
    "range": "The standard deviation is estimated from ranges in the pass that sums: a read less forward and backward.",
    "format": "Activations and gradients are stored in a narrow floating point format.",
    "blocks": (
        "Neighbouring channels share an exponent. Where a lone largest element keeps its own, a block stores two "
        "exponents and an index."
    ),
}


def _kinds(rows: Sequence[TrafficRow]) -> list[str]:
    """Of `PASSES` those that the norms of some rows take."""
    return list(dict.fromkeys("batch" if row.over == "batch" else "rows" for row in rows))


def norms(rows: Sequence[TrafficRow]) -> str:
    """What the norms of some rows are called: batch norms only where they all are."""
    return "batch norm" if _kinds(rows) == ["batch"] else "norm"


def total(rows: Sequence[TrafficRow]) -> Widths:
    """Bits that all norms move for one image in a training step."""
    names = ("conventional", "ranges", "formats", "blocks")
    return Widths(*(sum(getattr(row, name) for row in rows) for name in names))


def context(results: Results) -> Mapping[str, Any] | None:
    """The picture, and every config's title, sums and rows."""
    tables = [(name, total(rows), rows) for name, rows in measured(results, "traffic")]
    if not tables:
        return None
    every = [row for _, _, rows in tables for row in rows]
    # The picture is of batch norms' passes.
    figure = traffic_figure(results) if "batch" in _kinds(every) else None
    return {"figure": figure, "tables": tables, "norm": norms(every)}


@styled
def traffic_figure(results: Results) -> str:
    """Stored and moved bits of every config with traffic beside float32 batch norm."""
    counted = {
        title(config): config
        for one in results.present
        for config in one.of(LightNorm)
        if results.rows("traffic", one.name)
    }
    variants: dict[str, LightNorm | None] = {"float32 batch norm": None, **counted}
    figure = draw_traffic(variants, palette=COLOURS)
    clear(figure)
    said = "; ".join(f"{name}: {widths(config).blocks:g}" for name, config in variants.items())
    return svg(figure, "traffic", f"Bits an element moves in a training step, with whole blocks. {said}.")


def totals(results: Results) -> list[Table]:
    """One terminal table, a row a config."""
    rows = []
    for name, layers in measured(results, "traffic"):
        bits = total(layers)
        sizes = (f"{value / 8000:,.1f}" for value in (bits.conventional, bits.blocks))
        rows.append((name, *sizes, f"{bits.ratio:.2f}x"))
    columns = ("hardware", "float32", "unit", "less by")
    every = [row for _, layers in measured(results, "traffic") for row in layers]
    text = f"{norms(every).capitalize()} traffic an image and training step, kB (a model)"
    return [Table(text, columns, tuple(rows))] if rows else []


def saving(results: Results, config: Any) -> str:
    """How much less traffic than float32 norms."""
    rows = results.rows("traffic", name_of(config))
    return f" with {times(total(rows).ratio)} {norms(rows)} traffic in training" if rows else ""


def terms(results: Results) -> Mapping[str, str]:
    """The columns, where there are any."""
    rows = results.rows("traffic")
    if not rows:
        return {}
    said = " ".join(text for kind, text in PASSES.items() if kind in _kinds(rows))
    return {f"{norms(rows)} traffic": f"Bits that {norms(rows)}s {COUNTED}{said}", **TERMS}


CHAPTER = Chapter(
    template=Path(__file__).with_name("lightnorm.html.j2"),
    context=context,
    totals=totals,
    saving=saving,
    terms=terms,
    modelled=(
        "Range batch norm, with the network's running statistics: every rounding of inputs, parameters and results, "
        "and shared exponents. Its traffic is counted from shapes.",
    ),
    limits={
        "functions": Limit("Activation functions, residual additions, and normalisation without a LightNorm unit"),
        "memory": Limit("Memory beyond that count"),
    },
)
