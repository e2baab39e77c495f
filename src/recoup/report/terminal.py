"""Results as terminal tables that fit 80 columns."""

from dataclasses import replace

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from recoup.report.chapters import Study, parts_beside, parts_of
from recoup.report.chapters import Table as Cells
from recoup.report.html import heading, interval_text, verdicts_of
from recoup.report.lines import Line
from recoup.report.ranking import ranked
from recoup.report.ranking import table as ranking
from recoup.report.summary import Summary, quoted_of, summarize
from recoup.study.quality import Quality, perplexity_text
from recoup.study.results import Results


def tables(results: Results, *beside: Study | None) -> RenderableType:
    """The accuracy of every state, layers, whole networks, other studies; the verdicts last, where the eye is."""
    summary, wings = summarize(results), parts_of(results)
    studies = parts_beside(beside, results, quoted_of(summary))
    parts = [*wings, *studies]
    worded = summary.quality.worded
    found = [table for chapter, about in parts for table in chapter.layers(about)]
    for chapter, about in parts:
        own = chapter.totals(about)
        found += [replace(table, title=worded(table.title)) for table in own] if about is results else own
    shown: list[RenderableType] = [Text()]
    chips = ranked(results, summary)
    found += [ranking(chips, summary.quality)] if chips else []
    for table in (_accuracy(results, summary), *map(drawn, found)):
        shown += [table, Text()]
    shown += [Text(f"note: {note}", style="yellow") for note in results.notes]
    shown += [Text(verdict, style="bold") for verdict in verdicts_of(summary, studies)]
    return Group(*shown, Text())


def _table(name: str, *columns: str, caption: str | None = None) -> Table:
    style = {"title_justify": "left", "caption_justify": "left", "title_style": "bold", "caption_style": "dim"}
    table = Table(title=escape(name), caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), **style)  # type: ignore[arg-type]
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def drawn(cells: Cells) -> Table:
    """A chapter's table."""
    caption = None if cells.caption is None else escape(cells.caption)
    table = _table(cells.title, *map(escape, cells.columns), caption=caption)
    for row in cells.rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _accuracy(results: Results, summary: Summary) -> Table:
    quality = summary.quality
    name = f"{quality.title}: {heading(results)}"
    columns = ("hardware and state", quality.label, "95 % interval", "gain", "won back")
    columns += ("PPL",) if quality.paired else ()
    said = [interval_text(results, summary)]
    said += [f"PPL: perplexity, exp(nats). {results.text.sentence}"] if results.text else []
    table = _table(name, *columns, caption=" ".join(said))
    last = None
    for line in summary.lines:
        if line.config != last:
            table.add_row(Text(line.title, style="bold"), end_section=False)
            last = line.config
        table.add_row(f"  {escape(line.state)}", *_numbers(line, quality))
    return table


def _numbers(line: Line, quality: Quality) -> tuple[str, ...]:
    reached, number = line.reached, quality.number
    return (
        number(reached.mean),
        f"{number(reached.low)} - {number(reached.high)} {reached.mark}",
        "" if line.gain is None else quality.signed(line.gain),
        "" if line.recovered is None else f"{line.recovered:.0%}",
        *([perplexity_text(line.second)] if quality.paired else []),
    )
