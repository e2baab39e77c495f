"""A wing that recoup has never seen: a config of a few lines and one layer class, known by its card alone.

It is emulated, evaluated, studied, reported and restored, in Python and on the command line, and on its way never meets
a word of another wing.
"""

import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.report.summary import summarize
from recoup.study import Recipe, Results, State, run
from recoup.study.measures import BESIDE
from tests import fresh
from tests.fresh import Fresh
from tests.ten_lines import MODULE

WORDS = re.compile(
    r"nb-?smt|\blba\b|lightnorm|\bthreads?\b|collision|accumulator|range batch|8[ -]bit|batch ?norm traffic|\bM\dE\d"
    r"|systolic|array cycles|pipelined|recalibrated|bias correction|gain per",
    re.IGNORECASE,
)


def study(config, **changes):
    values = {
        "model": "digits_net",
        "data": "digits",
        "calibration": {"images": 32, "batch_size": 16, "seeds": [3, 5]},
        "test": {"limit": 40, "batch_size": 20},
        "configs": [config],
        "cpu_threads": 1,
        "out": "studied",
    }
    return Recipe.build({**values, **changes})


def test_emulated_evaluated_and_restored(trunc):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 10)).eval()
    x, y = torch.rand(8, 1, 8, 8), torch.randint(10, (8,))
    before, plain = {n: t.clone() for n, t in model.state_dict().items()}, model(x)
    rc.emulate_(model, trunc(bits=2), layers={"0": None})
    linear = model[3]
    assert isinstance(linear, nn.Linear)
    weight = torch.trunc(linear.weight * 4) / 4
    assert torch.equal(model(x), nn.functional.linear(model[:3](x), weight, linear.bias))
    assert 0 <= rc.evaluate(model, [(x, y)]).top1 <= 100
    with pytest.raises(rc.RecoupError, match=r"emulated already \(Trunc\(bits=2\)\)"):
        rc.emulate_(model, trunc())
    rc.restore_(model)
    assert type(model[3]) is nn.Linear
    assert torch.equal(model(x), plain)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_beside_another_wing(trunc):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))
    rc.emulate_(model, rc.LBA.m7e4(), layers={"2": trunc(bits=3)})
    assert [type(layer).__name__ for layer in model] == ["LBAConv2d", "Flatten", "TruncLinear"]
    assert [type(layer) for layer in rc.restore_(model)] == [nn.Conv2d, nn.Flatten, nn.Linear]


def test_studied_and_reported_without_a_word_of_another_wing(trunc):
    from recoup.report import render, write_tables

    results = run(study(trunc(bits=2)), progress=False)
    assert results.recipe.states == (State.NONE,)
    assert [(row.config, row.state, row.seed) for row in results.accuracy] == [
        ("float", State.NONE, None),
        ("Trunc(bits=2)", State.NONE, 3),  # no calibration image has a part in it: one seed is all
    ]
    assert Results.load("studied") == results
    html = render(results)
    seen = re.sub(r"<style>.*?</style>|<pre>.*?</pre>|<dl class=.facts.>.*?</dl>", "", html, flags=re.DOTALL)
    assert WORDS.findall(seen) == []
    assert "Trunc(bits=2)" in html
    made = {path.name for path in write_tables(results, Path("studied"))}
    assert made == {"accuracy.csv", "flips.csv", "shifts.csv"}


def test_a_title_a_preset_and_a_repair_on_the_card(trunc):
    def halve(model, batches):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.bias.data.mul_(0.5)

    repair = rc.wings.Repair("half bias", "bias", "Biases are halved.", "halving", halve, needs_images=False)
    old = rc.wings.cards()[trunc]
    rc.wings.register(
        rc.wings.Card(
            config=trunc, layers=old.layers, title=lambda c: f"{c.bits} bits kept", presets={"trunc-2": trunc(2)},
            repairs=(repair,), default=("half bias",), quoted=("half bias",),
        )
    )  # fmt: skip
    results = run(study("trunc-2"), progress=False)
    assert [(row.state, row.seed) for row in results.accuracy] == [
        (State.NONE, None), (State.NONE, 3), ("half bias", 3),
    ]  # fmt: skip
    from recoup.report import render

    assert "2 bits kept" in (html := render(results))
    assert "Biases are halved." in html


