"""Independent measurements: which are missing, where they are made, and each kept as soon as it is made."""

import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from recoup.errors import RecoupError
from recoup.search.bench import Bench, Value
from recoup.search.records import Records

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """One measurement: a policy by explicit names, float layers left out."""

    label: str
    hardware: Mapping[str, Any]

    @classmethod
    def of(cls, label: str, assignment: Mapping[str, Any]) -> "Task":
        """Of an assignment that names float layers too."""
        return cls(label, {name: config for name, config in assignment.items() if config is not None})

    @property
    def policy(self) -> dict[str, str]:
        """As text, for records."""
        return {name: repr(config) for name, config in self.hardware.items()}


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a plan that one of several processes makes: measurements i, i + n, i + 2n, ...

    Args:
        index: 0 to ``count`` - 1.
        count: how many there are.

    Raises:
        RecoupError: no such part.

    >>> Shard.parse("1/4")
    Shard(index=1, count=4)
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (self.index, self.count))
        if not whole or not 0 <= self.index < self.count:
            raise RecoupError(f"shard {self.index}/{self.count}: must be i/n with 0 <= i < n, such as 0/4")

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """``i/n``, or ``auto``: from the environment of a SLURM array job or an indexed Kubernetes job.

        Raises:
            RecoupError: neither, or no such environment.
        """
        if text == "auto":
            return cls._from_environment(os.environ)
        index, slash, count = text.partition("/")
        if not slash or not index.isdecimal() or not count.isdecimal():
            raise RecoupError(f"--shard {text!r}: must be i/n with 0 <= i < n, such as 0/4, or auto")
        return cls(int(index), int(count))

    @classmethod
    def _from_environment(cls, environment: Mapping[str, str]) -> "Shard":
        if "SLURM_ARRAY_TASK_ID" in environment:
            return cls._from_slurm(environment)
        kubernetes = ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS")
        if all(name in environment for name in kubernetes):
            return cls(*(_number(environment, name) for name in kubernetes))
        raise RecoupError(
            "--shard auto: neither SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT nor JOB_COMPLETION_INDEX and "
            "JOB_COMPLETIONS (which a Kubernetes job must be given by hand) are set; give i/n"
        )

    @classmethod
    def _from_slurm(cls, environment: Mapping[str, str]) -> "Shard":
        """Of an array whose indices are evenly spaced; of others SLURM does not say which index is which part."""
        own, count = (_number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "COUNT"))
        first, step = (_number(environment, f"SLURM_ARRAY_TASK_{n}", d) for n, d in (("MIN", "0"), ("STEP", "1")))
        last = _number(environment, "SLURM_ARRAY_TASK_MAX", str(first + (count - 1) * step))
        if step < 1 or not count or last != first + (count - 1) * step or own not in range(first, last + 1, step):
            raise RecoupError(
                f"--shard auto: the SLURM array of {count} tasks from {first} to {last} is not spaced by {step}: "
                "submit it as --array=0-N, or give i/n"
            )
        return cls((own - first) // step, count)


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name, default)
    if not text.isdecimal():
        raise RecoupError(f"--shard auto: {name} is {text!r}, no number; give i/n")
    return int(text)


def measured(bench: Bench, task: Task) -> Value:
    """One measurement; a function of a module, so that it can be sent to another process."""
    return bench.measured(task.hardware, task.label)


@dataclass
class Installed:
    """A worker's bench: it is sent once, not with every measurement."""

    bench: Bench | None = field(default=None)


_here = Installed()


def install(path: str) -> None:
    """Begin a worker."""
    _here.bench = pickle.loads(Path(path).read_bytes())  # noqa: S301 -- written by our own parent, in a folder that is its own


def measured_here(task: Task) -> Value:
    """One measurement in a worker."""
    assert _here.bench is not None
    return measured(_here.bench, task)


def perform(
    bench: Bench,
    tasks: Sequence[Task],
    records: Records,
    *,
    executor: Executor | None = None,
    workers: int = 1,
    shard: Shard | None = None,
    progress: Progress | None = None,
) -> int:
    """Make the measurements that are missing, each once, and keep each as soon as it is made.

    Args:
        bench: what measures.
        tasks: all of the plan, in an order that every process shares.
        records: what is there already.
        executor: anything with the ``submit`` of `concurrent.futures.Executor`; the bench goes with every task.
        workers: processes here, without an executor; 1 is this process.
        shard: only this part of the plan.
        progress: called with a line per measurement.

    Returns:
        How many were made.

    Raises:
        RecoupError: a measurement that is refused, a bench that cannot be sent, a worker that was lost. What was
            finished is kept.
        KeyboardInterrupt: with a note that says what is kept.
    """
    mine = list(tasks)[shard.index :: shard.count] if shard is not None else list(tasks)
    missing = {records.key(task.policy): task for task in mine if records.get(task.policy) is None}
    done = len(mine) - len(missing)

    def keep(task: Task, value: Value) -> None:
        nonlocal done
        records.put(task.policy, value)
        done += 1
        if progress is not None:
            progress(f"{done} of {len(mine)} measured: {task.label}")

    try:
        if executor is not None:
            _gather({executor.submit(measured, bench, task): task for task in missing.values()}, keep)
        elif workers > 1 and len(missing) > 1:
            with _pool(bench, workers) as pool:
                _gather({pool.submit(measured_here, task): task for task in missing.values()}, keep)
        else:
            for task in missing.values():
                keep(task, measured(bench, task))
    except KeyboardInterrupt as interrupt:
        where = "in memory" if records.folder is None else f"in {records.folder}"
        interrupt.add_note(f"{done} of {len(mine)} measurements are kept {where}; the same command goes on from there")
        raise
    return len(missing)


@contextmanager
def _pool(bench: Bench, workers: int) -> Iterator[ProcessPoolExecutor]:
    try:
        content = pickle.dumps(bench)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise RecoupError(
            f"search: the network, its data or the metric cannot be sent to another process ({error}); define them in "
            "a module, or take workers=1"
        ) from None
    # By a file: what a pool hands its workers goes through a pipe, at which it waits for ever if a worker dies early.
    with TemporaryDirectory(prefix="recoup-") as folder:
        path = Path(folder) / "bench"
        path.write_bytes(content)
        pool = ProcessPoolExecutor(workers, get_context("spawn"), install, (str(path),))
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _gather(futures: Mapping[Future[Value], Task], keep: Callable[[Task, Value], None]) -> None:
    try:
        for future in as_completed(futures):
            try:
                value = future.result()
            except BrokenExecutor as error:
                raise RecoupError(
                    f"search: a worker was lost ({error}); what was finished is kept, the same command goes on"
                ) from None
            except RecoupError:
                raise
            except Exception as error:  # of the executor's machinery, whatever it is
                told = f"{type(error).__name__}: {error}"
                raise RecoupError(f"search: measuring {futures[future].label} failed ({told})") from error
            keep(futures[future], value)
    finally:
        for future in futures:
            future.cancel()
