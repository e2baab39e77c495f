"""Measurements on disk: they survive, and those of another study are refused."""

import json
import os

import pytest

from recoup.errors import RecoupError
from recoup.study.store import FILE, Store

IDENTITY = {"model": "a", "calibration": {"images": 4}, "layers": {}}


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