@pytest.mark.parametrize(
    ("text", "name"),
    [("fc=Trunc(bits=4)", "fc"), ("re:a(?=b)=Trunc()", "re:a(?=b)"), ("classifier=float", "classifier")],
)
def test_layer_options_split_at_the_right_sign(trunc, text, name):
    from recoup.study.configs import as_config, layer_option

    found, config = layer_option(text)
    assert found == name
    assert config is None or isinstance(as_config(config), trunc)


def test_on_the_command_line(tmp_path):
    (tmp_path / "stranger.py").write_text(MODULE)
    small = shlex.split("--model digits_net --data digits --calibration-images 32 --limit 40 --seeds 3 --cpu-threads 1")
    wing = ["--wing", "stranger", "--config", "Trunc(bits=2)", "--layers", "classifier=Trunc(bits=4)"]
    done = recoup("evaluate", *small, *wing, "--out", "r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Trunc(bits=4)" in done.stdout  # the one layer there is
    assert WORDS.findall(done.stdout) == []
    assert {path.name for path in (tmp_path / "r").glob("*.csv")} == {"accuracy.csv", "flips.csv", "shifts.csv"}
    again = recoup("run", "r/recipe.yaml", "--wing", "stranger", "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert recoup("report", "r", "--wing", "stranger", cwd=tmp_path).returncode == 0
    unknown = recoup("report", "r", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "Trunc" in unknown.stderr
    assert unknown.stderr.count("\n") == 1


def test_what_the_command_line_says_of_hardware_that_is_not_named(tmp_path):
    """Neither a wing nor a layer map makes another wing's presets what was asked for."""
    (tmp_path / "stranger.py").write_text(MODULE)
    (tmp_path / "preset.py").write_text(MODULE.replace("layers=", "presets={'cut': Trunc(2)}, layers="))
    base = shlex.split("evaluate --model digits_net --data digits --calibration-images 32 --limit 20 --seeds 3")
    for options, said in [
        (["--wing", "stranger"], r"no presets, so name its hardware with --config: Trunc\(\.\.\.\)"),
        (["--layers", "classifier=lba-m7e4"], "--layers: name the hardware of all other layers with --config"),
        (["--config", "Trunc(bits=2)"], "once its module is imported \\(--wing package.module\\)"),
    ]:
        done = recoup(*base, *options, "--out", "none", cwd=tmp_path)
        assert done.returncode == 2
        assert re.search(said, done.stderr), done.stderr
        assert not (tmp_path / "none").exists()
    done = recoup(*base, "--wing", "preset", "--out", "r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {row["config"] for row in json.loads((tmp_path / "r/results.json").read_text())["accuracy"]} == {
        "float", "Trunc(bits=2)",
    }  # fmt: skip


@pytest.mark.slow
def test_other_studies_are_imported_where_their_files_are(tmp_path):
    code = "import sys; from pathlib import Path; from recoup.study.measures import beside; beside(Path('.')); "
    code += "assert not {'recoup.pipeline', 'recoup.search'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {file: importlib.import_module(module).RESULTS.file for file, module in BESIDE.items()} == {
        f: f for f in BESIDE
    }


def registered(trunc, **more):
    return rc.wings.register(rc.wings.Card(config=trunc, layers=rc.wings.cards()[trunc].layers, **more))


def wide(config):
    return type(config)(bits=config.bits + 6)


def test_baselines_of_one_name_keep_their_own_rows(trunc):
    """Two configs whose baselines differ, and a baseline called as the float network is."""
    registered(trunc, baseline=rc.wings.Baseline("float", "float", "in float", wide))
    recipe = study(trunc(bits=1), configs=[trunc(bits=1), trunc(bits=2)])
    results = run(recipe, progress=False)
    names = dict.fromkeys(row.config for row in results.accuracy)
    assert list(names) == [
        "float", "float (Trunc(bits=7))", "float (Trunc(bits=8))", "Trunc(bits=1)", "Trunc(bits=2)",
    ]  # fmt: skip
    alone = {bits: run(study(trunc(bits=bits), out=f"alone{bits}"), progress=False) for bits in (1, 2)}
    rows = {row.config: row.top1 for row in results.accuracy}
    for bits, made in alone.items():
        assert {row.config: row.top1 for row in made.accuracy}.items() <= rows.items()
        assert f"in float (Trunc(bits={bits + 6}))" in summarize(made).verdicts[-1]


def test_a_baseline_is_not_taken_up_for_another_of_its_name(trunc):
    registered(trunc, baseline=rc.wings.Baseline("wide", "wide", "at full width", wide))
    first = run(study(trunc(bits=0)), progress=False)
    again = run(study(trunc(bits=4), configs=[trunc(bits=4), trunc(bits=0)]), progress=False)
    rows = {row.config: row.top1 for row in again.accuracy}
    (before,) = {row.top1 for row in first.accuracy if row.config == "wide"}
    assert rows["wide (Trunc(bits=6))"] == before
    assert "wide" not in rows
    keys = json.loads(Path("studied/measurements.json").read_text())["measurements"]
    assert {key for key in keys if key.startswith("wide")} == {
        f"wide (Trunc(bits={bits})) | float statistics | seed {seed}" for bits in (6, 10) for seed in (3, 5)
    }


@dataclass(frozen=True)
class Silent:
    """A config whose repr does not name its field."""

    bits: int = 4

    def __repr__(self):
        return "Silent()"


@dataclass(frozen=True)
class Odd:
    bits: int = 4

    def __repr__(self):
        return f"<odd {self.bits}>"


def local():
    @dataclass(frozen=True)
    class Local:
        bits: int = 4

    return Local


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Silent, "would be read back as 'Silent()', not as it is"),
        (Odd, "'<odd 2>', cannot be read back"),
        (local(), "Local(bits=2)', cannot be read back"),
    ],
)
def test_configs_that_text_does_not_give_back_are_refused(trunc, tmp_path, kind, said):
    layers = rc.wings.cards()[trunc].layers
    rc.wings.register(rc.wings.Card(config=kind, layers=layers))
    try:
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        rc.emulate_(model, kind(2))  # in memory any config will do
        for refused in (
            lambda: study(kind(2)),
            lambda: study("nbsmt-4t", layers={"classifier": kind(2)}),
            lambda: rc.save(model, tmp_path / "x.safetensors"),
            lambda: rc.Policy.of(model).to_yaml(),
        ):
            with pytest.raises(rc.RecoupError, match=re.escape(said)) as error:
                refused()
            assert "\n" not in str(error.value)
        assert not (tmp_path / "x.safetensors").exists()
    finally:
        rc.wings.forget(kind)


