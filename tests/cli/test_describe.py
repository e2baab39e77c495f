"""The command that says what a saved network is."""

import json

import pytest
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


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "x").write_text("no")
    done = CliRunner().invoke(app, ["describe", str(tmp_path / "x")])
    assert done.exit_code == 2
    assert done.stderr.startswith("recoup: load: ")
