"""Workers from a batch system, by dask-jobqueue: what becomes of the jobs is told, not only logged."""

import asyncio
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from recoup.errors import RecoupError

PIP = "pip install 'recoup[cluster]'"


class System(NamedTuple):
    """A batch system as dask-jobqueue and its users know it."""

    cluster: str  # dask-jobqueue's class
    lists: str  # the command that lists jobs
    logs: str  # where a job's output goes if nobody says


SYSTEMS = {
    "slurm": System("SLURMCluster", "squeue", "slurm-JOB.out in the folder that the command was started in"),
    "pbs": System("PBSCluster", "qstat", "NAME.oJOB and NAME.eJOB in the folder that the command was started in"),
    "sge": System("SGECluster", "qstat", "NAME.oJOB and NAME.eJOB in the home folder, or where the job ran"),
    "lsf": System("LSFCluster", "bjobs", "the mail that LSF sends, or bpeek JOB"),
    "oar": System("OARCluster", "oarstat", "OAR.JOB.stdout and OAR.JOB.stderr in the folder of the command"),
}
"""Batch systems by the word before the colon."""
SETTINGS = {"partition": "queue", "queue": "queue", "account": "account", "walltime": "walltime", "memory": "memory"}
"""What may follow it -> what dask-jobqueue calls it."""
MOST = 600
"""Characters of what it printed that are told."""


@dataclass
class Submissions:
    """What the batch system answered, in words: dask-jobqueue minds when its jobs are held by others."""

    accepted: list[str] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    asked: set["asyncio.Future[None]"] = field(default_factory=set)

    def job(self, kind: Any) -> Any:
        """A class of jobs that keep the answer here; dask-jobqueue logs an error only, and asks again."""
        submissions = self

        class Told(kind):
            _call = staticmethod(_printed)

            async def start(self) -> None:
                answer = asyncio.ensure_future(super().start())
                submissions.asked.add(answer)
                try:
                    await answer
                    submissions.accepted.append(str(self.job_id))
                # Whatever a command, or what it printed, ends in; or nobody waits for it any longer.
                except (Exception, asyncio.CancelledError) as error:
                    self.status = type(self.status).running  # as dask expects of a start that returns
                    submissions.rejected.append(_said(error))
                finally:
                    submissions.asked.discard(answer)

            async def close(self) -> None:
                await super().close()
                self.status = type(self.status).closed  # which a cluster that closes asks of jobs that are still held

        return Told

    def wait(self, count: int, seconds: float, late: Callable[[float], None]) -> None:
        """Until every submission is answered; all are made at once. ``late`` is called with how long that takes."""
        since, patience = time.monotonic(), seconds
        while len(self.accepted) + len(self.rejected) < count:
            time.sleep(0.02)
            if time.monotonic() - since >= patience:
                late(patience)
                patience *= 2

    def give_up(self) -> None:
        """Wait for no answer any longer; called by the loop that does."""
        for answer in self.asked:
            answer.cancel()


async def _printed(cmd: Sequence[str], *, shell: bool = False, **kwargs: Any) -> str:
    """What a command of the batch system prints; as dask-jobqueue's own, but that the command ends with who waits."""
    run: Any = asyncio.create_subprocess_shell if shell else asyncio.create_subprocess_exec
    process = await run(*cmd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, **kwargs)
    try:
        out, err = (text.decode(errors="replace") for text in await process.communicate())
    except asyncio.CancelledError:
        process.kill()
        await process.communicate()
        raise
    if process.returncode:
        said = f"{out} {err}".strip() or "nothing"
        raise RuntimeError(f"`{' '.join(cmd)}` ended with {process.returncode} and said: {said}")
    return out


