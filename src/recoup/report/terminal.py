"""Results as terminal tables that fit 80 columns."""

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from recoup.report.chapters import MOST_LAYERS, chapters_of
from recoup.report.chapters import Table as Cells
from recoup.report.html import heading, interval_text
from recoup.report.pipeline import chapter_lines, chapter_verdict, delays_text, spread
from recoup.report.summary import Cycles, Line, Summary, summarize
from recoup.study.configs import title
from recoup.study.measures.nbsmt import LayerRow
from recoup.study.pipeline import PipelineResults
from recoup.study.results import Results


def tables(results: Results, pipeline: PipelineResults | None = None) -> RenderableType:
    """The accuracy of every state, layers, cycles, a pipeline study, and the verdicts last, where the eye is."""
    summary = summarize(results)
    parts: list[RenderableType] = [Text(), _accuracy(results, summary), Text()]
    for config in results.recipe.configs:
        rows = [row for row in results.rows("layers") if row.config == repr(config)]
        if rows:
            parts += [_layers(title(config), rows), Text()]
    chapters = chapters_of(results)
    for chapter in chapters:
        for table in chapter.layers(results):
            parts += [_drawn(table), Text()]
    if summary.cycles:
        parts += [_cycles(results, list(summary.cycles.values())), Text()]
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


def _layers(name: str, rows: list[LayerRow]) -> Table:
    caption = None
    if len(rows) > MOST_LAYERS:
        worst = sorted(rows, key=lambda row: row.error, reverse=True)[: MOST_LAYERS // 2]
        caption = f"the {len(worst)} of {len(rows)} layers with the largest error; all are in layers.csv"
        rows = [row for row in rows if row in worst]
    columns = ("layer", "threads", "collisions %", "lossy %", "utilization %", "error")
    table = _table(f"Layers without repair: {name}", *columns, caption=caption)
    for row in rows:
        rates = (f"{100 * rate:.1f}" for rate in (row.collisions, row.lossy, row.utilization))
        table.add_row(escape(row.name), str(row.threads), *rates, f"{row.error:.1e}")
    return table


def _cycles(results: Results, rows: list[Cycles]) -> Table:
    array = results.recipe.array
    table = _table(
        f"Cycles an image, array of {array.rows} x {array.columns}", "hardware", "cycles", "fewer by", "emulated layers"
    )
    table.add_row("1 thread (8 bit)", f"{rows[0].single:,}")
    for row in rows:
        table.add_row(row.title, f"{row.cycles:,}", f"{row.speedup:.2f}x", f"{row.emulated_speedup:.2f}x")
    return table


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
