"""Files are whole or not there, whatever happens."""

import os
import stat
import subprocess
import sys

import pytest

from recoup.storage.files import NoSpaceError, write_atomically


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["text: é\n", b"\x00bytes"])
def test_write_replaces_the_whole_file(tmp_path, content):
    path = tmp_path / "file"
    path.write_text("old and much longer than the new one")
    write_atomically(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert leftovers(tmp_path) == ["file"]


def test_written_files_have_the_users_usual_mode(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(13, "Permission denied"), OSError(28, "No space left")])
def test_a_kill_between_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_):
        raise error

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (type(path), "replace")), fail)
    full = isinstance(error, OSError) and error.errno == 28
    kind = NoSpaceError if full else type(error) if isinstance(error, OSError) else error
    with pytest.raises(kind) as told:
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == ["file"]
    assert not full or str(told.value) == f"{path}: cannot be written (No space left on device); it is as it was before"


LIMITED = """
import resource, sys
from pathlib import Path
from recoup.storage.files import NoSpaceError, keeping, write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
write_atomically(Path("small"), "x" * 64)
try:
    with keeping(lambda: "small is kept"):
        write_atomically(Path("large"), "x" * 65)
except NoSpaceError as error:
    sys.exit(str(error))
"""


def test_a_limit_on_the_size_of_files_is_told_with_what_is_kept(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == "large: cannot be written (File too large); nothing of it is left; small is kept\n"
    assert leftovers(tmp_path) == ["small"]
