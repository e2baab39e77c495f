"""The command that says what a saved network is."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import recoup as rc
from recoup.cli.main import app
from tests.test_ledger import BATCHES, network


@pytest.mark.slow
def test_a_saved_network_is_described(tmp_path):
    rc.save(rc.repair_(network("mix"), BATCHES), tmp_path / "chip")
    done = CliRunner().invoke(app, ["describe", str(tmp_path / "chip")])
    assert done.exit_code == 0
    assert f"classifier: {rc.LBA.biased(3, 4)!r}; gain (correct_gain_, 13 images)" in done.stdout
    told = json.loads(CliRunner().invoke(app, ["describe", str(tmp_path / "chip"), "--json"]).stdout)
    assert told["layers"]["classifier"]["repairs"] == ["gain (correct_gain_, 13 images)"]
    assert told["recoup"] == rc.__version__


def test_a_layer_that_runs_one_thread_is_called_so(tmp_path):
    layers = (nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
    rc.calibrate_(model.eval(), [torch.rand(2, 4, 5, 5)])
    with pytest.warns(rc.RecoupWarning, match="are grouped convolutions and run one thread"):
        rc.emulate_(model, rc.NBSMT(threads=2))
    rc.save(model, tmp_path / "chip")
    done = CliRunner().invoke(app, ["describe", str(tmp_path / "chip")])
    told = done.stdout.splitlines()
    assert told[:-1] == str(rc.describe(model)).splitlines()
    assert [line.endswith(" (one thread because grouped)") for line in told[:-1]] == [True, False]
    found = json.loads(CliRunner().invoke(app, ["describe", str(tmp_path / "chip"), "--json"]).stdout)["layers"]
    assert {name: line["note"] for name, line in found.items()} == {"2": "one thread because grouped", "4": ""}
    assert rc.describe(model).to_dict()["2"]["note"] == "one thread because grouped"


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "x").write_text("no")
    done = CliRunner().invoke(app, ["describe", str(tmp_path / "x")])
    assert done.exit_code == 2
    assert done.stderr.startswith("recoup: load: ")


def test_a_file_that_is_not_there(tmp_path):
    for path, where in ((tmp_path / "none", tmp_path / "none"), (tmp_path, tmp_path / "recoup.safetensors")):
        done = CliRunner().invoke(app, ["describe", str(path)])
        assert (done.exit_code, done.stderr) == (2, f"recoup: load: {where}: no such file\n")
