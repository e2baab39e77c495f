"""Times of stages: of all of them, of this model as it is, and nothing of it is changed."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recoup.errors import RecoupError
from recoup.pipeline import automatic, balance, stage_times
from recoup.pipeline.timing import _within
from tests.pipeline.test_traced import BUILDS, DROPPING, build, sample


class Slow(torch.autograd.Function):
    """What takes long in the forward and longer in the backward pass."""

    @staticmethod
    def forward(ctx, x):  # noqa: ARG004
        time.sleep(0.01)
        return x.clone()

    @staticmethod
    def backward(ctx, *grad_outputs):  # noqa: ARG004
        time.sleep(0.03)
        return grad_outputs[0]


class Waits(nn.Linear):
    """A layer that does."""

    def forward(self, input):  # noqa: A002
        return Slow.apply(super().forward(input))


def test_a_slow_stage_is_found():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Waits(4, 4), nn.Linear(4, 3))
    found = stage_times(model, [["0"], ["2"], ["3"]], torch.ones(1, 4), torch.tensor([1]), rounds=3)
    assert len(found) == 3
    assert found[1].backward >= 0.029
    assert found[1].forward >= 0.009
    assert found[1].total > max(found[0].total, found[2].total)
    late = stage_times(model, [["0"], ["2"], ["3"]], torch.ones(1, 4), torch.tensor([1]), delays=[4, 2, 0], rounds=1)
    assert late[1].backward >= 0.029
    assert balance([*found, found[0]], 2) in ([1, 3], [2, 2])  # beside the slow one as few as can be


def test_what_taking_stages_apart_costs_is_taken_off():
    assert _within([3.0, 1.0, 2.0], 6.0, [1, 1, 1]) == [3, 1, 2]
    assert _within([3.0, 1.0, 2.0], 7.0, [1, 1, 1]) == [3, 1, 2]  # a whole pass that was disturbed
    assert _within([3.0, 1.0, 2.0], 5.0, [1, 1, 2]) == [2.75, 0.75, 1.5]
    assert _within([5.0, 0.25], 3.25, [1, 1]) == [4, 0]


@pytest.mark.parametrize("name", [name for name in BUILDS if name != "batch norm"])
def test_nothing_is_changed(name):
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    random = torch.get_rng_state()
    stages = DROPPING if name == "dropping" else automatic(model) if name in ("resnet20", "vgg11") else None
    x = sample(name)[:1]
    model.eval() if name in ("resnet18", "mobilenet") else model.train()
    y = torch.zeros(1, 6, dtype=torch.long) if name == "chargpt" else torch.zeros(1, dtype=torch.long)
    loss = (lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten())) if name == "chargpt" else F.cross_entropy
    found = stage_times(model, stages, x, y, loss=loss, rounds=1)
    assert sum(one.forward for one in found) > 0
    assert sum(one.backward for one in found) > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_what_is_refused():
    model, x, y = nn.Linear(4, 3), torch.ones(1, 4), torch.tensor([1])
    with pytest.raises(RecoupError, match=r"rounds.*must"):
        stage_times(model, None, x, y, rounds=0)
    with pytest.raises(RecoupError, match="x must be a tensor"):
        stage_times(model, None, [x], y)
    with pytest.raises(RecoupError, match="delays"):
        stage_times(nn.Sequential(model), [["0"]], x, y, delays=[2, 0])
    with pytest.raises(RecoupError, match="stage 0 names 'nothing'"):
        stage_times(model, [["nothing"]], x, y)
