"""Work in a process of its own, beside this one's: it ends when this one does, however this one ends."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from recoup.errors import RecoupError
from recoup.study.machine import cores

Told = Callable[[int, int], None]
"""Called with what is done of how much."""
SECONDS = 10  # that work which is broken off has to put away what it is writing


@contextmanager
def alongside(what: str, work: Callable[..., None], *arguments: Any) -> Iterator[Callable[[], None]]:
    """Run ``work(*arguments, told)`` in a process of its own; what is yielded waits for it and shows how far it is.

    Left before it is done, the work is broken off. On one core it is done here instead, when it is waited for.

    Args:
        what: what the work is, for its progress and its errors.
        work: a function at the top of a module; it calls ``told`` with what is done of how much.
        arguments: pickled.

    Raises:
        RecoupError: from what is yielded: the work's error, or that its process ended without a word.
    """
    if cores() < 2:
        yield lambda: _here(what, work, arguments)
        return
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_there, args=(sender, work, arguments), daemon=True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for the parent to answer
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    sender.close()  # so that the end of the process is the end of the pipe
    try:
        yield lambda: _wait(what, receiver, process)
    finally:
        process.terminate()
        process.join(SECONDS)
        process.kill()
        process.join()


def _there(sender: Connection, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """What the process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # by an exception, which leaves no temporary file
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(*arguments, lambda *far: sender.send(far))
        said = None
    except Exception as error:  # whatever it is, it is the parent's to tell
        said = [str(error) if isinstance(error, RecoupError) else f"{type(error).__name__}: {error}"]
        said.append(traceback.format_exc())
    sender.send(said)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()  # killed or not, its end of a pipe is closed
    os.kill(os.getpid(), signal.SIGTERM)


def _wait(what: str, receiver: Connection, process: Any) -> None:
    with _shown(what) as told:
        try:
            while isinstance(said := receiver.recv(), tuple):
                if not receiver.poll():  # the newest is what is so
                    told(*said)
        except EOFError:
            process.join()
            raise RecoupError(f"{what}: the process for it ended, with exit code {process.exitcode}") from None
    if said is not None:
        error = RecoupError(f"{what}: {said[0]}")
        error.add_note(said[1])
        raise error


def _here(what: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with _shown(what) as told:
        work(*arguments, told)


@contextmanager
def _shown(what: str) -> Iterator[Told]:
    """How far it is, on standard error: a bar on a terminal, else a line each time that it is told."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: console.print(f"{what}: {done} of {total} updates", soft_wrap=True, highlight=False)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
