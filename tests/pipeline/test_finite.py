"""What is not finite stops the pipeline with step and stage, and changes nothing."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recoup.errors import RecoupError
from recoup.pipeline import Simulator
from recoup.pipeline.rings import NEVER
from tests.pipeline import tape
from tests.pipeline.networks import make, multilayer, same_state, vectors, weights


class Weighted(nn.Module):
    """Gives its input times a constant that a test can break, in the forward or in the backward pass."""

    def __init__(self):
        super().__init__()
        self.forward_factor = self.backward_factor = 1.0

    def forward(self, x):
        x = x * self.forward_factor
        if x.requires_grad:
            x.register_hook(lambda g: g * self.backward_factor)
        return x


def breakable():
    """A multilayer network whose stage 2 ends in a `Weighted`, and that module."""
    net = multilayer()
    net.get_submodule("2").append(Weighted())
    return net, net.get_submodule("2.2")


@pytest.mark.parametrize(
    ("break_", "told"),
    [
        ("input", "the loss of step 6 is nan: the input of stage 0 is not finite"),
        ("forward", r"step 6 is nan: the output of module 2\.2 \(stage 2\) is not finite"),
        ("loss", r"step 6 is inf: all outputs of the stages are finite, so it is the loss \(stage 4\)"),
        ("backward", "the gradient of step 6 is not finite, first in stage 2"),
        ("some rows", "the gradient of step 6 is not finite, first in stage 2"),
    ],
)
@pytest.mark.parametrize("graph", [False, True])
def test_what_is_not_finite_stops_with_step_and_stage_and_changes_nothing(break_, told, graph):
    samples = vectors(12)
    (one, weighted), (other, _) = breakable(), breakable()
    factor = [1.0]
    stopped = make(one, 0.05, 0.9, 0.0, "lwpv+sc", loss=lambda out, y: F.cross_entropy(out, y) * factor[0])
    plain = make(other, 0.05, 0.9, 0.0, "lwpv+sc")
    for x, y in samples[:6]:
        stopped.step(x, y)
        plain.step(x, y)
    newest, state, (x, y) = weights(one), copy.deepcopy(stopped.state_dict()), samples[6]
    if graph:  # made while it is broken: a graph keeps what Python gave it
        tape.graphed(stopped, tape.capture)
    if break_ == "input":
        x = x * math.nan
    weighted.forward_factor = math.nan if break_ == "forward" else 1.0
    weighted.backward_factor = {"backward": math.inf, "some rows": torch.tensor([1.0] * 6 + [math.inf])}.get(
        break_, 1.0
    )
    factor[0] = math.inf if break_ == "loss" else 1.0
    with pytest.raises(RecoupError, match=told + ".*; nothing was updated"):
        stopped.step(x, y)
    assert all(torch.equal(p, newest[n]) for n, p in one.named_parameters())
    assert same_state(stopped.state_dict(), state)
    stopped._graphs, factor[0], weighted.forward_factor, weighted.backward_factor = None, 1.0, 1.0, 1.0
    assert [stopped.step(x, y) for x, y in samples[6:]] == [plain.step(x, y) for x, y in samples[6:]]


def test_weights_that_are_not_finite_are_named():
    net = multilayer()
    simulator = make(net, 1.0, mitigation="lwpv", delays_=[0, 0, 1, 0, 0])
    samples = vectors(3)
    simulator.step(*samples[0])
    simulator.lr = 1e308  # the weights are finite and the prediction of stage 2 will not be, one step later
    for part in simulator.rings.slots(1)["velocity"]:
        part.fill_(10.0)
    simulator.step(*samples[1])
    for part in simulator.rings.newest(2):
        part.zero_()
    simulator.rings._foreseen = NEVER
    with pytest.raises(RecoupError, match="step 2 is nan: the weights of stage 2 are not finite"):
        simulator.step(*samples[2])


def test_a_sum_that_overflows_is_not_a_gradient_that_is_not_finite():
    net = nn.Sequential(nn.Linear(4, 1, bias=False))
    simulator = Simulator(net, [["0"]], [0], 0.0, 0.0, 0.0, loss=lambda out, _: (out * 1e38).sum())
    assert math.isfinite(simulator.step(torch.full((1, 4), 3.0), None))
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda out, _: out, r"torch.float64 \[1, 3\]; it must be a floating tensor with one element"),
        (lambda *_: 0.5, "the loss is float"),
        (lambda out, _: out.argmax(), r"the loss is torch.int64 \[\]"),
        (lambda out, _: out.sum().detach(), "does not depend on any parameter"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss, told):
    net = multilayer()
    before = weights(net)
    simulator = make(net, 0.1, 0.9, 0.1, "sc", loss=loss)
    with pytest.raises(RecoupError, match=told):
        simulator.step(*vectors(1)[0])
    assert simulator.steps == 0
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_a_sum_between_modules_is_a_stage_of_its_own():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            y = self.one(x)
            return self.two(y + y.detach() * math.inf)

    simulator = Simulator(Sum(), [["one"], [], ["two"]], [0, 0, 0], 0.1, first=3)
    with pytest.raises(RecoupError, match=r"what enters module two \(stage 4\) is not finite"):
        simulator.step(torch.ones(1, 2), torch.tensor([0]))
