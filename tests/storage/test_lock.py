"""A folder is one process's at a time, and free again when that process is gone, however it went."""

import subprocess
import sys

import pytest

from recoup.errors import RecoupError
from recoup.storage.lock import Lock

HOLDS = """
import os, signal, sys
from pathlib import Path
from recoup.storage.lock import Lock
lock = Lock(Path(sys.argv[1]), "other")
print("held", flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_another_process_is_refused_by_name_until_it_dies(tmp_path):
    path = tmp_path / "run.lock"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(RecoupError, match=rf"mine: {tmp_path} is in use by another run \(process {other.pid}, which"):
        Lock(path, "mine", wait=0.1)
    other.stdin.write("\n")
    other.stdin.flush()
    with Lock(path, "mine", wait=20) as lock:  # waits for it
        assert path.read_text("ascii").strip().isdecimal()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    lock.release()
    Lock(path, "mine", wait=0.0).release()
