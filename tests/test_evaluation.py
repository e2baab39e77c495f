"""Accuracy against a direct count, ties, and refusals."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import recoup as rc
from recoup.evaluation import Metric
from tests.networks import images, small_net


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 12))
def test_counts_equal_sorting_each_row(seed, count, classes):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 4, (count, classes), generator=generator).float()
    label = torch.randint(classes, (count,), generator=generator)
    order = [sorted(range(classes), key=lambda c, row=row: (-row[c], c)) for row in logits.tolist()]
    hits = [sum(y in row[:k] for row, y in zip(order, label.tolist(), strict=True)) for k in (1, 5)]
    found = rc.evaluate(
        nn.Identity(),
        [(logits[: count // 2 + 1], label[: count // 2 + 1]), (logits[count // 2 + 1 :], label[count // 2 + 1 :])][
            : 1 + (count > count // 2 + 1)
        ],
    )
    assert found == rc.Accuracy(100 * hits[0] / count, 100 * hits[1] / count, count)


def test_wilson_interval_against_its_definition():
    accuracy = rc.Accuracy(91.0, 99.0, 1000)
    low, high = (bound / 100 for bound in accuracy.interval)
    for p in (low, high):  # the interval's ends are where the score test is exactly at its critical value
        assert abs(abs(0.91 - p) / (p * (1 - p) / 1000) ** 0.5 - 1.959964) < 1e-9  # rounding of float64


def test_mode_and_gradients_stay():
    model = small_net().train()
    rc.evaluate(model, [(images(4), torch.zeros(4, dtype=torch.long))])
    assert model.training


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (images(2), "no labels"),
        ((images(2), torch.zeros(3, dtype=torch.long)), r"shape \[2\]; got torch.int64 \[3\]"),
        ((images(2), torch.zeros(2)), "class indices"),
        ((images(2), torch.zeros(2, dtype=torch.bool)), "class indices"),
        ((images(2), [1, 2]), "got a list"),
        ((images(2), torch.tensor([0, 10])), "10 classes"),
        ((images(2), torch.tensor([-1, 0])), "10 classes"),
        ((images(2) * float("inf"), torch.tensor([1, 0])), "NaN or infinity"),
    ],
)
def test_refusals(batch, message):
    with pytest.raises(rc.RecoupError, match=message):
        rc.evaluate(small_net(), [batch])


def test_no_batches():
    with pytest.raises(rc.RecoupError, match="no batch"):
        rc.evaluate(small_net(), [])


def test_outputs_that_are_no_logits():
    with pytest.raises(rc.RecoupError, match=r"logits \[N, classes\]"):
        rc.evaluate(nn.Flatten(0), [(images(2), torch.tensor([0, 1]))])


def test_progress_goes_to_standard_error(capsys):
    rc.evaluate(small_net(), [(images(2), torch.tensor([0, 1]))], progress=True)
    assert capsys.readouterr().out == ""


def test_nats_are_the_mean_cross_entropy_of_labelled_tokens():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, 7, generator=generator)
    labels = torch.randint(7, (6, 5), generator=generator)
    labels[1, 2:], labels[4] = -100, -100
    found = rc.evaluate(nn.Identity(), [(logits[:4], labels[:4]), (logits[4:], labels[4:])], "nats")
    rows = [(row, int(y)) for row, y in zip(logits.flatten(0, 1), labels.flatten(), strict=True) if y != -100]
    by_hand = [math.log(sum(math.exp(v) for v in row.tolist())) - float(row[y]) for row, y in rows]
    assert found.value == pytest.approx(math.fsum(by_hand) / len(by_hand), rel=1e-12)  # other order of float64 sums
    assert found.count == len(by_hand)
    assert found.interval is not None
    assert found.interval[0] < found.value < found.interval[1]
    assert rc.evaluate(nn.Identity(), [(logits[0], labels[0])], "nats").count == 5  # a classifier: [N, V] and [N]


def test_intervals_hold_the_mean_19_times_of_20():
    """Of exponential samples, by the thousand."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(200):
        x = torch.rand(200, 3, generator=generator)
        labels = torch.zeros(200, dtype=torch.long)
        low, high = rc.evaluate(nn.Identity(), [(x, labels)], "nats").interval or (0.0, 0.0)
        held += low <= 1.12607 <= high  # the mean of log(sum exp) - u over uniform u, integrated numerically
    assert 180 <= held <= 199


