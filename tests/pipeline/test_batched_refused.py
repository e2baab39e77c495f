"""What `Batched` refuses before it changes anything."""

import math

import pytest
import torch
from torch import nn

from recoup.errors import RecoupError
from recoup.pipeline import Batched, Run
from tests.pipeline.test_batched import Doubled, nets, samples


@pytest.mark.parametrize(
    ("models", "runs", "message"),
    [
        ([], [], "0 models for 0 runs"),
        (nets(3, 3), [Run([1, 0])], "2 models for 1 runs"),
        (nets(3, 4), [Run([1, 0])] * 2, r"1\.weight is torch\.float64 \[3, 7\] in the first .*\[4, 7\] in model 1"),
        ([*nets(3), *nets(3)[0].children()][:2], [Run([1, 0])] * 2, "nothing in model 1|not have the same parameters"),
        ([nets(3)[0], nets(3)[0].float()], [Run([1, 0])] * 2, r"torch\.float32 \[7, 7\] in model 1"),
        (nets(3), [Run([1])], "1 delays for 2 stages"),
        (nets(3), [Run([1, -1])], r"delays\[1\]=-1"),
        ([nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7))], [Run([1, 0])], "1 is a batch norm in training"),
    ],
)
def test_models_and_runs_that_do_not_fit(models, runs, message):
    with pytest.raises(RecoupError, match=message):
        Batched(models, [["0"], ["1"]], runs)


def test_a_run_that_is_none():
    for arguments, message in (
        ({"mitigation": "lwp"}, "the names are none, stash"),
        ({"lr": -1.0}, r"pipeline.Run\(lr=-1.0\): lr must be"),
    ):
        with pytest.raises(RecoupError, match=message):
            Run([1, 0], **arguments)


def test_stages_that_do_not_fit():
    for stages, message in (([["0"], []], "no stage holds 1"), ([["0"], ["0", "1"]], "module '0' is in stage 0")):
        with pytest.raises(RecoupError, match=message):
            Batched(nets(3), stages, [Run([1, 0])])


@pytest.mark.parametrize(("field", "value"), [("momentum", -0.1), ("momentum", math.nan), ("weight_decay", math.inf)])
def test_bad_numbers(field, value):
    with pytest.raises(RecoupError, match=f"{field} must be a number from 0"):
        Run([0], **{field: value})


@pytest.mark.parametrize("rate", [-0.1, math.nan])
def test_bad_rates(rate):
    batched = Batched(nets(3, 3), [["0"], ["1"]], [Run([1, 0]), Run([1, 0], lr=lambda k: rate if k else 0.1)])
    batched.step(*next(samples(2)))
    with pytest.raises(RecoupError, match="learning rate of run 1 in step 1 is"):
        batched.step(*next(samples(2)))


def test_inputs_without_a_row_a_run():
    batched = Batched(nets(3, 3), [["0"], ["1"]], [Run([1, 0])] * 2)
    (x, y), (more, _) = next(samples(2)), next(samples(3))
    for bad, shape in (((more, y), r"\[3, 1, 7\]"), ((x, y[0]), r"\[1\]"), ((x, torch.tensor(0)), r"\[\]")):
        with pytest.raises(RecoupError, match=f"an input is {shape}; it must have a row a run, 2"):
            batched.step(*bad)


def test_autocast_is_refused():
    batched = Batched([net.float() for net in nets(3)], [["0"], ["1"]], [Run([1, 0], "stash")])
    x, y = next(samples(1))
    with torch.autocast("cpu"), pytest.raises(RecoupError, match="autocast"):
        batched.step(x.float(), y)


def test_errors_name_the_module():
    net = nn.Sequential(nn.Linear(7, 7), Doubled(7, 3)).double()
    with pytest.raises(RecoupError, match=r"network\.1 saves weights derived"):
        Batched([net], [["0"], ["1"]], [Run([2, 1])]).step(*next(samples(1)))


def test_the_state_of_another_dtype_is_refused():
    mine, theirs = (Batched([net], [["0"], ["1"]], [Run([1, 0])]) for net in (nets(3)[0], nets(3)[0].float()))
    with pytest.raises(RecoupError, match="shapes is"):
        mine.load_state_dict(theirs.state_dict())
