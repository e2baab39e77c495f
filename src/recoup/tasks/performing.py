"""Independent measurements: which are missing, where they are made, and each kept as soon as it is made."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from recoup.errors import RecoupError
from recoup.fields import integer
from recoup.kernels import process
from recoup.tasks.bench import Keeper, Task, Value, Workbench, capability
from recoup.tasks.shards import Shard

MASKS = hasattr(signal, "pthread_sigmask")  # not on Windows, where workers take Ctrl-C as they like
Progress = Callable[[str], None]
Made = tuple[Value, str]
"""A measurement, and the capability of the processor that made it."""


def check_division(purpose: str, workers: Any, executor: Any, shard: Any = None) -> None:
    """What is said about where measurements are made, before any is.

    Raises:
        RecoupError: workers that are no number of processes, an executor without ``submit``, a shard that is none.
    """
    integer(purpose, "workers", workers, (1, 2**16))
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise RecoupError(
            f"{purpose}(executor={executor!r}): executor must have submit, as concurrent.futures.Executor, or be None"
        )
    if shard is not None and not isinstance(shard, Shard):
        raise RecoupError(f"{purpose}(shard={shard!r}): shard must be a Shard, such as Shard(0, 4), or None")


def measured(bench: Workbench, task: Task) -> Made:
    """One measurement; a function of a module, so that it can be sent to another process."""
    return bench.make(task), capability()


@dataclass
class Installed:
    """A worker's bench."""

    bench: Workbench | None = field(default=None)


_here = Installed()


def install(path: str) -> None:
    """Begin a worker: it ends with its parent, however that ends, and leaves what Ctrl-C says to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if MASKS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    process.keep_pages()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _here.bench = pickle.loads(Path(path).read_bytes())  # noqa: S301 -- written by our own parent, in a folder that is its own


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Ctrl-C waits, and in workers that are begun meanwhile until they are installed, when it ends them without a word:
    in the midst of their imports it would be a traceback each."""
    if not MASKS:
        yield
        return
    resource_tracker.ensure_running()  # which lets signals through when it begins
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def measured_here(task: Task) -> Made:
    """One measurement in a worker."""
    assert _here.bench is not None
    return measured(_here.bench, task)


def perform(
    bench: Workbench,
    tasks: Sequence[Any],
    records: Keeper,
    *,
    executor: Executor | None = None,
    workers: int = 1,
    shard: Shard | None = None,
    progress: Progress | None = None,
    begin: Progress | None = None,
    finish: Progress | None = None,
) -> int:
    """Make the measurements that are missing, each once, and keep each as soon as it is made.

    Args:
        bench: what measures.
        tasks: all of the plan, `recoup.tasks.bench.Task`s in an order that every process shares.
        records: what is there already.
        executor: anything with the ``submit`` of `concurrent.futures.Executor`; the bench goes with every task.
        workers: processes here, without an executor; 1 is this process.
        shard: only this part of the plan.
        progress: called with a line per measurement.
        begin, finish: called with a measurement's label, before it is made in this process and when it is kept.

    Returns:
        How many were made.

    Raises:
        RecoupError: a measurement that is refused, a bench that cannot be sent, a worker that was lost, or one whose
            processor has other float kernels. What was finished is kept.
        KeyboardInterrupt: with a note that says what is kept.
    """
    mine = list(tasks)[shard.index :: shard.count] if shard is not None else list(tasks)
    missing = {records.key(task.record): task for task in mine if records.get(task.record) is None}
    keep = _Keeping(bench.purpose, records, len(mine), len(mine) - len(missing), progress, finish)
    try:
        if executor is not None:
            _gather({executor.submit(measured, bench, task): task for task in missing.values()}, keep, bench.purpose)
        elif workers > 1 and len(missing) > 1:
            with _pool(bench, min(workers, len(missing))) as pool:
                with _interrupts_later():
                    futures = {pool.submit(measured_here, task): task for task in missing.values()}
                _gather(futures, keep, bench.purpose)
        else:
            for task in missing.values():
                if begin is not None:
                    begin(task.label)
                keep(task, measured(bench, task))
    except KeyboardInterrupt as interrupt:
        there = sum(records.get(task.record) is not None for task in mine)
        told = f"{there} of {len(mine)} measurements are kept {records.place}; the same command goes on from there"
        interrupt.add_note(told)
        raise
    return len(missing)


@dataclass
class _Keeping:
    """Keeps what is measured, and says so."""

    purpose: str
    records: Keeper
    total: int
    done: int
    progress: Progress | None
    finish: Progress | None

    def __call__(self, task: Task, made: Made) -> None:
        value, cpu = made
        self.records.put(task.record, value, cpu)
        if cpu != capability() and not self.records.any_cpu:
            raise RecoupError(
                f"{self.purpose}: {task.label} was measured on a processor of other float kernels ({cpu}, here "
                f"{capability()}), which may give other last bits: take workers of one kind, or both with any_cpu "
                "(--any-cpu)"
            )
        self.done += 1
        if self.finish is not None:
            self.finish(task.label)
        if self.progress is not None:
            self.progress(f"{self.done} of {self.total} measured: {task.label}")


@contextmanager
def _pool(bench: Workbench, workers: int) -> Iterator[ProcessPoolExecutor]:
    try:
        content = pickle.dumps(bench)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise RecoupError(
            f"{bench.purpose}: the network, its data or the metric cannot be sent to another process ({error}); define "
            "them in a module, or take workers=1"
        ) from None
    # By a file: what a pool hands its workers goes through a pipe, at which it waits for ever if a worker dies early.
    with TemporaryDirectory(prefix="recoup-") as folder:
        path = Path(folder) / "bench"
        path.write_bytes(content)
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), install, (str(path),))
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _gather(futures: Mapping[Future[Made], Task], keep: Callable[[Task, Made], None], purpose: str) -> None:
    """Keep each as it comes; what others finished in the same moment as one that fails is kept too."""
    left = dict(futures)
    try:
        for future in as_completed(futures):
            task = left.pop(future)
            try:
                made = future.result()
            except BrokenExecutor as error:
                raise RecoupError(
                    f"{purpose}: a worker was lost ({error}); what was finished is kept, the same command goes on"
                ) from None
            except RecoupError:
                raise
            except Exception as error:  # of the executor's machinery, whatever it is
                told = f"{type(error).__name__}: {error}"
                raise RecoupError(f"{purpose}: measuring {task.label} failed ({told})") from error
            keep(task, made)
    finally:
        for future in left:
            future.cancel()
        for future, task in left.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                with suppress(RecoupError):  # the error that ends this is told already
                    keep(task, future.result())