def test_distances_are_measured_against_the_network_as_it_was():
    model, batches = small_net(), [images(12), images(5, seed=1)]
    with torch.no_grad():
        before = [model(x) for x in batches]
    rc.emulate_(model, rc.LBA.biased(4, 4), {"stem": None})
    rc.repair_(model, batches)
    statistics = model.block1.bn1.running_mean.clone()
    with torch.no_grad():
        after = [model(x) for x in batches]
    kl, mse = (rc.evaluate(model, batches, metric) for metric in ("kl", "mse"))
    assert torch.equal(model.block1.bn1.running_mean, statistics)
    p, q = (torch.cat(outputs).double().softmax(1) for outputs in (before, after))
    assert kl.value == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-9)  # logarithm of a quotient
    assert mse.value == float((torch.cat(before).double() - torch.cat(after).double()).square().mean(1).mean())
    assert kl.count == mse.count == 17
    assert rc.evaluate(model, batches, "kl", reference=model).value == 0
    other = rc.evaluate(rc.restore_(model), batches, "kl", reference=small_net(1))
    assert other.value > 0
    with pytest.raises(rc.RecoupError, match=r"metric='kl'.*reference= is needed"):
        rc.evaluate(model, batches, "kl")


def labelled(count=3):
    return [(images(4, seed), torch.zeros(4, dtype=torch.long)) for seed in range(count)]


def test_a_measure_of_one_s_own():
    def mean_output(model, batches):
        assert not model.training
        assert not torch.is_grad_enabled()
        return torch.cat([model(x) for x, _ in batches]).mean()

    model = small_net().train()
    found = rc.evaluate(model, labelled(), mean_output)
    assert (found.count, found.interval) == (12, None)
    assert model.training
    assert rc.evaluate(model, iter(labelled()), rc.evaluate).count == 12
    whole = rc.evaluate(model, labelled(), lambda *_: Metric(1.0, 3, (0.5, 2.0)))
    assert (whole.value, whole.count, whole.interval) == (1.0, 3, (0.5, 2.0))


def broken_at(number, fault):
    def broken(model, batches):
        for x, _ in batches:
            if torch.equal(x, images(4, number)):
                return fault()
        return 1.0

    return broken


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        ("top-1", r"metric='top-1'\): metric must be one of 'top1', 'nats', 'kl', 'mse'"),
        (broken_at(1, lambda: float("nan")), "metric broken gives NaN, from batch 1 on"),
        (broken_at(2, lambda: {}["loss"]), "metric broken failed at batch 2: KeyError: 'loss'"),
        (broken_at(0, lambda: "good"), "must give a number or a Metric; got str"),
        (broken_at(0, lambda: True), "must give a number or a Metric; got bool"),
    ],
)
def test_measures_that_are_none(metric, told):
    with pytest.raises(rc.RecoupError, match=told):
        rc.evaluate(small_net(), labelled(), metric)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (torch.full((2,), 10), r"labels lie in 10\.\.10, but the model has 10 outputs"),
        (torch.tensor([-1, 0]), "labels lie in -1"),
        (torch.zeros(2, 3, dtype=torch.long), r"logits \[2, 10\] and following tokens \[2, 3\] do not fit"),
        (torch.full((2,), -100), "no label at all"),
    ],
)
def test_nats_refuse(labels, told):
    with pytest.raises(rc.RecoupError, match=told):
        rc.evaluate(small_net(), [(images(2), labels)], "nats")


def test_the_batch_with_nan_is_named():
    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1) / (x.flatten(1) != 7)

    batches = [(torch.ones(2, 3), torch.zeros(2, dtype=torch.long)), (torch.full((2, 3), 7.0), torch.zeros(2).long())]
    for metric in ("top1", "nats"):
        with pytest.raises(rc.RecoupError, match=r"NaN or infinity \(batch 1\)"):
            rc.evaluate(Broken(), batches, metric)
