"""The progress bar of training, on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def bar(shown: bool, total: int) -> Iterator[Callable[[int], None]]:
    """A function that advances the bar by so many steps."""
    if not shown:
        yield lambda _: None
        return
    columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown_bar:
        task = shown_bar.add_task("train", total=total)
        yield lambda steps: shown_bar.advance(task, steps)
