"""Parameters in one vector: tied, frozen and unused ones, and what others may not do to them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recoup.errors import RecoupError
from recoup.pipeline import Simulator
from tests.pipeline.networks import make, multilayer, vectors, weights


def test_frozen_parameters_stay():
    net = multilayer()
    net[1].requires_grad_(False)
    before = weights(net)
    simulator = make(net, 0.1, 0.9, 0.1, "sc")
    for x, y in vectors(5):
        simulator.step(x, y)
    changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if not name.startswith("1.")}


def test_foreign_writes_are_refused():
    net = multilayer()
    simulator = make(net, 0.1)
    simulator.step(*vectors(1)[0])
    with torch.no_grad():
        dict(net.named_parameters())["2.0.weight"].mul_(2)
    with pytest.raises(RecoupError, match=r"2\.0\.weight was written to"):
        simulator.step(*vectors(1)[0])


def test_moved_parameters_are_refused():
    net = multilayer()
    simulator = make(net, 0.1)
    net.float()
    with pytest.raises(RecoupError, match="was moved"):
        simulator.step(*vectors(1, dtype=torch.float32)[0])


def replace(net):
    net[2][0].weight = nn.Parameter(net[2][0].weight.detach().clone())


def freeze(net):
    net[2][0].weight.requires_grad_(False)


def unfreeze(net):
    net[4][0].bias.requires_grad_(True)


def load(net):
    net.load_state_dict(net.state_dict(), assign=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (replace, r"2\.0\.weight was replaced"),
        (freeze, r"2\.0\.weight was frozen"),
        (unfreeze, r"4\.0\.bias was unfrozen"),
        (load, r"0\.0\.weight was replaced"),
    ],
)
def test_parameters_that_would_silently_not_train_are_refused(change, told):
    net = multilayer()
    net.get_parameter("4.0.bias").requires_grad_(False)
    simulator = make(net, 0.1)
    simulator.step(*vectors(1)[0])
    change(net)
    with pytest.raises(RecoupError, match=told + " since the pipeline was filled"):
        simulator.step(*vectors(1)[0])


class Tied(nn.Module):
    """One matrix used twice within a stage, and a parameter that only some samples use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.one, self.two, self.last = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.two.weight = self.one.weight
        self.rare = nn.Parameter(torch.ones(7))

    def forward(self, x):
        y = self.two(torch.tanh(self.one(x)))
        return self.last(y * self.rare if x[0, 0] > 0 else y)


def test_tied_and_unused_parameters_are_torch_sgd():
    net = Tied()
    plain, samples = copy.deepcopy(net), vectors(20, dtype=torch.float32)
    assert {bool(x[0, 0] > 0) for x, _ in samples} == {True, False}
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9, weight_decay=1e-2)
    simulator = Simulator(net, [[""]], [0], 0.05, 0.9, 1e-2)
    for x, y in samples:
        optimizer.zero_grad(set_to_none=False)  # unused: a gradient of zero
        value = F.cross_entropy(plain(x), y)
        value.backward()
        for parameter in plain.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizer.step()
        assert simulator.step(x, y) == value.item()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_of_others_do_not_leak_into_an_update(size):
    samples = vectors(9)
    one, other = multilayer(), multilayer()
    disturbed, plain = make(one, 0.05, update_size=size), make(other, 0.05, update_size=size)
    for k, (x, y) in enumerate(samples):
        if k % size == 0:
            F.cross_entropy(one(x), y).backward()  # somebody looks at gradients between updates
        assert disturbed.step(x, y) == plain.step(x, y)
    if size > 1:
        disturbed.step(*samples[0])
        F.cross_entropy(one(samples[1][0]), samples[1][1]).backward()
        with pytest.raises(RecoupError, match="gradients were changed between the samples of one update"):
            disturbed.step(*samples[1])
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
