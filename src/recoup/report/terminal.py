"""Results as terminal tables that fit 80 columns."""

import re
from collections.abc import Iterator
from dataclasses import replace

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from recoup.report.chapters import Study, parts_beside, parts_of
from recoup.report.chapters import Table as Cells
from recoup.report.html import heading, interval_text, verdicts_of
from recoup.report.lines import Line
from recoup.report.ranking import narrow, ranked
from recoup.report.ranking import table as ranking
from recoup.report.summary import Summary, quoted_of, summarize
from recoup.study.quality import Quality, perplexity_text
from recoup.study.results import Results

NARROWEST = 12  # letters of a name that a column is not made narrower than, if others can


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
    found += [narrow(ranking(chips, summary.quality))] if chips else []
    for table in (_accuracy(results, summary), *map(drawn, found)):
        shown += [table, Text()]
    shown += [Text(f"note: {note}", style="yellow") for note in results.notes]
    shown += [Text(verdict, style="bold") for verdict in verdicts_of(summary, studies)]
    return Group(*shown, Text())


def _table(name: str, *columns: str, caption: str | None = None) -> Table:
    style = {"title_justify": "left", "caption_justify": "left", "title_style": "bold", "caption_style": "dim"}
    table = Table(title=escape(name), caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), **style)  # type: ignore[arg-type]
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")  # nothing is cut
    return table


def drawn(cells: Cells) -> Table:
    """A chapter's table."""
    caption = None if cells.caption is None else escape(cells.caption)
    table = _table(cells.title, *map(escape, cells.columns), caption=caption)
    for row in cells.rows:
        name, *cells_of = row
        table.add_row(escape(name) if " " in name else Name(name), *(escape(cell) for cell in cells_of))
    return table


class Name:
    """A name in parts, as ``layer1.0.conv1``, that breaks after its dots where a column is too narrow for it.

    rich would cut it at the end, where the names of a network's layers differ.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(NARROWEST, len(self.name)), len(self.name))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text("\n".join(broken(self.name, options.max_width)))


def broken(name: str, width: int) -> list[str]:
    """Lines of at most ``width`` letters, those after the first indented by two; a part that is longer is cut in two.

    >>> broken("encoder.layers.10.attention", 12)
    ['encoder.', '  layers.10.', '  attention']
    """
    lines, line, width = [], "", max(width, 3)  # an indented line holds a letter at least
    for part in re.findall(r"[^.]*\.|[^.]+", name):
        if line.strip() and len(line + part) > width:
            lines.append(line)
            line = "  "
        line += part
        while len(line) > width:
            lines.append(line[:width])
            line = "  " + line[width:]
    return [*lines, line] if line.strip() else lines


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
