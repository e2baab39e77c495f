"""Pipelined training is the simulator over a data set, and resumes to the same weights."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import recoup.data
from recoup.errors import RecoupError
from recoup.models import digits_net
from recoup.pipeline import Simulator, automatic, delays, scale_hyperparameters
from recoup.training import Settings, train_pipelined
from recoup.training.ranks import Epochs
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


@pytest.mark.parametrize("size", [1, 4])
def test_without_delay_it_is_torch_sgd(digits, size):
    model, plain = network(), network()
    rows = fit(model, digits, mitigation="none", delays=0, update_size=size)
    lr, momentum = scale_hyperparameters(0.05, 0.9, 16, size)
    optimizer, factor = (
        torch.optim.SGD(plain.parameters(), lr, momentum, weight_decay=1e-4),
        schedule("cosine", 120 // size),
    )
    count, losses = 0, []
    for epoch in range(2):
        total = 0.0
        for x, y in digits.batches(1, seed=3 * 100_003 + epoch, shuffle=True):
            value = F.cross_entropy(plain(x), y)
            value.backward()
            total += value.item()
            count += 1
            if count % size == 0:
                for parameter in plain.parameters():
                    parameter.grad.div_(size)
                optimizer.param_groups[0]["lr"] = lr * factor(count // size - 1)
                optimizer.step()
                optimizer.zero_grad()
        losses.append(total / 60)
    assert [row["loss"] for row in rows] == losses
    assert same(model, plain)


@pytest.mark.parametrize(
    ("name", "own"), [("1f1b", lambda S: delays(S, "1f1b")), (3, lambda S: [3] * S), ("3", lambda S: [3] * S)]
)
def test_delays_have_names(digits, name, own):
    one, other = network(), network()
    assert fit(one, digits, delays=name, epochs=1) == fit(other, digits, delays=own(len(automatic(other))), epochs=1)
    assert same(one, other)


class Noisy(nn.Module):
    """Digits' network with dropout before it."""

    def __init__(self):
        super().__init__()
        self.noise, self.inner = nn.Dropout(0.2), network()

    def forward(self, x):
        return self.inner(self.noise(x))


@pytest.mark.parametrize(("at", "size"), [(30, 1), (60, 1), (85, 1), (85, 3)])
def test_an_interrupted_run_ends_with_the_same_weights(digits, tmp_path, monkeypatch, at, size):
    torch.manual_seed(at)  # the seed is the settings', whatever ran before
    stages = [["noise", "inner.features"], ["inner.classifier"]]
    again = partial(fit, update_size=size, stages=stages)
    whole, cut = Noisy(), Noisy()
    rows = again(whole, digits)
    step, count = Simulator.step, [0]

    def failing(self, x, y):
        count[0] += 1
        if count[0] == at:
            raise KeyboardInterrupt
        return step(self, x, y)

    monkeypatch.setattr(Simulator, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        again(copy.deepcopy(cut), digits, folder=tmp_path)
    monkeypatch.setattr(Simulator, "step", step)
    assert again(cut, digits, folder=tmp_path) == rows
    assert same(cut, whole)
    for change in ({"epochs": 3}, {"delays": 1}, {"update_size": 2}):
        with pytest.raises(RecoupError, match="is of another run"):
            again(Noisy(), digits, folder=tmp_path, **change)
    (tmp_path / "pipeline.pt").write_bytes((tmp_path / "pipeline.pt").read_bytes()[:999])
    with pytest.raises(RecoupError, match=r"pipeline.pt is no checkpoint \(.*delete it"):
        again(Noisy(), digits, folder=tmp_path)


@pytest.mark.slow
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


def test_delays_and_update_size_of_the_command(tmp_path):
    values = {"model": "digits_net", "norm": "group", "data": "digits", "epochs": 1, "limit": 40, "test_limit": 40}
    one = TrainingRecipe.build({**values, "pipeline": "none", "delays": "0", "update_size": 4})
    assert (one.delays, one.update_size) == (0, 4)
    run_training(one, tmp_path, progress=False)
    kept = json.loads((tmp_path / "training-recipe.json").read_text())
    assert (kept["delays"], kept["update_size"]) == (0, 4)
    for change, name in (
        ({"delays": 1}, "delays"),
        ({"delays": "1f1b"}, "delays"),
        ({"update_size": 2}, "update_size"),
    ):
        with pytest.raises(RecoupError, match=f"holds another run .{name} was"):
            run_training(TrainingRecipe.build({**one.model_dump(), **change}), tmp_path, progress=False)
    for name in ("delays", "update_size"):  # a folder from before there was the option
        kept.pop(name)
    (tmp_path / "training-recipe.json").write_text(json.dumps(kept))
    with pytest.raises(RecoupError, match="delays was 'fine-grained' and is 0"):
        run_training(one, tmp_path, progress=False)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"delays": "2f2b"}, r"delays: delays '2f2b': must be fine-grained, 1f1b or an integer from 0"),
        ({"delays": "-1"}, "an integer from 0"),
        ({"delays": -1}, "an integer from 0"),
        ({"delays": True}, "an integer from 0"),
        ({"delays": 1 << 40}, "an integer from 0 to 1048576"),
        ({"delays": None}, "an integer from 0"),
        ({"update_size": 0}, "update_size: Input should be greater than or equal to 1"),
    ],
)
def test_bad_delays_and_update_sizes(values, told):
    with pytest.raises(RecoupError, match=told):
        TrainingRecipe.build({"model": "digits_net", "data": "digits", "pipeline": "sc", **values})


