"""What benchmarks keep: a value is measured once, and again when it is of something else; a run once, by its epochs."""

import json
import math
import statistics
from functools import partial

import pytest
from benchmarks import pipeline_cifar10, pipeline_converged, pipeline_digits, pipeline_text
from benchmarks.log import Log, append, ends, finite, rows_of

from recoup.pipeline import automatic, delays
from recoup.study.measures.pipeline import PB, SGDM, Setting, study


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


def test_only_a_run_s_last_epoch_ends_it_and_of_two_rows_the_later_holds(tmp_path):
    path = tmp_path / "log.jsonl"
    assert ends(path, "method", "seed") == {}
    row = {"method": "a", "seed": 0, "epoch": 0, "epochs": 2, "loss": 3.0}
    append(path, row, {**row, "seed": 1}, {**row, "epoch": 1, "loss": 2.0})
    assert ends(path, "method", "seed") == {("a", 0): {**row, "epoch": 1, "loss": 2.0}}
    append(path, {**row, "epoch": 1, "loss": 1.0})
    assert ends(path, "seed")[0,]["loss"] == 1.0


def test_what_is_no_number_is_null():
    assert [finite(value) for value in (0.5, math.nan, math.inf, -math.inf)] == [0.5, None, None, None]


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """The digits' study of a small network with an empty log and two seeds; the runs that it makes."""
    found = []

    def recorded(*given):
        results = study(*given)
        found.extend(results.rows)
        return results

    monkeypatch.setattr(pipeline_digits, "LOG", tmp_path / "log.jsonl")
    monkeypatch.setattr(pipeline_digits, "SEEDS", range(2))
    monkeypatch.setattr(pipeline_digits, "Setting", partial(Setting, stages=3, width=8))
    monkeypatch.setattr(pipeline_digits, "study", recorded)
    return found


COLUMN = (100, 2, 0.008, 0.5)


def test_digits_have_a_row_a_run_and_epoch_and_go_on_after_the_runs_that_ended(digits):
    pipeline_digits.measure(COLUMN, [SGDM, PB])
    whole = rows_of(pipeline_digits.LOG)
    runs = [(method, delay, seed) for method, delay in ((SGDM, 0), (PB, 15)) for seed in range(2)]
    assert [(r["method"], r["delay"], r["seed"], r["epoch"]) for r in whole] == [
        (*run, epoch) for run in runs for epoch in range(2)
    ]
    assert all((r["update_size"], r["epochs"], r["rate"]) == (100, 2, 0.008) for r in whole)
    for run, first, last in zip(digits, whole[::2], whole[1::2], strict=True):
        assert first["loss"] == statistics.mean(run.losses[:4]) > last["loss"] == run.loss
        assert (first["top1"], last["top1"]) == (run.accuracies[3], run.accuracy)
    pipeline_digits.LOG.write_text("".join(json.dumps(row) + "\n" for row in whole[:3]))  # a run and half a run
    for _ in range(2):
        pipeline_digits.measure(COLUMN, [SGDM, PB])
        assert [(run.label, run.seed) for run in digits[4:]] == [(SGDM, 1), (PB, 0), (PB, 1)]
    again = ends(pipeline_digits.LOG, *pipeline_digits.FIELDS)
    # Fewer runs at once: a batched matrix product may sum in another order.
    assert [row["loss"] for row in again.values()] == pytest.approx([r["loss"] for r in whole[1::2]])
    assert pipeline_digits.values(again, COLUMN, PB, "loss") == [row["loss"] for row in again.values()][2:]


def test_digits_that_diverge_are_null_in_the_log_and_no_number_in_tables(digits):
    column = (100, 1, 1e12, 0.5)
    pipeline_digits.measure(column, [PB])
    rows, ended = rows_of(pipeline_digits.LOG), ends(pipeline_digits.LOG, *pipeline_digits.FIELDS)
    assert [(row["loss"], row["top1"]) for row in rows] == [(None, None)] * 2
    assert all(math.isnan(value) for value in pipeline_digits.values(ended, column, PB, "top1"))
    assert (
        pipeline_digits.markdown({"hot": pipeline_digits.table(ended, column)}).splitlines()[3] == "| PB | diverged |"
    )


