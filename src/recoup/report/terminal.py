"""Results as terminal tables that fit 80 columns."""

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from recoup.report.chapters import Table as Cells
from recoup.report.chapters import chapters_of
from recoup.report.html import heading, interval_text
from recoup.report.pipeline import chapter_lines, chapter_verdict, delays_text, spread
from recoup.report.summary import Line, Summary, summarize
from recoup.study.pipeline import PipelineResults
from recoup.study.results import Results


def tables(results: Results, pipeline: PipelineResults | None = None) -> RenderableType:
    """The accuracy of every state, layers, cycles, a pipeline study, and the verdicts last, where the eye is."""
    summary = summarize(results)
    parts: list[RenderableType] = [Text(), _accuracy(results, summary), Text()]
    chapters = chapters_of(results)
    for chapter in chapters:
        for table in chapter.layers(results):
            parts += [_drawn(table), Text()]
    for chapter in chapters:
        for table in chapter.totals(results):
            parts += [_drawn(table), Text()]
    verdicts = list(summary.verdicts)
    if pipeline is not None:
        parts += [_pipeline(pipeline), Text()]
        verdicts.append(chapter_verdict(pipeline))
    parts += [Text(f"note: {note}", style="yellow") for note in results.notes]
    parts += [Text(verdict, style="bold") for verdict in verdicts]
    return Group(*parts, Text())


def _table(name: str, *columns: str, caption: str | None = None) -> Table:
    style = {"title_justify": "left", "caption_justify": "left", "title_style": "bold", "caption_style": "dim"}
    table = Table(title=escape(name), caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), **style)  # type: ignore[arg-type]
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _drawn(cells: Cells) -> Table:
    caption = None if cells.caption is None else escape(cells.caption)
    table = _table(cells.title, *cells.columns, caption=caption)
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
        table.add_row(f"  {line.state}", *_numbers(line))
    return table


def _numbers(line: Line) -> tuple[str, str, str, str]:
    kind = "t" if line.top1.kind == "t" else "W"
    return (
        f"{line.top1.mean:.2f}",
        f"{line.top1.low:.2f} - {line.top1.high:.2f} {kind}",
        "" if line.gain is None else f"{line.gain:+.2f}",
        "" if line.recovered is None else f"{line.recovered:.0%}",
    )


def _pipeline(chapter: PipelineResults) -> Table:
    lines = chapter_lines(chapter)
    name = f"Pipelined Backpropagation: mean and standard deviation of {max(line.seeds for line in lines)} seeds"
    columns = ("method", "training loss", "times SGDM's", "accuracy %", "diverged")
    table = _table(name, *columns, caption=delays_text(chapter))
    for line in lines:
        table.add_row(
            escape(line.label),
            spread(line.loss, line.loss_std, 3),
            "" if line.against is None else f"{line.against:.2f}",
            spread(line.accuracy, line.accuracy_std, 2),
            f"{line.diverged} of {line.seeds}",
        )
    return table
