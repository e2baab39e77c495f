"""What benchmarks keep: a value is measured once, and again when it is of something else."""

import json

import pytest
from benchmarks.log import Log, append, rows_of


def test_a_value_of_another_design_is_measured_anew(tmp_path):
    path, runs = tmp_path / "log.jsonl", []

    def measured(log, of):
        return log.measure(("area", "unit"), lambda: runs.append(of) or float(len(runs)), of)

    first = Log(path)
    assert [measured(first, "a"), measured(first, "a"), measured(Log(path), "a")] == [1.0] * 3
    assert [measured(Log(path), "b"), measured(Log(path), "b")] == [2.0] * 2
    assert runs == ["a", "b"]
    assert Log(path).values == {("area", "unit"): 2.0}
    assert Log(path).of == {("area", "unit"): "b"}


def test_rows_without_a_design_are_kept_where_none_is_asked_for_and_measured_anew_where_one_is(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"key": ["speed"], "value": 3.0}) + "\n")
    assert Log(path).measure(("speed",), lambda: 4.0) == 3.0
    assert Log(path).measure(("speed",), lambda: 4.0, "a design") == 4.0
    assert json.loads(path.read_text().splitlines()[-1]) == {"key": ["speed"], "value": 4.0, "of": "a design"}


def test_what_fails_leaves_the_log_as_it_was(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    with pytest.raises(ZeroDivisionError):
        log.measure(("a",), lambda: 1 / 0, "x")
    assert log.values == log.of == {}


def test_a_line_that_a_kill_left_without_its_end_is_none(tmp_path):
    path = tmp_path / "log.jsonl"
    assert rows_of(path) == []
    append(path, {"key": ["a"], "value": 1.0}, {"key": ["b"], "value": 2.0})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": ["c"], "val')
    assert Log(path).values == {("a",): 1.0, ("b",): 2.0}
    assert Log(path).measure(("c",), lambda: 3.0) == 3.0
    assert path.read_bytes() == whole + b'{"key": ["c"], "value": 3.0}\n'