def test_text_trains_what_the_log_lacks(tmp_path, monkeypatch):
    runs = []

    def trained(*run):
        runs.append(run)
        return {"loss": 2.0, "nats": 2.5}

    monkeypatch.setattr(pipeline_text, "LOG", tmp_path / "log.jsonl")
    monkeypatch.setattr(pipeline_text, "trained", trained)
    given = [("stash", "1F1B", 0, 0.002), ("stash", "1F1B", 1, 0.002), ("stash", "fine-grained", 0, 0.002)]
    for run in (*given, *given):
        pipeline_text.measure(*run)
    assert runs == given
    assert rows_of(pipeline_text.LOG)[0] == {
        "method": "stash",
        "delay": 9,
        "seed": 0,
        "epoch": 0,
        "loss": 2.0,
        "nats": 2.5,
        "delays": "1F1B",
        "rate": 0.002,
        "updates": 1500,
        "epochs": 1,
    }
    assert pipeline_text.found("stash", "1F1B", 0.002) == {0: 2.5, 1: 2.5}


def test_cifar10_has_a_row_a_run_and_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline_cifar10, "LOG", tmp_path / "log.jsonl")
    cases, setting = [(method, seed) for method in ("sgdm", "sc") for seed in (0, 1, 2)], {"epochs": 2, "stretch": 4}
    for epoch in range(2):
        found = [{"loss": 2.0 - epoch, "top1": 10.0 * epoch + run} for run in range(6)]
        found[4] = {"loss": None, "top1": None}
        append(pipeline_cifar10.LOG, *pipeline_cifar10.rows(cases, found, epoch, setting))
    assert delays(len(automatic(pipeline_cifar10.network(0))))[0] == 60
    assert [row["delay"] for row in rows_of(pipeline_cifar10.LOG)] == [0, 0, 0, 240, 240, 240] * 2
    lines = pipeline_cifar10.table(setting).splitlines()
    assert lines[2] == "| sgdm | 11.00 ± 1.00 | 1.000 ± 0.000 |  |"
    assert lines[3:] == ["| sc | 1 of 3 diverged | 1 of 3 diverged | 1 of 3 diverged |"]


@pytest.mark.parametrize("script", [pipeline_cifar10, pipeline_converged, pipeline_digits, pipeline_text])
def test_committed_logs_have_a_line_a_run_and_epoch(script):
    def refused(constant):
        raise AssertionError(f"{constant} is no JSON")

    rows = [json.loads(line, parse_constant=refused) for line in script.LOG.read_text("utf-8").splitlines()]
    figure = "nats" if script is pipeline_text else "top1"
    assert all(list(row)[:6] == ["method", "delay", "seed", "epoch", "loss", figure] for row in rows)
    assert all(0 <= row["epoch"] < row["epochs"] for row in rows)
    runs = [tuple((name, value) for name, value in row.items() if name not in ("loss", figure)) for row in rows]
    if script is not pipeline_converged:  # its grid's runs are its one-epoch study's too
        assert len(set(runs)) == len(runs)


@pytest.mark.parametrize("column", pipeline_digits.DOCUMENTED.values(), ids=pipeline_digits.DOCUMENTED)
def test_digits_log_has_every_epoch_of_the_documentation_s_columns(column):
    rows = rows_of(pipeline_digits.LOG)
    for method in pipeline_digits.METHODS:
        run = dict(zip(pipeline_digits.FIELDS, pipeline_digits.key(column, method), strict=False))
        found = [(row["seed"], row["epoch"]) for row in rows if run.items() <= row.items()]
        assert found == [(seed, epoch) for seed in range(5) for epoch in range(column[1])]