def _said(error: BaseException) -> str:
    """How a submission ended, in one line."""
    text = str(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= MOST else f"{text[:MOST]}..."


@contextmanager
def _ctrl_c_stays() -> Iterator[None]:
    """dask-jobqueue, when it is loaded, makes Ctrl-C end the process with success and without a word."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if before is not None and signal.getsignal(signal.SIGINT) is not before:
            signal.signal(signal.SIGINT, before)


@contextmanager
def queue(where: str, count: int, asked: dict[str, str], seconds: float, tell: Callable[[str], None]) -> Iterator[Any]:
    """Workers of one core each, as a cluster of dask-jobqueue; they are given back in the end.

    Args:
        where: what the user wrote, which begins with the batch system's name.
        count: of workers.
        asked: settings by the words of `SETTINGS`.
        seconds: without an answer, or without any worker, before something is said.
        tell: called with a line for what is lost or late.

    Raises:
        RecoupError: dask-jobqueue is not installed, memory that is no size, a machine that the batch system takes no
            jobs from, or a batch system that takes none of these jobs.
    """
    try:
        with _ctrl_c_stays():
            import dask_jobqueue
        from dask.utils import parse_bytes
    except ImportError:
        raise RecoupError(f"--cluster {where!r}: dask-jobqueue is not installed: {PIP}") from None
    kind = where.partition(":")[0]
    system = getattr(dask_jobqueue, SYSTEMS[kind].cluster)
    program = system.job_cls.submit_command.split()[0]
    if shutil.which(program) is None:  # Dask would log that again and again, and wait for workers for ever
        raise RecoupError(f"--cluster {where!r}: there is no {program} here: run this where {kind} takes jobs")
    submissions = Submissions()
    settings = {"memory": "4GB"} | {SETTINGS[name]: value for name, value in asked.items()}
    try:
        parse_bytes(settings["memory"])
    except ValueError:
        raise RecoupError(f"--cluster {where!r}: memory must be a size such as 4GB") from None
    made = system(cores=1, processes=1, job_cls=submissions.job(system.job_cls), **settings)
    with made:
        made.scale(count)
        unanswered = f"--cluster {where!r}: {program} has not answered for"
        try:
            submissions.wait(count, seconds, lambda so_far: tell(f"{unanswered} {so_far:g} s. Ctrl-C ends the wait"))
        except BaseException:  # Ctrl-C, for one: closing the cluster would wait on
            made.loop.add_callback(submissions.give_up)
            raise
        _check(where, kind, count, submissions, made.job_header, tell)
        with _watched(where, kind, made, submissions, seconds, tell):
            yield made


def _check(where: str, kind: str, count: int, answers: Submissions, header: str, tell: Callable[[str], None]) -> None:
    if not answers.rejected:
        return
    why = f"{answers.rejected[0]} (asked for with: {'; '.join(header.splitlines())})"
    if not answers.accepted:
        raise RecoupError(f"--cluster {where!r}: {kind} takes no job: {why}")
    tell(f"--cluster {where!r}: {kind} took {len(answers.accepted)} of {count} jobs, which go on: {why}")


@contextmanager
def _watched(
    where: str, kind: str, made: Any, submissions: Submissions, seconds: float, tell: Callable[[str], None]
) -> Iterator[None]:
    """While jobs are out, say so when there has been no worker for a while: a job that dies at once tells nobody."""
    log = _configured(kind)
    jobs = ", ".join(submissions.accepted[:8]) + (", ..." if len(submissions.accepted) > 8 else "")
    advice = (
        f"`{SYSTEMS[kind].lists}` says whether jobs {jobs} wait or are gone; what a job that is gone printed lies in "
        f"{log or SYSTEMS[kind].logs}. Ctrl-C ends the wait, and what is measured is kept"
    )
    over = threading.Event()

    def watch() -> None:
        since, patience = time.monotonic(), seconds
        while not over.wait(min(1.0, seconds / 10)):
            if made.scheduler_info["workers"]:
                since, patience = time.monotonic(), seconds
            elif time.monotonic() - since >= patience:
                tell(f"--cluster {where!r}: no worker of {kind} for {patience:g} s: {advice}")
                patience *= 2

    thread = threading.Thread(target=watch, name="recoup-jobs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _configured(kind: str) -> str | None:
    """The folder for logs that Dask's own configuration names."""
    from dask.config import get

    return get(f"jobqueue.{kind}.log-directory", None)
