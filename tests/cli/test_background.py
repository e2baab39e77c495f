import multiprocessing
import os
import signal
import time
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import pytest

from recoup import RecoupError
from recoup.cli import background
from recoup.cli.background import alongside
from tests import fresh


@pytest.fixture(autouse=True)
def _two_cores_and_processes_that_start_at_once(monkeypatch):
    ensure_running()  # now, that it does not inherit the ignored SIGINT
    monkeypatch.setattr(background, "cores", lambda: 2)
    monkeypatch.setattr(background, "get_context", lambda _: fresh.CONTEXT)


def counting(path, told):
    for number in range(1, 4):
        told(number, 3)
    Path(path).write_text(str(os.getpid()))


def failing(kind, told):
    told(1, 2)
    raise kind("no room")


def dying(told):
    os.kill(os.getpid(), signal.SIGKILL)


def sleeping(path, told):
    try:
        Path(path).write_text(str(os.getpid()))
        time.sleep(600)
    finally:
        Path(path).unlink()


def parent(path, context):
    background.cores = lambda: 2
    background.get_context = lambda kind: multiprocessing.get_context(context or kind)
    with alongside("sleep", sleeping, path) as wait:
        wait()


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_it_is_done_by_another_process_and_shown(tmp_path, capsys):
    with alongside("count", counting, tmp_path / "pid") as wait:
        wait()
    assert int((tmp_path / "pid").read_text()) != os.getpid()
    lines = capsys.readouterr().err.splitlines()
    assert set(lines) <= {f"count: {number} of 3 updates" for number in (1, 2, 3)}


def test_on_one_core_it_is_done_here_when_it_is_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(background, "cores", lambda: 1)
    with alongside("count", counting, tmp_path / "pid") as wait:
        assert not (tmp_path / "pid").exists()
        wait()
    assert int((tmp_path / "pid").read_text()) == os.getpid()
    assert capsys.readouterr().err.splitlines() == [f"count: {number} of 3 updates" for number in (1, 2, 3)]
    with alongside("fail", failing, RecoupError) as wait, pytest.raises(RecoupError, match=r"^no room$"):
        wait()


@pytest.mark.parametrize(("kind", "said"), [(RecoupError, "no room"), (OSError, "OSError: no room")])
def test_its_error_is_a_recoup_error_here(kind, said):
    with alongside("fail", failing, kind) as wait, pytest.raises(RecoupError) as caught:
        wait()
    assert str(caught.value) == f"fail: {said}"
    assert "in failing" in caught.value.__notes__[0]


def test_a_process_that_dies_is_told():
    with alongside("die", dying) as wait, pytest.raises(RecoupError, match=r"^die: .* exit code -9$"):
        wait()


def test_what_is_left_early_is_broken_off_and_puts_its_files_away(tmp_path):
    def interrupted():
        with alongside("sleep", sleeping, tmp_path / "file"):
            until((tmp_path / "file").exists)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("context", ["fork", pytest.param(None, marks=pytest.mark.slow)])
def test_it_ends_with_its_parent_however_that_ends(tmp_path, number, context):
    process = fresh.Fresh(parent, tmp_path / "file", context)
    until(lambda: (tmp_path / "file").exists() and (tmp_path / "file").read_text())
    process.signal(number)
    done = process.wait(60)
    assert done.returncode
    until(lambda: not (tmp_path / "file").exists())
