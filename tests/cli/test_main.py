import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import recoup as rc
from recoup import models
from recoup.cli.demo import CONFIGS, SEARCH
from recoup.cli.doctor import examine
from recoup.cli.main import app
from recoup.kernels import process
from recoup.study import Recipe, Results
from recoup.study.measures.pipeline import PipelineResults, Setting
from recoup.study.store import Store
from recoup.version import __version__
from recoup.wings import cards
from tests import fresh
from tests.fresh import Fresh
from tests.study.examples import results, small_recipe

SMALL = shlex.split(
    "--model digits_net --data digits --calibration-images 32 --limit 40 --batch-size 20 --profile-images 16 "
    "--seeds 3 --threads 4 --cpu-threads 1"
)

NET = shlex.split("--model gelunets:net --data digits")
TRAINING = shlex.split("--limit 32 --test-limit 20 --batch-size 16 --epochs 1 --one-stage")

TABLES = ("accuracy.csv", "flips.csv", "cycles.csv", "layers.csv", "shifts.csv")


def recoup(*arguments, code=0):
    """Run a command; its outcome must be as expected, and an error one line without a traceback."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    if code == 2 and "Usage" not in done.stderr:
        assert done.stderr.startswith("recoup: ")
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
    return done


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_version_and_help():
    assert recoup("--version").stdout == f"recoup {__version__}\n"
    text = recoup("--help").stdout
    assert all(command in text for command in ("evaluate", "run", "report", "demo", "doctor"))


def test_evaluate_does_the_main_job(tmp_path):
    done = recoup("evaluate", *SMALL, "--out", "r", "--save-recipe", "saved.yaml")
    assert "recalibrated on hardware" in done.stdout
    assert "r/report.html" in done.stdout
    made = {path.name for path in Path("r").iterdir()}
    assert made == {"measurements.json", "recipe.yaml", "report.html", "results.json", "study.lock", *TABLES}
    assert Recipe.load("saved.yaml") == Recipe.load("r/recipe.yaml") == Results.load("r").recipe


def test_json_is_all_that_standard_output_holds():
    done = recoup("evaluate", *SMALL, "--json")
    assert json.loads(done.stdout) == Results.load("recoup-results").to_dict()
    assert recoup("run", "recoup-results/recipe.yaml", "--json").stdout.startswith("{")


def test_options_become_a_recipe():
    recoup(
        *("evaluate", *SMALL, "--config", "nbsmt-2t", "--layers", "features.3=float", "--state", "paired"),
        *("--layers", "re:features.(7|9=)=NBSMT(threads=2, policy='S')", "--no-augment", "--array", "8x4"),
        *("--model-option", "num_classes=10"),
    )
    recipe = Recipe.load("recoup-results/recipe.yaml").model_dump(mode="json")
    assert [config[:16] for config in recipe["configs"]] == ["NBSMT(threads=4,", "NBSMT(threads=2,"]
    assert recipe["layers"]["features.3"] is None
    assert "policy='S'" in recipe["layers"]["re:features.(7|9=)"]
    assert recipe["calibration"]["augment"] is False
    assert recipe["array"] == {"rows": 8, "columns": 4}
    assert recipe["model_options"] == {"num_classes": 10}
    assert recipe["states"] == ["paired"]


def test_norm_units_on_the_command_line():
    recoup(
        "evaluate", *SMALL, "--config", "lightnorm", "--layers", "features.1=LightNorm(block=8)", "--state", "paired"
    )
    found = Results.load("recoup-results")
    assert [str(config) for config in found.recipe.configs][1:] == ["LightNorm()"]
    assert str(found.recipe.layers["features.1"]) == "LightNorm(block=8)"
    assert Path("recoup-results/traffic.csv").exists()
    assert found.rows("traffic")[0].blocks < found.rows("traffic")[0].formats


def test_run_with_changes(tmp_path):
    Path("r.yaml").write_text(small_recipe(tmp_path / "r", profile_images=0, states=["paired"]).to_yaml())
    recoup("run", "r.yaml", "--set", "test.limit=20", "--set", "calibration.seeds=[1]")
    assert Results.load("r").test_images == 20
    told = recoup("run", "r.yaml", code=2).stderr
    assert "test.limit was 20, is 40" in told
    assert "--overwrite" in told
    recoup("run", "r.yaml", "--overwrite")
    assert Results.load("r").test_images == 40


def test_report_is_written_anew(tmp_path):
    results().save(tmp_path)
    lines = recoup("report", ".").stdout.splitlines()
    assert sorted(lines) == sorted(["report.html", *TABLES])
    assert "brings back 93\N{NO-BREAK SPACE}% of the loss" in Path("report.html").read_text()
    recoup("report", "results.json")


def test_models_beside_the_user(tmp_path):
    Path("mynets.py").write_text("from recoup.models import digits_net\ndef net(): return digits_net()\n")
    before = list(sys.path)
    recoup("evaluate", *SMALL, "--model", "mynets:net", "--state", "paired")
    assert sys.path == before


def test_negative_inputs_on_the_command_line():
    """The remedy is in the command line's own words, and works."""
    net = "Sequential(Conv2d(1, 4, 3), GELU(), Conv2d(4, 4, 3), ReLU(), Conv2d(4, 4, 1), Flatten(), Linear(64, 10))"
    Path("gelunets.py").write_text(f"from torch.nn import *\ndef net(): return {net}\n")
    call = ("evaluate", *SMALL, "--model", "gelunets:net", "--state", "bias correction")
    unsigned = (*call, "--activations", "unsigned")
    said = CliRunner().invoke(app, unsigned).stderr  # after what is measured already
    assert "recoup: calibrate_: 1 layers have negative inputs" in said
    assert "--activations auto gives them signed codes" in said
    assert "--negative float leaves all of them in float, --layers 2=float one of them" in said
    assert "layers={" not in said
    recoup(*unsigned, "--negative", "float", "--overwrite")
    found = Results.load("recoup-results")
    assert found.recipe.calibration.negative == "float"
    assert any("1 of 2 layers have negative inputs" in note and note.endswith("float: 2") for note in found.notes)
    recoup(*unsigned, "--layers", "2=float", "--overwrite")
    recoup(*call, "--overwrite")
    assert Results.load("recoup-results").recipe.calibration.activations == "auto"
    rc.Policy({"2": "nbsmt-2t", "4": "nbsmt-2t"}, "chip").save("chip.yaml")
    chip = ("evaluate", *SMALL[:-4], "--model", "gelunets:net", "--policy", "chip.yaml", "--out", "chip")
    chip = CliRunner().invoke(app, (*chip, "--activations", "unsigned")).stderr
    assert "(--activations auto) gives them signed codes" in chip
    assert "(--negative float) leaves all of them in float; a policy without '2' leaves one" in chip
    recoup("train", "--model", "gelunets:net", "--data", "digits", "--policy", "chip.yaml", *TRAINING)
    recoup("train", *NET, "--config", "nbsmt-2t", "--layers", "2=float", *TRAINING, "--overwrite")


