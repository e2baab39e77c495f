"""The progress of training, on standard error: a bar on a terminal, else a line an epoch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Shown:
    """How far a training is: call it with so many steps."""

    def __init__(self, bar: Progress | None = None, total: int = 0, lines: Console | None = None) -> None:
        self._bar, self._lines = bar, lines
        self._task = None if bar is None else bar.add_task("train", total=total)

    def __call__(self, steps: int) -> None:
        """So many steps more are done."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, steps)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch is done; a terminal shows that by its bar."""
        if self._lines is not None:
            where = f"{row['stage']}, " if "stage" in row else ""
            top1 = "" if row["top1"] is None else f", top-1 {row['top1']:.2f} %"
            text = f"{where}epoch {row['epoch']}: loss {row['loss']:.4g}{top1}"
            self._lines.print(text, soft_wrap=True, markup=False, highlight=False)


@contextmanager
def bar(shown: bool, total: int) -> Iterator[Shown]:
    """What shows the progress of so many steps."""
    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield Shown(lines=console if shown else None)
        return
    columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as shown_bar:
        yield Shown(shown_bar, total)
