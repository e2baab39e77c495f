"""Pipelined training is the simulator over a data set, and resumes to the same weights."""

import copy

import pytest
import torch

import recoup.data
from recoup.errors import RecoupError
from recoup.models import digits_net
from recoup.pipeline import Simulator, automatic, delays, scale_hyperparameters
from recoup.training import Settings, train_pipelined
from recoup.training.run import TrainingRecipe, run_training
from recoup.training.schedule import schedule

SETTINGS = Settings(momentum=0.9, weight_decay=1e-4, seed=3, augment=False, save_every=25)


@pytest.fixture(scope="module")
def digits():
    return recoup.data.load("digits", "train", limit=60, seed=0)


def network():
    torch.manual_seed(0)
    return digits_net(norm="group")


def fit(model, digits, **changes):
    options = {"mitigation": "lwpv+sc", "epochs": 2, "learning_rate": 0.05, "settings": SETTINGS, "reference_batch": 16}
    return train_pipelined(model, digits, None, **{**options, **changes})


def same(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_it_is_the_simulator_over_the_data(digits):
    model, other = network(), network()
    rows = fit(model, digits)
    lr, momentum = scale_hyperparameters(0.05, 0.9, 16, 1)
    factor, stages = schedule("cosine", 120), automatic(other)
    simulator = Simulator(
        other, stages, delays(len(stages)), lambda k: lr * factor(min(k, 119)), momentum, 1e-4, "lwpv+sc"
    )
    losses = []
    for epoch in range(2):
        batches = digits.batches(1, seed=3 * 100_003 + epoch, shuffle=True)
        losses.append(sum(simulator.step(x, y) for x, y in batches) / 60)
    assert [row["loss"] for row in rows] == losses
    assert same(model, other)


@pytest.mark.parametrize("at", [30, 60, 85])
def test_an_interrupted_run_ends_with_the_same_weights(digits, tmp_path, monkeypatch, at):
    whole, cut = network(), network()
    rows = fit(whole, digits)
    step, count = Simulator.step, [0]

    def failing(self, x, y):
        count[0] += 1
        if count[0] == at:
            raise KeyboardInterrupt
        return step(self, x, y)

    monkeypatch.setattr(Simulator, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        fit(copy.deepcopy(cut), digits, folder=tmp_path)
    monkeypatch.setattr(Simulator, "step", step)
    assert fit(cut, digits, folder=tmp_path) == rows
    assert same(cut, whole)
    with pytest.raises(RecoupError, match="is of another run"):
        fit(network(), digits, folder=tmp_path, epochs=3)


def test_the_command(tmp_path):
    values = {"model": "digits_net", "norm": "group", "data": "digits", "pipeline": "sc", "epochs": 1, "limit": 40}
    result = run_training(TrainingRecipe.build({**values, "test_limit": 40}), tmp_path, progress=False)
    assert list(result["accuracy"]) == ["float, before", "after the pipeline (sc)"]
    with pytest.raises(RecoupError, match=r"pipeline: .*the names are none, stash, sc"):
        TrainingRecipe.build({**values, "pipeline": "fast"})
    with pytest.raises(RecoupError, match="two stages has no pipeline"):
        run_training(TrainingRecipe.build({**values, "config": "lba-m7e4"}), tmp_path / "other", progress=False)
    with pytest.raises(RecoupError, match="is a batch norm, and the batch has one sample"):
        run_training(TrainingRecipe.build({**values, "norm": "batch"}), tmp_path / "batch", progress=False)
    light = {"model": "digits_net", "data": "digits", "config": "LightNorm(block=8)", "epochs": 1, "limit": 128}
    result = run_training(TrainingRecipe.build({**light, "test_limit": 40}), tmp_path / "light", progress=False)
    assert list(result["accuracy"]) == ["float, before", "emulated, before", "after one stage"]
