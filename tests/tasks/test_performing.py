"""Measurements in processes of their own: nothing is lost with a worker, and no worker outlives its parent."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from recoup.errors import RecoupError
from recoup.tasks.bench import Workbench, capability
from recoup.tasks.performing import measured, perform
from recoup.tasks.shards import Shard


@dataclass(frozen=True)
class Square:
    number: int

    @property
    def label(self) -> str:
        return f"the square of {self.number}"

    @property
    def record(self) -> int:
        return self.number


@dataclass
class Squares(Workbench):
    """Writes down what it measures; 13 kills its process, 17 waits for ever, the first time."""

    folder: Path
    purpose = "squares"

    def make(self, task):
        with (self.folder / "made").open("a") as file:
            file.write(f"{task.number} {os.getpid()}\n")
        first = self.folder / f"first-{task.number}"
        if task.number in (13, 17) and not first.exists():
            first.touch()
            if task.number == 13:
                time.sleep(0.5)
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return {"square": task.number**2}


class Kept(dict):
    any_cpu = False
    place = "in a dict"

    def key(self, record):
        return str(record)

    def put(self, record, value, cpu):
        assert record not in self
        self[record] = value | {"cpu": cpu}


def tasks(*numbers):
    return [Square(number) for number in numbers]


def made(folder):
    return [int(line.split()[0]) for line in (folder / "made").read_text().splitlines()]


def test_in_this_process_each_once(tmp_path):
    kept, lines, begun, finished = Kept(), [], [], []
    kept.put(2, {"square": 4}, capability())
    told = {"progress": lines.append, "begin": begun.append, "finish": finished.append}
    assert perform(Squares(tmp_path), tasks(1, 2, 3, 3), kept, **told) == 2
    assert made(tmp_path) == [1, 3]
    assert lines == ["3 of 4 measured: the square of 1", "4 of 4 measured: the square of 3"]
    assert begun == finished == ["the square of 1", "the square of 3"]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shards_make_all_of_it_each_once(tmp_path, order):
    kept = Kept()
    for index in order:
        perform(Squares(tmp_path), tasks(*range(7)), kept, shard=Shard(index, 3))
    assert sorted(made(tmp_path)) == sorted(kept) == list(range(7))


def test_a_worker_of_other_float_kernels_is_not_mixed_in(tmp_path):
    class Elsewhere(Executor):
        def submit(self, fn, /, *args, **_):
            future = Future()
            future.set_result((fn(*args)[0], "riscv64 RVV"))
            return future

    kept = Kept()
    with pytest.raises(RecoupError, match=r"the square of \d was measured on a processor of other.*any-cpu"):
        perform(Squares(tmp_path), tasks(1, 2), kept, executor=Elsewhere())
    kept = Kept()
    kept.any_cpu = True
    perform(Squares(tmp_path), tasks(1, 2), kept, executor=Elsewhere())
    assert {value["cpu"] for value in kept.values()} == {"riscv64 RVV"}


def test_what_was_finished_beside_a_failure_is_kept(tmp_path):
    class AtOnce(Executor):
        def submit(self, fn, /, *args, **_):
            future = Future()
            if args[1].number == 1:
                future.set_exception(RuntimeError("no"))
            else:
                future.set_result(fn(*args))
            return future

    kept = Kept()
    with pytest.raises(RecoupError, match=r"squares: measuring the square of 1 failed \(RuntimeError: no\)"):
        perform(Squares(tmp_path), tasks(*range(9)), kept, executor=AtOnce())
    assert sorted(kept) == [0, *range(2, 9)]


def test_a_bench_that_cannot_be_sent(tmp_path):
    bench = Squares(tmp_path)
    bench.other = lambda: None
    with pytest.raises(RecoupError, match=r"squares: the network.*cannot be sent.*or take workers=1"):
        perform(bench, tasks(1, 2), Kept(), workers=2)


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_that_was_finished(tmp_path):
    kept = Kept()
    with pytest.raises(RecoupError, match="squares: a worker was lost"):
        perform(Squares(tmp_path), tasks(1, 2, 13, 4, 5), kept, workers=2)
    before = set(kept)
    assert {1, 2} <= before
    perform(Squares(tmp_path), tasks(1, 2, 13, 4, 5), kept, workers=2)
    assert sorted(kept) == [1, 2, 4, 5, 13]
    assert all(made(tmp_path).count(number) == 1 for number in before)


def _parent(folder):
    perform(Squares(folder), tasks(17, 2), Kept(), workers=2)


def _alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_no_worker_outlives_a_killed_parent(tmp_path):
    parent = multiprocessing.get_context("spawn").Process(target=_parent, args=(tmp_path,))
    parent.start()
    try:
        _until((tmp_path / "first-17").exists)
        workers = {int(line.split()[1]) for line in (tmp_path / "made").read_text().splitlines()}
        assert all(map(_alive, workers))
    finally:
        parent.kill()
        parent.join()
    _until(lambda: not any(map(_alive, workers)))


INTERRUPTED = """
import sys
from pathlib import Path
from tests.tasks.test_performing import Kept, Squares, perform, tasks
if __name__ == "__main__":
    try:
        perform(Squares(Path(sys.argv[1])), tasks(17, 3, 2), Kept(), workers=2)
    except KeyboardInterrupt as interrupt:
        print(*interrupt.__notes__)
"""


def _workers(parent):
    """Its processes that are being begun or run: those of multiprocessing that are no trackers."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            own = path.read_text().rpartition(")")[2].split()[1] == str(parent)
            if own and "spawn_main" in (path.parent / "cmdline").read_text():
                yield int(path.parent.name)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds workers in /proc")
def test_an_interrupt_while_workers_are_begun_is_told_once(tmp_path):
    (tmp_path / "script.py").write_text(INTERRUPTED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *filter(None, sys.path)])}
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        env=environment, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    _until(lambda: len(list(_workers(parent.pid))) == 2)
    time.sleep(0.1)  # in the midst of their imports
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
    out, err = parent.communicate(timeout=60)
    assert out.startswith("0 of 3 measurements are kept in a dict")
    assert err == ""


def _until(so, seconds=120.0):
    begun = time.monotonic()
    while not so():
        assert time.monotonic() - begun < seconds
        time.sleep(0.05)


def test_a_measurement_is_stamped_with_the_processor(tmp_path):
    assert measured(Squares(tmp_path), Square(3)) == ({"square": 9}, capability())
