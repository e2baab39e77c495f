"""Results as terminal tables that fit 80 columns."""

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from recoup.report.chapters import Study, parts_beside, parts_of
from recoup.report.chapters import Table as Cells
from recoup.report.html import heading, interval_text, verdicts_of
from recoup.report.ranking import ranked
from recoup.report.ranking import table as ranking
from recoup.report.summary import Line, Summary, quoted_of, summarize
from recoup.study.results import Results


def tables(results: Results, *beside: Study | None) -> RenderableType:
    """The accuracy of every state, layers, whole networks, other studies; the verdicts last, where the eye is."""
    summary, wings = summarize(results), parts_of(results)
    studies = parts_beside(beside, results, quoted_of(summary))
    parts = [*wings, *studies]
    found = [table for chapter, about in parts for table in chapter.layers(about)]
    found += [table for chapter, about in parts for table in chapter.totals(about)]
    shown: list[RenderableType] = [Text()]
    chips = ranked(results, summary)
    found += [ranking(chips)] if chips else []
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
    name = f"Top-1 accuracy, %: {heading(results)}"
    columns = ("hardware and state", "top-1", "95 % interval", "gain", "won back")
    table = _table(name, *columns, caption=interval_text(results, summary))
    last = None
    for line in summary.lines:
        if line.config != last:
            table.add_row(Text(line.title, style="bold"), end_section=False)
            last = line.config
        table.add_row(f"  {escape(line.state)}", *_numbers(line))
    return table


def _numbers(line: Line) -> tuple[str, str, str, str]:
    kind = "t" if line.top1.kind == "t" else "W"
    return (
        f"{line.top1.mean:.2f}",
        f"{line.top1.low:.2f} - {line.top1.high:.2f} {kind}",
        "" if line.gain is None else f"{line.gain:+.2f}",
        "" if line.recovered is None else f"{line.recovered:.0%}",
    )
