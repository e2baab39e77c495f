"""Files are whole or not there, whatever happens."""

import os
import stat

import pytest

from recoup.storage.files import write_atomically


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
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_kill_between_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_):
        raise error

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (type(path), "replace")), fail)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == ["file"]
