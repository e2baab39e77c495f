"""Accuracy against a direct count, ties, and refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import recoup as rc
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
