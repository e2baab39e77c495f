"""Measurements on a cluster, by Dask distributed: the extra ``recoup[cluster]``."""

import os
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from recoup.errors import RecoupError, RecoupWarning
from recoup.tasks.bench import Workbench
from recoup.tasks.jobs import PIP, SETTINGS, SYSTEMS, queue

LEGAL = f"tcp://HOST:PORT of a Dask scheduler, or {'|'.join(SYSTEMS)}:n=WORKERS[,{'=...,'.join(SETTINGS)}=...]"


class OnCluster(Executor):
    """An executor of a Dask client that sends a bench to the workers once, not with every measurement.

    A worker that is lost takes nothing with it: its measurements, and the bench if no other worker has it, are made
    again elsewhere. What is sent is unpacked beside the modules of the folder that the command was started in, as here.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._inner = client.get_executor(pure=False)
        self._sent: dict[int, tuple[Workbench, str, Any]] = {}
        self._folder = os.getcwd()  # noqa: PTH109 -- a string for sys.path

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As `concurrent.futures.Executor.submit`, for a function of a bench and what follows it."""
        bench, *others = args
        if id(bench) not in self._sent:  # kept beside its number, which would otherwise be another's one day
            # Made by a task, not scattered: what is computed comes again if its worker is lost. Dask carries this
            # process's objects to its workers as pickles anyway; no file that a user brings is loaded so.
            content = self._client.submit(bytes, pickle.dumps(bench), pure=False)
            self._sent[id(bench)] = bench, uuid4().hex, content
        _, name, content = self._sent[id(bench)]
        return self._inner.submit(_called, self._folder, fn, name, content, pickle.dumps((others, kwargs)))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let go of the benches; the client is its owner's to close."""
        self._sent.clear()
        self._inner.shutdown(wait=wait and not cancel_futures)


@dataclass
class Unpacked:
    """The bench that a worker used last."""

    name: str = ""
    bench: Any = None
    lock: Any = field(default_factory=threading.Lock)


_here = Unpacked()


def _called(folder: str, fn: Callable[..., Any], name: str, content: bytes, others: bytes) -> Any:
    """In a worker: a function of a bench, which is unpacked once."""
    with _here.lock:
        if folder not in sys.path:
            sys.path.append(folder)
        if _here.name != name:
            _here.bench, _here.name = pickle.loads(content), name  # noqa: S301 -- sent by our own client
        bench = _here.bench
        args, kwargs = pickle.loads(others)  # noqa: S301 -- the same
    return fn(bench, *args, **kwargs)


@contextmanager
def cluster(where: str, seconds: float = 30.0, tell: Callable[[str], None] | None = None) -> Iterator[Executor]:
    """A cluster to measure on.

    Args:
        where: ``tcp://HOST:PORT``, a scheduler that runs; or ``slurm:n=8,partition=cpu``: workers of one core each that
            are asked for here and given back in the end.
        seconds: how long to wait for the scheduler, or for a first worker. Of a batch system that does not answer, and
            of its workers, which may wait for hours, it is told that none is there, and where to look; again after
            twice that time, and so on.
        tell: called with such a line, from another thread, and with how many jobs were refused where others were taken;
            None warns.

    Raises:
        RecoupError: the extra is not installed, an address that is none, a scheduler or workers that do not answer, a
            machine that the batch system takes no jobs from, or jobs that it takes none of.

    Warns:
        RecoupWarning: what ``tell`` is called with, where it is None.
    """
    tell = tell or _warned
    try:
        from dask.distributed import Client  # type: ignore[attr-defined]
    except ImportError:
        raise RecoupError(f"--cluster {where!r}: Dask distributed is not installed: {PIP}") from None
    kind, _, settings = where.partition(":")
    if kind in SYSTEMS:
        with queue(where, *_workers(where, settings), seconds, tell) as jobs, Client(jobs, timeout=seconds) as client:
            yield OnCluster(client)
        return
    if kind not in ("tcp", "tls", "ucx", "inproc"):
        raise RecoupError(f"--cluster {where!r}: must be {LEGAL}")
    try:
        client = Client(where, timeout=seconds)
    except (OSError, ValueError) as error:
        raise RecoupError(f"--cluster {where!r}: no scheduler answers within {seconds:g} s ({error})") from None
    with client:
        if not client.scheduler_info()["workers"]:
            try:
                client.wait_for_workers(1, timeout=seconds)
            except TimeoutError:
                raise RecoupError(f"--cluster {where!r}: the scheduler has no worker after {seconds:g} s") from None
        yield OnCluster(client)


def _workers(where: str, settings: str) -> tuple[int, dict[str, str]]:
    """How many, and what else is asked for."""
    pairs = [part.partition("=") for part in settings.split(",") if part]
    values = {name: value for name, equals, value in pairs if equals}
    count = values.pop("n", "")
    legal = len(values) + bool(count) == len(pairs) and set(values) <= SETTINGS.keys()
    if not legal or not count.isdecimal() or int(count) == 0:
        raise RecoupError(f"--cluster {where!r}: must be {LEGAL}")
    return int(count), values


def _warned(line: str) -> None:
    warnings.warn(line, RecoupWarning, stacklevel=2)
