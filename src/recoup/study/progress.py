"""One progress display for a whole study, on standard error: measurements done, and batches within the current one."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Display:
    """What is being measured and how far it is: a bar on a terminal, else a line a measurement, or nothing."""

    def __init__(
        self,
        bar: Progress | None = None,
        study: TaskID | None = None,
        step: TaskID | None = None,
        *,
        lines: Console | None = None,
        total: int = 0,
    ) -> None:
        self._bar, self._study, self._step = bar, study, step
        self._lines, self._total, self._done, self._what = lines, total, 0, ""

    def say(self, text: str) -> None:
        """A sentence that the user should read before all is measured."""
        console = self._lines if self._bar is None else self._bar.console
        if console is not None:
            console.print(f"note: {text}", soft_wrap=True, markup=False, highlight=False)

    def begin(self, what: str) -> None:
        """A measurement begins."""
        self._what = what
        if self._bar is not None and self._step is not None:
            self._bar.reset(self._step, description=what, total=None)

    def finish(self, what: str = "") -> None:
        """A measurement is done and stored, of another process too; one that was there before needs no line."""
        self._done += 1
        self._what = what or self._what
        if self._lines is not None and self._what:
            text = f"{self._done} of {self._total} measured: {self._what}"
            self._lines.print(text, soft_wrap=True, markup=False, highlight=False)
        self._what = ""
        if self._bar is not None and self._study is not None:
            self._bar.advance(self._study)

    def watch(self, batches: Any, what: str) -> "Watched":
        """The same batches, shown as they are taken."""
        return Watched(batches, what, self)

    def _pass(self, batches: Any, what: str) -> Iterator[Any]:
        if self._bar is None or self._step is None:
            yield from batches
            return
        self._bar.reset(self._step, description=what, total=len(batches))
        for batch in batches:
            yield batch
            self._bar.advance(self._step)


@dataclass(frozen=True)
class Watched:
    """Batches that can be passed over many times, each pass shown."""

    batches: Any
    what: str
    display: Display

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return self.display._pass(self.batches, self.what)


@contextmanager
def displayed(measurements: Iterable[Any], show: bool) -> Iterator[Display]:
    """A `Display` for so many measurements."""
    console, total = Console(stderr=True), len(list(measurements))
    if not show:
        yield Display()
        return
    if not console.is_terminal:
        yield Display(lines=console, total=total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        study = bar.add_task("study", total=total)
        yield Display(bar, study, bar.add_task("", total=None))