def test_an_update_larger_than_the_run_is_refused(digits):
    with pytest.raises(RecoupError, match="update_size must be an integer from 1 to 120"):
        fit(network(), digits, update_size=121)


@pytest.mark.parametrize("values", [{"delays": 2}, {"update_size": 2}])
def test_they_need_a_pipeline(tmp_path, values):
    recipe = TrainingRecipe.build({"model": "digits_net", "data": "digits", **values})
    with pytest.raises(RecoupError, match=f"{next(iter(values))}: only a pipeline has it; add --pipeline"):
        run_training(recipe, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_samples_of_all_epochs_are_those_of_one_process(digits):
    settings = replace(SETTINGS, augment=digits.augmentation is not None)
    samples, k = Epochs(digits, 3, settings), 0
    assert len(samples) == 180
    for epoch in range(3):
        seed = settings.seed * 100_003 + epoch
        for x, y in digits.batches(1, augment=settings.augment, seed=seed, shuffle=True):
            assert torch.equal(samples[k][0], x)
            assert torch.equal(samples[k][1], y)
            k += 1
    assert torch.equal(samples[2][0], Epochs(digits, 3, settings)[2][0])


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    values = {
        "model": "digits_net",
        "norm": "group",
        "data": "digits",
        "pipeline": "lwpv+sc",
        "epochs": 2,
        "limit": 12,
        "test_limit": 20,
        "learning_rate": 0.05,
        "reference_batch": 16,
        "save_every": 10,
    }
    one = run_training(TrainingRecipe.build(values), tmp_path / "one", progress=False)
    two = run_training(TrainingRecipe.build({**values, "ranks": 2}), tmp_path / "two", progress=False)
    assert two["epochs"][-1]["top1"] == one["epochs"][-1]["top1"]
    assert [row["loss"] for row in two["epochs"]] == [row["loss"] for row in one["epochs"]]
    weights = [load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_may_go_on_over_other_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr("recoup.training.run.launch", lambda folder, _: (folder / "training.json").write_text("{}"))
    values = {"model": "digits_net", "norm": "group", "data": "digits", "pipeline": "sc", "epochs": 1, "limit": 12}
    for ranks in (3, 2, 4):
        run_training(TrainingRecipe.build({**values, "ranks": ranks}), tmp_path, progress=False)
        assert json.loads((tmp_path / "training-recipe.json").read_text())["ranks"] == ranks
    with pytest.raises(RecoupError, match=r"holds another run \(ranks was 4 and is 1\)"):
        run_training(TrainingRecipe.build(values), tmp_path, progress=False)


def test_ranks_need_a_pipeline(tmp_path):
    recipe = TrainingRecipe.build({"model": "digits_net", "data": "digits", "ranks": 2})
    with pytest.raises(RecoupError, match="ranks: only a pipeline has it"):
        run_training(recipe, tmp_path, progress=False)