NORM = """
from dataclasses import dataclass
from torch import nn
import recoup as rc

@dataclass(frozen=True)
class Half:
    bits: int = 8

class HalfNorm(rc.wings.Emulated, nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).half().float()

rc.wings.register(rc.wings.Card(config=Half, layers={nn.BatchNorm2d: HalfNorm}, needs_norms=True))
"""


def test_a_norm_of_a_strangers_is_not_called_float(tmp_path, monkeypatch):
    from recoup.report import render

    (tmp_path / "half.py").write_text(NORM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    half = importlib.import_module("half").Half
    try:
        page = render(run(study(half()), progress=False))
        assert "residual additions, and normalisation that is not emulated: float" in page
        assert "residual additions and normalisation: float" not in page
    finally:
        rc.wings.forget(half)
        del sys.modules["half"]


def plain_net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def test_a_network_without_norms_hears_of_none(trunc):
    from recoup.report import render

    halve = rc.wings.Repair("half bias", "bias", "Biases are halved.", "halving", lambda *_: None, needs_images=False)
    registered(trunc, repairs=(halve,), default=("half bias",))
    page = render(run(study(trunc(bits=2), model=f"{__name__}:plain_net"), progress=False))
    assert "own BatchNorm statistics" not in page
    assert "same hardware&#39;s float statistics" not in page
    assert "the same hardware without repair" in page


@pytest.mark.parametrize(
    ("text", "said"),
    [("raise OSError('x')", "OSError: x"), ("x = 1", "registers no hardware"), ("import no_such", "no_such")],
)
def test_a_wing_that_cannot_be_loaded(tmp_path, text, said):
    (tmp_path / "broken.py").write_text(text)
    done = recoup("report", "r", "--wing", "broken", cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def recoup(*arguments, cwd):
    return Fresh(fresh.recoup, *arguments, cwd=cwd).wait(300)
