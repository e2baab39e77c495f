"""Studies of the pretrained character GPT from the command line: the figures are those of the benchmarks' logs."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recoup.cli.main import app
from recoup.data import root
from recoup.study import Results

FOLDER, LOGS = root() / "text", Path(__file__).parents[2] / "benchmarks" / "results"
BLOCKS = r"re:blocks\..*\.(qkv|proj|fc1|fc2)"
pytestmark = [pytest.mark.real, pytest.mark.skipif(not FOLDER.is_dir(), reason="no text: set RECOUP_DATA")]


def logged(name: str, *key) -> float:
    lines = (json.loads(line) for line in (LOGS / f"{name}.jsonl").read_text().splitlines())
    return next(line["value"] for line in lines if line["key"] == list(key))


def study(out: Path, *arguments: str) -> dict[tuple[str, str], float]:
    """Nats by config and state, of the first seed."""
    given = ["--model", "chargpt", "--weights", str(FOLDER / "chargpt_tinyshakespeare.pt"), "--seeds", "0"]
    given += ["--data", f"text:{FOLDER / 'tinyshakespeare.txt'}", "--profile-images", "0", "--out", str(out)]
    result = CliRunner().invoke(app, ["evaluate", *given, *arguments])
    assert result.exit_code == 0, result.output
    assert "A window is 64 characters" in " ".join(result.output.split())
    return {(row.config, row.state): row.nats for row in Results.load(out).nats}


def test_narrow_accumulators_as_in_the_log(tmp_path):
    """The whole last tenth, attention's products on the unit too; the gain is fitted on other windows than there."""
    found = study(tmp_path, "--config", "LBA.biased(5, 4)", "--calibration-images", "64")
    results = Results.load(tmp_path)
    (config,) = (repr(config) for config in results.recipe.configs)
    assert found["float", "float statistics"] == pytest.approx(logged("lba_text", None, None, "float"), abs=1e-6)
    assert found[config, "float statistics"] == pytest.approx(logged("lba_text", 5, 4, "attention too"), abs=1e-6)
    gained = logged("lba_text", 5, 4, "attention too, gain per channel")
    assert found[config, "gain per channel"] == pytest.approx(gained, abs=0.003)
    assert results.nats[0].count == 1742 * 64
    assert results.nats[0].perplexity == pytest.approx(math.exp(found["float", "float statistics"]))


def test_a_shared_multiplier_as_in_the_log(tmp_path):
    """12,288 characters; scales from 256 windows, as many as there but drawn from the whole training text."""
    given = ("--config", "nbsmt-2t", "--layers", f"{BLOCKS}=nbsmt-2t", "--layers", "re:.*=float", "--limit", "192")
    found = study(tmp_path, *given, "--calibration-images", "256")
    (config,) = (repr(config) for config in Results.load(tmp_path).recipe.configs)
    assert found["float", "float statistics"] == pytest.approx(logged("nbsmt_text", "float"), abs=1e-6)
    assert found["8-bit", "float statistics"] == pytest.approx(logged("nbsmt_text", "8 bit"), abs=0.001)
    assert found[config, "float statistics"] == pytest.approx(logged("nbsmt_text", config), abs=0.003)