def test_a_model_beside_the_user_is_found_by_every_command_that_takes_one():
    """The first command that names a module imports it, so each has one of its own."""
    for name in ("trained", "drawn"):
        Path(f"beside_{name}.py").write_text("from recoup.models import digits_net as net\n")
    recoup("train", "--model", "beside_trained:net", "--data", "digits", *TRAINING[:-1])
    pytest.importorskip("amaranth")
    assert "classifier" in recoup("silicon", "topology", "--model", "beside_drawn:net", "--shape", "1x8x8").stdout


def test_a_map_that_leaves_nothing_to_a_config_is_told_before_anything_is_measured():
    told = CliRunner().invoke(app, ("evaluate", *SMALL, "--layers", "re:.*=float"))
    assert told.exit_code == 2
    assert "no layer to emulate" in told.stderr or "nothing to calibrate" in told.stderr
    assert not list(Path("recoup-results").glob("measurements*"))


ERRORS = {
    "--threads 3": "NBSMT(threads=3): threads must be 1, 2 or 4",
    "--threads 1": "one thread is the baseline",
    "--threads two": "whole numbers",
    "--config nbsmt-9t": "nbsmt-2t, nbsmt-4t",
    "--config NBSMT(policy='X')": "policy must be one of S, A, W",
    "--config NBSMT(policy='min')": "not separable",
    "--config NBSMT(threads=1)": "8-bit baseline",
    "--config nbsmt-4t": "given twice",
    "--layers nothing=float": "matches no layer",
    "--layers features.3": "NAME=CONFIG",
    "--layers re:*=float": "no regular expression",
    "--state pared": "'paired'",
    "--model resnet21": "no factory 'resnet21'",
    "--model nowhere.at.all:net": "no module nowhere",
    "--model digits": "no factory",
    "--data nonsense": "cifar10:DIR",
    "--data cifar10:nowhere": "nowhere",
    "--data imagefolder:nowhere": "nowhere",
    "--data cifar10:": "missing",
    "--weights none.pt": "none.pt: no such file",
    "--weights foreign.pt": "foreign.pt cannot be read",
    "--weights evil.pt": "evil.pt refused",
    "--weights other.pt": "missing: ",
    "--seeds 1,1": "must differ",
    "--seeds x": "--seeds 'x'",
    "--limit 100000": "100000",
    "--calibration-images 100000": "100000",
    "--calibration-images 0": "greater than or equal to 1",
    "--array 16": "ROWSxCOLUMNS",
    "--device cuda:99": "CUDA",
    "--device tpu": "tpu",
    "--model-option x": "KEY=VALUE",
    "--model-option classes=3": "classes",
    "--out foreign.pt": "cannot be made a folder",
}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


