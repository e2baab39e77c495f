import json
import os
import stat

import pytest

from recoup.errors import RecoupError
from recoup.storage.files import write_atomically
from recoup.study.store import FILE, Store

IDENTITY = {"model": "a", "calibration": {"images": 4}, "layers": {}}


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


def test_measurements_survive(tmp_path):
    store = Store(tmp_path / "a" / "b", IDENTITY)
    store.put("one", {"top1": 1.5})
    store.put("two", [1, 2])
    again = Store(tmp_path / "a" / "b", IDENTITY)
    assert "one" in again
    assert "three" not in again
    assert again["one"] == {"top1": 1.5}
    assert len(again) == 2


def test_an_interrupted_put_is_not_there(tmp_path, monkeypatch):
    store = Store(tmp_path, IDENTITY)
    store.put("one", 1)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(KeyboardInterrupt):
            store.put("two", 2)
    assert "two" not in store
    assert len(Store(tmp_path, IDENTITY)) == 1


def test_another_study_is_refused_and_named(tmp_path):
    Store(tmp_path, IDENTITY).put("one", 1)
    other = {**IDENTITY, "calibration": {"images": 8}, "data": "digits"}
    with pytest.raises(RecoupError, match=r"calibration.images was 4, is 8; data was None, is 'digits'.*--overwrite"):
        Store(tmp_path, other)
    fresh = Store(tmp_path, other, overwrite=True)
    assert len(fresh) == 0
    fresh.put("two", 2)
    assert "one" not in Store(tmp_path, other)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", "null", '{"schema": 99, "identity": {}, "measurements": {}}', "\x00", "[" * 100_000],
)
def test_foreign_and_truncated_files(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(RecoupError, match="not a file of finished measurements"):
        Store(tmp_path, IDENTITY)
    assert (tmp_path / FILE).read_text() == content


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecoupError, match="cannot be made a folder"):
        Store(tmp_path / "file" / "results", IDENTITY)


def test_values_json_cannot_hold_are_refused(tmp_path):
    store = Store(tmp_path, IDENTITY)
    with pytest.raises(ValueError, match="JSON"):
        store.put("nan", float("nan"))
    assert json.loads(json.dumps(len(store))) == 0
