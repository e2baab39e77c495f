"""What a recipe for `recoup train` means."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import recoup as rc
from recoup.cli.main import app
from recoup.errors import RecoupError
from recoup.lba import LBA
from recoup.models import load
from recoup.nbsmt import NBSMT
from recoup.network.emulated import emulated_layers
from recoup.training.run import TrainingRecipe, run_training

BASE = {"model": "recoup.models:digits_net", "data": "digits", "limit": 128, "test_limit": 50, "batch_size": 64}


def recipe(**values):
    return TrainingRecipe.build({**BASE, **values})


def test_layers_alone_say_what_is_emulated(tmp_path):
    *_, last = [name for name, module in load(BASE["model"], None).named_modules() if hasattr(module, "weight")]
    run = recipe(layers={last: "LBA.biased(5, 4)"}, epochs=1, underflow_epochs=1)
    assert [stage.name for stage in run.stages] == ["without underflow", "with underflow"]
    result = run_training(run, tmp_path, progress=False)
    assert set(result["accuracy"]) >= {"float, before", "emulated, before", "after with underflow"}
    assert json.loads((tmp_path / "training.json").read_text()) == result
    assert all(value.isfinite().all() for value in load_file(tmp_path / "weights.safetensors").values())


def test_the_stages():
    assert [s.name for s in recipe().stages] == ["float"]
    assert [s.name for s in recipe(config=LBA(), one_stage=True).stages] == ["one stage"]
    assert [s.name for s in recipe(config=LBA(), epochs=0).stages] == ["with underflow"]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"epochs": 0}, "nothing to train"),
        ({"epochs": 0, "config": LBA(), "one_stage": True}, "nothing to train"),
        ({"epochs": 0, "underflow_epochs": 0, "config": LBA()}, "nothing to train"),
        ({"layers": {"re:.*": None}}, "layers: no layer has a config"),
    ],
)
def test_nothing_to_do(tmp_path, values, told):
    with pytest.raises(RecoupError, match=told):
        run_training(recipe(**values), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_start_is_part_of_the_run(tmp_path):
    path = tmp_path / "start.pt"
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(load(BASE["model"], None).state_dict(), path)
        run = recipe(weights=str(path), epochs=1)
        if not seed:
            run_training(run, tmp_path / "out", progress=False)
    with pytest.raises(RecoupError, match="another run: weights"):
        run_training(run, tmp_path / "out", progress=False)


def test_a_folder_is_one_runs(tmp_path):
    run = recipe(epochs=1)
    first = run_training(run, tmp_path, progress=False)
    weights = (tmp_path / "weights.safetensors").read_bytes()
    other = recipe(epochs=1, seed=1)
    with pytest.raises(RecoupError, match=r"holds another run \(seed was 0 and is 1\): .*--overwrite"):
        run_training(other, tmp_path, progress=False)
    assert (tmp_path / "weights.safetensors").read_bytes() == weights
    assert run_training(run, tmp_path, progress=False)["epochs"] == first["epochs"]
    assert run_training(other, tmp_path, overwrite=True, progress=False)["recipe"]["seed"] == 1
    assert (tmp_path / "weights.safetensors").read_bytes() != weights


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"model": ', b"\xff"])
def test_a_damaged_recipe_is_told(tmp_path, content):
    (tmp_path / "training-recipe.json").write_bytes(content)
    with pytest.raises(RecoupError, match=r"training-recipe.json is no recipe of a training run \(\w+Error: .*--over"):
        run_training(recipe(epochs=1), tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["training-recipe.json"]


def test_a_file_in_the_folders_place_is_told(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(RecoupError, match="out: cannot be made a folder for results"):
        run_training(recipe(epochs=1), tmp_path / "out", progress=False)


def test_a_mix_of_wings_trains_from_a_policy(tmp_path):
    """Hardware with activation scales gets them from training images: the network learns, and a second run is equal."""
    model = load(BASE["model"], None)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    rc.Policy({layers[1]: NBSMT(threads=2), layers[-1]: LBA()}, "mix").save(tmp_path / "mix.yaml")
    options = [
        "--model",
        BASE["model"],
        "--data",
        "digits",
        "--limit",
        "128",
        "--test-limit",
        "50",
        "--batch-size",
        "64",
    ]
    options += ["--policy", str(tmp_path / "mix.yaml"), "--epochs", "2", "--one-stage"]
    options += ["--batch-size", "64", "--calibration-images", "32"]
    for run in ("one", "two"):
        words = ["train", *options, "--lr", "0.05", "--out", str(tmp_path / run)]
        done = CliRunner().invoke(app, [*words, "--save-chip", str(tmp_path / f"{run}.st")], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    results = [json.loads((tmp_path / run / "training.json").read_text()) for run in ("one", "two")]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert results[0]["epochs"][-1]["loss"] < results[0]["epochs"][0]["loss"]
    weights = [load_file(tmp_path / run / "weights.safetensors") for run in ("one", "two")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    chip = rc.load(tmp_path / "one.st", load(BASE["model"], None))
    assert {name: layer.config for name, layer in emulated_layers(chip).items()} == {
        layers[1]: NBSMT(threads=2),
        layers[-1]: LBA(),
    }
    assert chip.get_submodule(layers[1]).activation_scale > 0


def test_all_layers_of_calibrated_tensor_cores_get_scales(tmp_path):
    """The first and the last too, which NB-SMT would leave in float."""
    wanted = recipe(config="TensorCore(scale='calibrated')", epochs=1, calibration_images=32)
    run_training(wanted, tmp_path / "run", progress=False, chip=tmp_path / "chip.st")
    chip = rc.load(tmp_path / "chip.st", load(BASE["model"], None))
    layers = emulated_layers(chip)
    assert len(layers) == sum(isinstance(module, nn.Conv2d | nn.Linear) for module in chip.modules())
    assert all(layer.activation_scale > 0 for layer in layers.values())