@pytest.mark.parametrize(("options", "told"), ERRORS.items(), ids=ERRORS)
def test_errors_are_one_line(options, told):
    Path("foreign.pt").write_bytes(b"\x89PNG nothing of the kind")
    if "evil" in options:
        torch.save({"state_dict": Evil()}, "evil.pt")
    if "other" in options:
        torch.save(models.load("resnet20").state_dict(), "other.pt")
    option, _, value = options.partition(" ")
    stderr = recoup("evaluate", *SMALL, option, value, code=2).stderr
    assert any(part.replace(",", "") in stderr.replace(",", "") for part in told.split("|")), stderr
    assert not Path("code-was-run").exists()
    assert not Path("recoup-results/results.json").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("model: [", "line 1: not YAML"),
        ("PK\x03\x04", "r.yaml"),
        ("model: a\ndata: b\nx: 1\n", "line 3: x: unknown field"),
    ],
)
def test_recipes_that_are_none(content, told):
    Path("r.yaml").write_text(content)
    assert told in recoup("run", "r.yaml", code=2).stderr
    assert "no such file" in recoup("run", "none.yaml", code=2).stderr
    assert "no such file" in recoup("report", ".", code=2).stderr
    Path("results.json").write_text('{"schema_version": 1')
    assert "cut off" in recoup("report", ".", code=2).stderr


def test_debug_shows_the_traceback():
    done = CliRunner().invoke(app, ["--debug", "report", "."])
    assert "no such file" in str(done.exception)
    recoup("report", ".", code=2)  # and not the next time


@pytest.mark.parametrize("command", ["demo", "silicon verilog nbsmt-2t"])
def test_a_folder_that_is_a_file_is_told_before_anything_is_done(command):
    Path("results").write_text("x")
    stderr = recoup(*command.split(), "--out", "results", code=2).stderr
    assert stderr.splitlines()[-1] == "recoup: results: cannot be made a folder for results (it is a file)"
    assert "trained" not in stderr


