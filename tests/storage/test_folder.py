"""A folder is one run's: made, taken up, refused, or emptied of another's."""

import os

import pytest

from recoup.errors import RecoupError
from recoup.storage.folder import make, reserve


def stays(text):
    """Ours may be written anew, the user's own stays, others are refused."""
    if text.startswith("ours"):
        return False
    if text == "the user's own":
        return True
    raise RecoupError(f"another run: {text}")


def left(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_new_folder_is_made_with_its_record(tmp_path):
    reserve(tmp_path / "a" / "b", "record", "ours", stays)
    assert left(tmp_path / "a" / "b") == {"record": "ours"}


def test_a_run_is_taken_up_with_what_it_left(tmp_path):
    reserve(tmp_path, "record", "ours", stays, results=["result"])
    (tmp_path / "result").write_text("1")
    reserve(tmp_path, "record", "ours, and more seeds", stays, results=["result"])
    assert left(tmp_path) == {"record": "ours, and more seeds", "result": "1"}


def test_a_record_may_stay_as_it_is(tmp_path):
    (tmp_path / "record").write_text("the user's own")
    reserve(tmp_path, "record", "ours", stays)
    assert left(tmp_path) == {"record": "the user's own"}


def test_another_run_is_refused_and_nothing_changed(tmp_path):
    before = {"record": "theirs", "result": "1"}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RecoupError, match="another run: theirs"):
        reserve(tmp_path, "record", "ours", stays, results=["result"])
    assert left(tmp_path) == before


def test_overwriting_discards_results_alone_and_asks_nothing(tmp_path):
    for name in ("record", "result", "notes of the user"):
        (tmp_path / name).write_text("theirs")
    reserve(tmp_path, "record", "ours", stays, results=["result", "never written"], overwrite=True)
    assert left(tmp_path) == {"record": "ours", "notes of the user": "theirs"}


def test_a_record_that_is_no_text_is_asked_about(tmp_path):
    (tmp_path / "record").write_bytes(b"\xff\x00")
    with pytest.raises(RecoupError, match="another run: \ufffd\x00"):
        reserve(tmp_path, "record", "ours", stays)


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "results"):
        with pytest.raises(RecoupError, match=r"file(/results)?: cannot be made a folder for results \(\w+"):
            make(path)
        with pytest.raises(RecoupError, match="cannot be made a folder"):
            reserve(path, "record", "ours", stays)


def test_a_record_that_cannot_be_written_is_not_half_there(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RecoupError, match="No space"):
        reserve(tmp_path, "record", "ours", stays)
    assert left(tmp_path) == {}
