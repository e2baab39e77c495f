"""The command that makes hardware of configs: every action, and what it refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("amaranth")

from recoup.cli import demo
from recoup.cli.main import app
from recoup.cli.silicon_tables import table
from recoup.errors import RecoupError
from recoup.formats import Float
from recoup.silicon import toggles, verify
from tests.silicon.test_liberty import TINY


def call(*words):
    return CliRunner().invoke(app, ["silicon", *map(str, words)])


@pytest.fixture
def liberty(tmp_path):
    path = tmp_path / "tiny.lib"
    steady = '"0.1, 0.1", "0.1, 0.1"'  # slews that grow from gate to gate would let a step take seconds
    path.write_text(re.sub(r"(_transition \(t\) \{.*?values \()[^)]*", rf"\1{steady}", TINY))
    return path


@pytest.mark.slow
def test_verify_and_area_without_a_library():
    done = call("verify", "NBSMT(threads=1)", "nbsmt-2t", "--set", "unit=products", "--vectors", 4096)
    assert done.exit_code == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()[1:3]] == ["equal", "equal"]
    assert done.stderr.count(" ...\n") == 2  # progress
    done = call("area", "nbsmt-2t", "NBSMT(threads=1)", "--set", "unit=products", "--json")
    rows = json.loads(done.stdout)
    assert [row["config"] for row in rows] == ["nbsmt-2t", "nbsmt-2t", "NBSMT(threads=1)"]
    assert [row["module"] for row in rows][:2] == ["2T S+A nearest: products", "2T exact: products"]
    assert rows[0]["unit"] == "NAND2"


def test_a_table_has_counterparts_beside_each_config(liberty):
    done = call("area", "nbsmt-2t", "--set", "unit=products", "--liberty", liberty)
    lines = [line.split("  ") for line in done.stdout.splitlines()]
    assert lines[0][0] == "config"
    assert lines[1][0] == "nbsmt-2t"
    assert "1.00x" in done.stdout.splitlines()[1]
    assert lines[2][0] == ""
    assert "tiny.lib sha256" in done.stdout
    assert len(call("area", "nbsmt-2t", "--set", "unit=products", "--no-baselines").stdout.splitlines()) == 4


def test_an_option_goes_to_the_generators_that_have_it():
    done = call("area", "nbsmt-2t", "LBA(chunk=None)", "--set", "operands=Float.lba(2, 3, bias=3)", "--no-baselines")
    assert done.exit_code == 0, done.stderr
    assert "nbsmt-2t: operands is no option of its generator and is left out" in done.stderr
    assert "M7E4, 13 bits" in done.stdout


@pytest.mark.parametrize("preset", ["lba-m7e4", "lba-m10e5"])
def test_a_preset_has_its_wings_usual_operands_and_says_so(preset):
    own = call("area", preset, "--no-baselines", "--json")
    given = call("area", preset, "--no-baselines", "--json", "--set", "operands=Float.lba(3, 4, bias=3)")
    assert json.loads(own.stdout) == json.loads(given.stdout)
    assert f"{preset}: the preset leaves it open, so operands={Float.lba(3, 4, bias=3)!r}" in own.stderr
    assert "leaves it open" not in given.stderr


def test_a_mismatch_is_exit_code_one_with_the_operands(monkeypatch):
    from recoup.nbsmt import product_unit

    monkeypatch.setattr(product_unit.Gates, "rounded", lambda *given: given[1][4:])
    done = call("verify", "nbsmt-2t", "--set", "unit=products")
    assert done.exit_code == 1
    assert done.stdout.splitlines()[1].endswith("  DIFFERS")
    assert "NOT PROVED" not in done.stdout
    assert "operands {'x':" in done.stdout


@pytest.mark.slow
def test_vectors_that_show_too_little_are_no_proof(monkeypatch):
    monkeypatch.setattr(verify, "COVERAGE", 1.01)  # more than any can
    done = call("verify", "nbsmt-2t", "--set", "unit=products", "--vectors", 64)
    assert done.exit_code == 1
    assert done.stdout.splitlines()[1].endswith("  equal, NOT PROVED")
    assert "DIFFERS" not in done.stdout
    assert "nbsmt-2t: nothing differed, but the vectors show fewer than" in done.stdout  # the share as it was imported


def test_verilog_and_its_ports_are_written(tmp_path):
    done = call("verilog", "nbsmt-2t", "--array", "2x2", "--out", tmp_path / "rtl")
    assert done.exit_code == 0, done.stderr
    text = (tmp_path / "rtl" / "nbsmt_2t_array_2x2.v").read_text()
    assert text.startswith("/* verilator lint_off")
    assert text.count("\nmodule ") == 2  # the element once, and the array of it
    ports = json.loads((tmp_path / "rtl" / "nbsmt_2t_array_2x2.json").read_text())
    assert ports["latency"] == 2


@pytest.mark.slow
def test_energy_of_a_layer(tmp_path, liberty, monkeypatch):
    rng = np.random.default_rng(0)
    x, w = rng.integers(0, 256, (8, 2, 6), dtype=np.uint8), rng.integers(-128, 128, (2, 6, 4)).astype(np.int8)
    np.savez(tmp_path / "layer.npz", x, w)
    words = ("energy", "nbsmt-2t", "--liberty", liberty, "--no-baselines", "--operands", tmp_path / "layer.npz")
    done = call(*words, "--json")
    assert done.exit_code == 0, done.stderr
    glitches = json.loads(done.stdout)[0]
    bound = json.loads(call(*words, "--json", "--no-glitches").stdout)[0]
    assert bound["lower_bound"]
    assert 0 < bound["step"] <= glitches["step"]
    assert "with glitches" in call(*words).stdout
    beside = call(*(word for word in words if word != "--no-baselines"))
    assert "1T takes other operands and is left out" in beside.stderr
    assert "2T exact" in beside.stdout
    monkeypatch.setattr(toggles, "MEMORY", 1 << 16)
    heavy = call(*words, "--seed", 1)
    assert heavy.exit_code == 2
    assert "take a larger tick" in heavy.stderr


def test_operands_that_are_no_layer_are_refused_and_help_says_whose_they_are(tmp_path, liberty):
    np.savez(tmp_path / "layer.npz", np.zeros((2, 2, 4), np.uint8))
    done = call("energy", "nbsmt-2t", "--liberty", liberty, "--operands", tmp_path / "layer.npz")
    assert done.exit_code == 2
    assert "1 array(s) of operands; legal are x uint8" in done.stderr
    multiplier = ("LBA(chunk=None)", "--set", "operands=Float.lba(2, 3, bias=3)")
    done = call("energy", *multiplier, "--liberty", liberty, "--operands", tmp_path / "layer.npz")
    assert done.exit_code == 2
    assert "in Python: energy({port: patterns [steps, lanes]" in done.stderr
    assert "Energy is of NB-SMT alone" in " ".join(re.sub("[\u2500-\u257f]", " ", call("--help").stdout).split())


def test_the_demo_says_what_its_hardware_costs():
    said = demo.silicon_line(Path("folder"))
    one, two, exact = (
        float(found) for found in re.findall(r"(?:2T S\+A nearest|1T|2T exact) ([\d,.]+)", said.replace(",", ""))
    )
    assert one < exact < two
    assert "beside fp32, nearest" in said
    assert said.endswith('recoup silicon area --study folder --set "operands=Float.lba(3, 4, bias=3)"')


def test_the_demo_says_the_command_where_silicon_is_missing_or_slow(monkeypatch, tmp_path):
    monkeypatch.setenv("RECOUP_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "SILICON_SECONDS", 0)
    said = demo.silicon_line(Path("folder"))
    assert "takes longer than there is time for). It is by: recoup silicon area --study folder" in said

    def absent(*_, **__):
        raise RecoupError("silicon needs yosys: pip install 'recoup[silicon]'")

    monkeypatch.setattr("recoup.silicon.build", absent)
    said = demo.silicon_line(Path("folder"))
    assert said.startswith(
        "Silicon was not measured here (silicon needs yosys: pip install 'recoup[silicon]'). It is by: "
    )


def test_the_demo_says_when_there_is_no_room_and_hides_no_bug(monkeypatch, tmp_path):
    monkeypatch.setenv("RECOUP_CACHE", str(tmp_path))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.write_text", full)
        said = demo.silicon_line(Path("folder"))
    assert re.search(r"not measured here \(.*cannot be written .*No space left on device\)\. It is by: ", said)

    def wrong(*_, **__):
        raise KeyError("a counterpart that has another title")

    monkeypatch.setattr("recoup.silicon.build", wrong)
    with pytest.raises(KeyError):
        demo.silicon_line(Path("folder"))


def test_the_topology_of_a_model():
    done = call("topology", "--model", "resnet20")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Layer name, IFMAP Height, IFMAP Width")
    assert lines[1] == "conv1, 34, 34, 3, 3, 3, 16, 1,"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["draw", "nbsmt-2t"], "must be one of verilog, verify, area, energy, topology"),
        (["area"], "name one or more configs"),
        (["area", "nbsmt-9t"], "must be a preset"),
        (["area", "nbsmt-2t", "--array", "16"], "ROWSxCOLUMNS"),
        (["area", "nbsmt-2t", "--array", "absent.cfg"], "cannot be read"),
        (["area", "nbsmt-2t", "--set", "registers"], "KEY=VALUE"),
        (["area", "nbsmt-2t", "--set", "colour=red"], "no such option"),
        (["area", "nbsmt-2t", "--liberty", "absent.lib"], "is no file"),
        (["verify", "nbsmt-2t", "--vectors", "-3"], "positive number or exhaustive"),
        (["area", "nbsmt-2t", "--set", "drain=perhaps"], "must be True or False"),
        (["verify", "LBA()"], '(on the command line --set "operands=...")'),
        (["verilog", "lba-m7e4", "lba-m10e5", "--set", "operands=Float.lba(3, 4, bias=3)"], "fmaq is the name of sev"),
        (["energy", "nbsmt-2t"], "--operands FILE.npz"),
        (["energy", "nbsmt-2t", *["--operands", "a.npz"] * 2], "2 --operands for 1 configs"),
        (["energy", "nbsmt-2t", "--operands", "a.npz"], "--liberty FILE is needed"),
        (["energy", "nbsmt-2t", "--operands", "a.npz", "--liberty", "a.lib"], "is no .npz file of numpy's"),
        (["topology"], "--model NAME is needed"),
        (["topology", "--model", "resnet20", "--shape", "3x"], "sizes such as 3x32x32"),
    ],
)
def test_what_is_refused(words, message):
    done = call(*words)
    assert done.exit_code == 2
    assert message in done.stderr


def test_faults_that_are_proved_redundant_are_told():
    found = verify.Verification("m", 64, False, 0, None, 670, ("a stuck at 0",), "yosys", ("b stuck at 1",) * 13)
    head, row, _ = table("verify", [{"config": "one", **found.to_dict()}]).splitlines()
    assert head.split() == ["config", "vectors", "mismatches", "faults", "redundant", "shown"]
    assert row.split() == ["one", "64", "0", "670", "13", "99.85%", "equal"]