def test_an_interrupt_while_libraries_are_loaded(monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("recoup.cli.main.importlib.import_module", interrupted)
    assert recoup("doctor", code=130).stderr == "recoup: interrupted\n"


def test_interrupt_says_what_is_kept(monkeypatch):
    put = Store.put

    def interrupted(self, key, value, cpu):
        put(self, key, value, cpu)
        if len(self) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", interrupted)
        stderr = recoup("evaluate", *SMALL, "--json", code=130).stderr
    assert "2 of 9 measurements are kept in recoup-results/measurements.json" in stderr
    assert "the same command goes on" in stderr
    recoup("evaluate", *SMALL)


@pytest.mark.slow
def test_a_real_signal_leaves_valid_files(tmp_path):
    process = Fresh(fresh.recoup, "evaluate", *SMALL, "--seeds", "1,2,3,4")
    store = tmp_path / "recoup-results" / "measurements.json"
    deadline = time.monotonic() + 120
    while not store.exists() and process.running and time.monotonic() < deadline:
        time.sleep(0.02)
    process.signal(signal.SIGINT)
    done = process.wait(60)
    assert done.returncode == 130, done.stderr
    assert "measurements are kept" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(store.read_text())["measurements"]
    assert not (tmp_path / "recoup-results" / "results.json").exists()
    assert [path.name for path in store.parent.iterdir() if path.name.startswith(".")] == []


def test_doctor(monkeypatch):
    assert "8-bit path" in recoup("doctor").stdout
    checks = json.loads(recoup("doctor", "--json").stdout)
    assert all(check["ok"] for check in checks)
    tests = [f"self-test {config.__name__}" for config in cards()]
    assert [check["name"] for check in checks if check["name"].startswith("self-test")] == tests
    monkeypatch.setattr("recoup.nbsmt.wing.matmul", lambda *_: torch.zeros(3, 1))
    told = recoup("doctor", code=1).stdout
    assert "FAULT  self-test NBSMT" in told
    assert told.count("FAULT") == 1


@pytest.mark.parametrize(("operator", "name"), [("lba.wing.matmul", "LBA"), ("lightnorm.wing.train", "LightNorm")])
def test_the_doctor_finds_each_wings_fault(monkeypatch, operator, name):
    def wrong(*arguments):
        result = right(*arguments)
        return (-result[0], *result[1:]) if isinstance(result, tuple) else -result

    module, _, function = f"recoup.{operator}".rpartition(".")
    right = getattr(importlib.import_module(module), function)
    monkeypatch.setattr(f"recoup.{operator}", wrong)
    (fault,) = [check for check in examine() if not check.ok]
    assert fault.name == f"self-test {name}"
    assert "expected" in fault.value


def test_demo_end_to_end(monkeypatch):
    monkeypatch.setattr("recoup.cli.demo.EPOCHS", 1)
    assert "lightnorm" in CONFIGS
    monkeypatch.setattr("recoup.cli.demo.CONFIGS", ["nbsmt-4t", "lightnorm"])
    monkeypatch.setattr("recoup.cli.demo.SEEDS", [0])
    monkeypatch.setattr("recoup.cli.demo.IMAGES", 64)
    monkeypatch.setattr("recoup.cli.demo.PIPELINE", Setting(stages=4, width=8, epochs=1, batch=100))
    monkeypatch.setattr("recoup.cli.demo.SILICON_SECONDS", 0)
    few = {"scoring": {"images": 40}, "calibration": {"images": 32, "seeds": [0]}, "test": {"limit": 60}, "points": 2}
    monkeypatch.setattr("recoup.cli.demo.SEARCH", SEARCH | few)
    done = recoup("demo")
    assert "recoup silicon area --study recoup-demo" in done.stdout
    assert "trained a small network" in done.stderr
    assert "pipelines at batch one are trained meanwhile" in done.stderr
    assert "digits_net on digits" in done.stdout
    assert "Pipelined Backpropagation: mean" in done.stdout
    assert "threads are searched layer by layer" in done.stderr
    assert "digits_net on digits: within 0.5 points of float" in " ".join(done.stdout.split())
    page = Path("recoup-demo/report.html").read_text()
    assert all(f'<h2 id="{chapter}">' in page for chapter in ("search", "pipeline"))
    found = Results.load("recoup-demo")
    assert found.accuracy[0].top1 > 20
    assert found.rows("traffic")
    again = recoup("demo", "--json")
    assert again.stderr == ""
    assert json.loads(again.stdout)["accuracy"] == found.to_dict()["accuracy"]
    chapter = PipelineResults.load(Path("recoup-demo"))
    assert chapter is not None
    assert json.loads(again.stdout)["pipeline"] == chapter.model_dump(mode="json")
    assert len(json.loads(again.stdout)["search"]["groups"]) == 4
    assert chapter.labels() == ["SGDM", "PB", "SC", "LWP", "LWPv+SC"]
    Path("recoup-demo/report.html").unlink()
    recoup("report", "recoup-demo")
    assert '<h2 id="pipeline">' in Path("recoup-demo/report.html").read_text()
    monkeypatch.setattr("recoup.cli.demo.PIPELINE", Setting(stages=4, width=8, epochs=1, batch=200))
    assert "another pipeline study" in recoup("demo", code=2).stderr
    Path("recoup-demo/pipeline.json").write_text("{")
    assert "not a pipeline study" in recoup("report", "recoup-demo", code=2).stderr


def test_the_demos_network_is_trained_again_where_it_was_cut_off(monkeypatch):
    monkeypatch.setattr("recoup.cli.demo.EPOCHS", 1)
    from recoup.cli.demo import WEIGHTS, train_weights

    assert train_weights(Path("d"))
    assert not train_weights(Path("d"))
    whole = (Path("d") / WEIGHTS).read_bytes()
    (Path("d") / WEIGHTS).write_bytes(whole[:1000])
    assert train_weights(Path("d"))
    assert (Path("d") / WEIGHTS).read_bytes() == whole


@pytest.mark.parametrize(
    ("own", "found"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_torchs_threads_soon_sleep_while_they_wait_unless_the_user_says_otherwise(own, found):
    """A process that has not loaded torch: OpenMP reads the variable once, and commands load torch after it is set."""
    told = "import os, sys, recoup.cli.main; from recoup.kernels import process; process.begin()\n"
    told += "print(os.environ.pop('GOMP_SPINCOUNT', None), 'torch' in sys.modules); import torch; process.begin()\n"
    told += "print('GOMP_SPINCOUNT' in os.environ, process.waiting())"
    environ = {name: value for name, value in os.environ.items() if name not in process.SPINNING}
    done = subprocess.run([sys.executable, "-c", told], env=environ | own, capture_output=True, text=True, check=True)
    first, second, third, said = done.stdout.replace("\n", " ").split(" ", 3)
    assert (first, second, third) == (found, "False", "False")
    spinning = "spinning (GOMP_SPINCOUNT and OMP_WAIT_POLICY are not set)"
    assert said.strip() == ("OMP_WAIT_POLICY=ACTIVE" if found == "None" else spinning)
