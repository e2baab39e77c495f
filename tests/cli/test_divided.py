"""Shards, workers and clusters on the command line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recoup.cli.main import app


def evaluate(*given):
    quick = ["--model", "digits_net", "--data", "digits", "--config", "nbsmt-4t", "--limit", "20", "--seeds", "0"]
    quick += ["--calibration-images", "8", "--profile-images", "0", "--state", "paired"]
    done = CliRunner().invoke(app, ["evaluate", *quick, *given])
    return done.exit_code, done.stdout, done.stderr


def test_shards_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = evaluate("--shard", "1/2")
    assert (code, out) == (0, "")
    assert "recoup: this shard's part is done; study: 2 of 4 measurements are not made yet" in err
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    done = CliRunner().invoke(app, ["run", "recoup-results/recipe.yaml", "--shard", "auto", "--json"])
    assert done.exit_code == 0
    assert len(json.loads(done.stdout)["accuracy"]) == 3
    assert Path("recoup-results/report.html").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--shard", "2/2"), "shard 2/2: must be i/n with 0 <= i < n, here 0/2 to 1/2"),
        (("--shard", "half"), "--shard 'half': must be i/n"),
        (("--shard", "auto"), "--shard auto: neither SLURM_ARRAY_TASK_ID"),
        (("--shard", "0/2", "--overwrite"), "a shard shares its folder"),
        (("--shard", "0/2", "--save-chip", "chip.safetensors"), "--save-chip: a shard makes a part"),
        (("--workers", "2", "--cluster", "tcp://127.0.0.1:9"), "--workers and --cluster: the cluster has workers"),
        (("--cluster", "nowhere"), "must be tcp://HOST:PORT"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"):
        monkeypatch.delenv(name, raising=False)
    code, out, err = evaluate(*given)
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())
    assert not (tmp_path / "recoup-results" / "measurements.json").exists()
