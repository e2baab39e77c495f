"""The scaling rule against fractions, and what it keeps."""

import math
from fractions import Fraction

import pytest
import torch

from recoup.errors import RecoupError
from recoup.pipeline import scale_hyperparameters, scheduled


def test_the_published_figures():
    lr, momentum = scale_hyperparameters(0.1, 0.9, 128, 1)
    assert f"{momentum:.6f}" == "0.999177"
    assert f"{lr:.2e}" == "6.43e-06"


@pytest.mark.parametrize("times", [1, 2, 3, 7])
def test_equals_fractions_where_the_batch_is_a_multiple(times):
    lr, momentum = scale_hyperparameters(0.1, 0.9, 16, 16 * times)
    m = Fraction(9, 10) ** times
    # 0.9 is rounded to 2^-53, and 1 - m loses one digit of it: 1e-14 is some units in the last place
    assert momentum == pytest.approx(float(m), rel=1e-14)
    assert lr == pytest.approx(float(Fraction(1, 10) * times * (1 - m) / Fraction(1, 10)), rel=1e-14)


@pytest.mark.parametrize(("momentum", "reference", "batch"), [(0.9, 128, 1), (0.99, 32, 4), (0.5, 8, 3), (0.9, 8, 64)])
def test_a_gradient_decays_and_weighs_as_much_per_sample(momentum, reference, batch):
    lr, m = scale_hyperparameters(0.3, momentum, reference, batch)
    # a sample's gradient enters an update divided by the batch, and all its contributions sum to lr / (batch (1 - m))
    assert lr / (batch * (1 - m)) == pytest.approx(0.3 / (reference * (1 - momentum)), rel=1e-13)
    assert math.log(m) / batch == pytest.approx(math.log(momentum) / reference, rel=1e-12)  # log m near 0: 1e-16 / 1e-3


def test_the_reference_batch_changes_nothing_and_there_is_a_way_back():
    assert scale_hyperparameters(0.1, 0.9, 32, 32) == (0.1, 0.9)
    there = scale_hyperparameters(0.1, 0.9, 128, 1)
    assert scale_hyperparameters(*there, 1, 128) == pytest.approx((0.1, 0.9), rel=1e-12)  # 1 - m of 8e-4 costs 3 digits


def test_no_momentum():
    assert scale_hyperparameters(0.1, 0.0, 10, 5) == (0.05, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.9, 128, 1), "lr=0"),
        ((math.nan, 0.9, 128, 1), "lr=nan"),
        ((math.inf, 0.9, 128, 1), "above 0 and finite"),
        ((0.1, 1.0, 128, 1), "momentum from 0 to below 1"),
        ((0.1, -0.1, 128, 1), "momentum=-0.1"),
        ((0.1, math.nan, 128, 1), "momentum=nan"),
        ((0.1, 0.9, 0, 1), "reference_batch=0"),
        ((0.1, 0.9, 128, 0), "batch=0"),
        ((0.1, 0.9, 128, math.nan), "batch=nan"),
        ((0.1, 0.9, 128, 1.5), "batch=1.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(RecoupError, match=message):
        scale_hyperparameters(*arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=40),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    ],
)
def test_rates_of_torchs_schedulers(make):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    theirs, wanted = make(optimizer), []
    for _ in range(30):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    rate = scheduled(make, 0.1)
    assert rate(29) == wanted[29]
    assert [rate(k) for k in range(30)] == wanted


def test_a_scheduler_that_waits_for_a_metric_is_refused():
    with pytest.raises(RecoupError, match="ReduceLROnPlateau is no scheduler that only counts updates"):
        scheduled(torch.optim.lr_scheduler.ReduceLROnPlateau, 0.1)
