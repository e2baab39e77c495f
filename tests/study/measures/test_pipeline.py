"""The pipeline study against a plain training loop of torch, and its file."""

import json

import pytest
import torch
from torch import nn

from recoup.data import load
from recoup.errors import RecoupError
from recoup.pipeline import Mitigation
from recoup.study.measures import pipeline
from recoup.study.measures.pipeline import PB, SGDM, Case, PipelineResults, Setting, residual_mlp, study

SMALL = Setting(stages=4, width=8, epochs=2, batch=100)
NONE, SC = Mitigation(), Mitigation.parse("sc")


@pytest.fixture(scope="module")
def found():
    cases = [Case(label, how, factor, seed) for label, how, factor in CASES for seed in (0, 3)]
    return study(SMALL, cases)


CASES = [(SGDM, NONE, 0.0), (PB, NONE, 1.0), ("half", NONE, 0.5), ("SC", SC, 1.0), ("no delay", SC, 0.0)]


def plain(seed):
    """Loss of every update and final accuracy of torch's own SGD with momentum on the same images."""
    batch = next(iter(load("digits", "train").batches(10**6)))
    x, y = batch[0].flatten(1), batch[1]
    model = residual_mlp(4, 8, seed)
    rate, momentum = SMALL.scaled
    steps = 2 * (len(x) // 100)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(2):
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x) // 100 * 100, 100):
            optimizer.param_groups[0]["lr"] = rate * (1 - len(losses) / steps)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[order[start : start + 100]]), y[order[start : start + 100]])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    test = next(iter(load("digits", "test").batches(10**6)))
    right = (model(test[0].flatten(1)).argmax(1) == test[1]).float().mean()
    return losses, 100 * float(right)


@pytest.mark.parametrize(("index", "seed"), [(0, 0), (1, 3)])
def test_without_delay_it_is_torchs_training(found, index, seed):
    losses, accuracy = plain(seed)
    row = found.of(SGDM)[index]
    ends = [image // 100 for image in found.images]
    means = [sum(losses[a:b]) / (b - a) for a, b in zip([0, *ends], ends, strict=False)]
    # A batched matrix product sums in another order: some float32 roundings, grown by the steps before.
    assert row.losses == pytest.approx(means, rel=1e-3)
    assert row.accuracies[-1] == pytest.approx(accuracy, abs=0.5)  # an image or two on the border
    assert row.accuracy == row.accuracies[-1]
    assert row.loss == pytest.approx(sum(losses[len(losses) // 2 :]) / (len(losses) // 2), rel=1e-3)


def test_delays_are_scaled_and_reported(found):
    assert found.delays == (6, 4, 2, 0)
    assert found.labels() == [label for label, _, _ in CASES]
    assert [row.seed for row in found.of(PB)] == [0, 3]
    late, half, sgdm = (found.of(label)[0].losses for label in (PB, "half", SGDM))
    assert late != half != sgdm != late
    assert found.of("no delay")[0].losses == sgdm
    assert found.images[-1] == 2 * (len(load("digits", "train")) // 100) * 100
    assert len(found.images) == 2 * pipeline.POINTS


def test_diverged_runs_are_null_and_the_others_go_on():
    hot = Setting(stages=4, width=8, epochs=1, batch=100, reference_lr=1e6)
    rows = study(hot, [Case(PB, NONE, 1.0, 0)]).rows
    assert rows[0].losses[-1] is None
    assert rows[0].loss != rows[0].loss
    assert rows[0].accuracy != rows[0].accuracy
    assert all(0 <= value <= 100 for value in rows[0].accuracies)


def test_torchs_random_state_is_left_alone():
    before = torch.get_rng_state()
    residual_mlp(4, 8, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_file_is_read_as_it_was_written(found, tmp_path):
    assert PipelineResults.load(tmp_path) is None
    path = found.save(tmp_path)
    assert path.name == "pipeline.json"
    assert PipelineResults.load(tmp_path) == found


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text[:-20], "not a pipeline study of this recoup"),
        (lambda text: json.dumps({**json.loads(text), "schema_version": 2}), "schema_version"),
        (lambda text: json.dumps({**json.loads(text), "extra": 2}), "extra"),
    ],
)
def test_files_that_are_none(found, tmp_path, change, told):
    path = found.save(tmp_path)
    path.write_text(change(path.read_text()))
    with pytest.raises(RecoupError, match=told):
        PipelineResults.load(tmp_path)


def test_errors():
    with pytest.raises(RecoupError, match="0 cases"):
        study(SMALL, [])
    with pytest.raises(RecoupError, match="batch of at most 1201 images"):
        study(Setting(batch=5000), [Case(PB, NONE, 1.0, 0)])
