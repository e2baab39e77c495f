"""Passes replayed as graphs give the bits of the eager simulator; checked with a tape of operations on the CPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recoup.errors import RecoupError
from recoup.pipeline import Simulator
from recoup.pipeline.mitigation import NAMES
from recoup.pipeline.norms import OnlineNorm2d
from tests.pipeline import tape
from tests.pipeline.networks import convolutional, images, make, multilayer, rates, vectors


def taped(simulator):
    """As cuda_graph=True on a GPU; every capture is counted."""
    count = []

    def capture(run):
        count.append(run)
        return tape.capture(run)

    tape.graphed(simulator, capture)
    return simulator, count


def equal(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_every_mitigation_equals_the_eager_simulator_bit_for_bit(name, size):
    net, samples = convolutional(), images(14)
    plain = copy.deepcopy(net)
    replayed, count = taped(make(net, rates, 0.9, 1e-2, name, update_size=size))
    eager = make(plain, rates, 0.9, 1e-2, name, update_size=size)
    for x, y in samples:
        assert replayed.step(x, y) == eager.step(x, y)
        assert equal(net, plain)
    assert len(count) == 1


def test_statistics_move_once_a_step():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3), OnlineNorm2d(4, 0.9, 0.9), nn.Flatten(), nn.Linear(36, 3)),
    )
    plain = copy.deepcopy(net)
    (replayed, count), eager = taped(make(net, rates, mitigation="sc")), make(plain, rates, mitigation="sc")
    for k, (x, y) in enumerate(images(12, shape=(2, 1, 7, 7))):
        for model in (net, plain):
            model.get_submodule("0.1").train(k < 8)  # a graph of its own
        assert replayed.step(x, y) == eager.step(x, y)
        assert equal(net, plain)
    assert len(count) == 2


class Pair(nn.Module):
    """Takes a dict and gives a tuple."""

    def __init__(self):
        super().__init__()
        self.inner = multilayer()

    def forward(self, x):
        return self.inner(x["a"] + x["b"]), x["b"].sum()


def test_structures_and_shapes():
    net = Pair()
    plain = copy.deepcopy(net)
    stages = [[f"inner.{s}"] for s in range(5)]

    def loss(out, y):
        return F.cross_entropy(out[0], y["target"]) + 0 * out[1] * y["weight"]

    one, other = (Simulator(model, stages, [4, 3, 2, 1, 0], rates, loss=loss) for model in (net, plain))
    replayed, count = taped(one)
    for batch in (1, 2, 1, 2, 3):
        for x, y in vectors(3, batch=batch):
            sample = {"a": x, "b": x / 2}, {"target": y, "weight": torch.tensor(1.0)}
            assert replayed.step(*sample) == other.step(*sample)
    assert equal(net, plain)
    assert len(count) == 3
    ((x, y),) = vectors(1)
    with pytest.raises(RecoupError, match="the inputs hold a float, which a graph would keep"):
        replayed.step({"a": x, "b": x}, {"target": y, "weight": 1.0})


def test_a_state_is_loaded_under_a_graph():
    samples, net, plain = vectors(12), multilayer(), multilayer()
    replayed, count = taped(make(net, rates, mitigation="spectrain"))
    eager = make(plain, rates, mitigation="spectrain")
    state = copy.deepcopy(replayed.state_dict())
    first = [replayed.step(x, y) for x, y in samples]
    replayed.load_state_dict(state)
    assert [replayed.step(x, y) for x, y in samples] == first == [eager.step(x, y) for x, y in samples]
    assert len(count) == 1


def test_what_cannot_be_captured_changes_nothing():
    def refuses(run):
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    net, plain = multilayer(), multilayer()
    simulator, eager = make(net, 0.1, mitigation="sc"), make(plain, 0.1, mitigation="sc")
    tape.graphed(simulator, refuses)
    samples = vectors(5)
    with pytest.raises(RecoupError, match=r"cannot be captured as a CUDA graph.*\(operation not permitted"):
        simulator.step(*samples[0])
    assert equal(net, plain)
    simulator._graphs = None
    assert [simulator.step(x, y) for x, y in samples] == [eager.step(x, y) for x, y in samples]


def test_the_cpu_has_no_graphs():
    with pytest.raises(RecoupError, match=r"cuda_graph=True\).*parameters are on cpu"):
        make(multilayer(), 0.1, cuda_graph=True)
    with pytest.raises(RecoupError, match="cuda_graph must be True or False"):
        make(multilayer(), 0.1, cuda_graph=1)
