"""A wing that recoup has never seen: a config of a few lines and one layer class, known by its card alone.

It is emulated, evaluated, studied, reported and restored, in Python and on the command line, and on its way never meets
a word of another wing.
"""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.study import Recipe, Results, State, run

MODULE = """
from dataclasses import dataclass

import torch
from torch import nn

import recoup as rc


@dataclass(frozen=True)
class Trunc:
    bits: int = 4


class TruncLinear(rc.wings.Emulated, nn.Linear):
    def forward(self, x):
        if self.mode == "float":
            return super().forward(x)
        step = 2.0**-self.config.bits
        return nn.functional.linear(x, torch.trunc(self.weight / step) * step, self.bias)


rc.wings.register(rc.wings.Card(config=Trunc, layers={nn.Linear: TruncLinear}))
"""
WORDS = re.compile(
    r"nb-?smt|\blba\b|lightnorm|\bthreads?\b|collision|accumulator|range batch|8[ -]bit|batch ?norm traffic|\bM\dE\d"
    r"|systolic|array cycles|pipelined|recalibrated|bias correction|gain per",
    re.IGNORECASE,
)


@pytest.fixture
def trunc(tmp_path, monkeypatch):
    """The config class, registered; forgotten afterwards."""
    (tmp_path / "stranger.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("stranger")
    yield module.Trunc
    rc.wings.forget(module.Trunc)
    del sys.modules["stranger"]


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
    assert made == {"accuracy.csv", "shifts.csv"}


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
    assert "Trunc(bits=2)" in done.stdout
    assert WORDS.findall(done.stdout) == []
    assert {path.name for path in (tmp_path / "r").glob("*.csv")} == {"accuracy.csv", "shifts.csv"}
    again = recoup("run", "r/recipe.yaml", "--wing", "stranger", "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert recoup("report", "r", "--wing", "stranger", cwd=tmp_path).returncode == 0
    unknown = recoup("report", "r", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "Trunc" in unknown.stderr
    assert unknown.stderr.count("\n") == 1


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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": {}}, "layers is empty"),
        ({"layers": {nn.Linear: nn.Linear}}, "must be a class that derives from"),
        ({"config": 3}, "config must be a class"),
        ({"default": ("paired",)}, "'paired' is none of its repairs"),
    ],
)
def test_cards_that_are_refused(trunc, change, said):
    good = {"config": trunc, "layers": rc.wings.cards()[trunc].layers}
    with pytest.raises(rc.RecoupError, match=said):
        rc.wings.Card(**{**good, **change})


def test_names_that_are_taken_are_refused(trunc):
    layers = rc.wings.cards()[trunc].layers
    with pytest.raises(rc.RecoupError, match="'nbsmt-2t' is taken by NBSMT"):
        rc.wings.register(rc.wings.Card(config=trunc, layers=layers, presets={"nbsmt-2t": trunc()}))
    with pytest.raises(rc.RecoupError, match=r"must be a recoup\.wings\.Card"):
        rc.wings.register(trunc)


def recoup(*arguments, cwd):
    command = [sys.executable, "-m", "recoup", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
