"""The simulator equals an explicit tick pipeline bit for bit; what it refuses, and that it goes on exactly."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recoup import models
from recoup.errors import RecoupError
from recoup.pipeline import Mitigation, Simulator, constant_delays, delays
from recoup.pipeline.mitigation import NAMES
from tests.pipeline import naive, tick
from tests.pipeline.networks import by_child, convolutional, images, multilayer, vectors, weights

OPTIONS = {
    "half sc": Mitigation(compensation=0.5),
    "sc and stash": Mitigation(compensation=1.0, stash=True),
    "twice lwpw": Mitigation(prediction="weight", horizon=2.0),
    "shrink": Mitigation(shrink=0.9),
    "pipemare": Mitigation(annealing=15),
    "all": Mitigation(compensation=1.0, prediction="velocity", horizon=0.5, shrink=0.97, annealing=9),
}


def rates(k):
    return 0.04 / (1 + k / 20)


def make(net, *arguments, delays_=None, **options):
    stages = by_child(net)
    return Simulator(net, stages, delays(len(stages)) if delays_ is None else delays_, *arguments, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", [*NAMES.values(), *OPTIONS.values()], ids=[*NAMES, *OPTIONS])
def test_equals_the_tick_pipeline_bit_for_bit(how, dtype):
    net, samples = convolutional(dtype), images(30, dtype)
    losses, expected = tick.train(
        [list(stage) for stage in copy.deepcopy(net)], samples, rates, 0.9, 1e-2, how, F.cross_entropy
    )
    simulator = make(net, rates, 0.9, 1e-2, how)
    assert [simulator.step(x, y) for x, y in samples] == losses
    for stage, layers in zip(net, expected, strict=True):
        for layer, found in zip(stage, layers, strict=True):
            for name, parameter in layer.named_parameters():
                assert torch.equal(parameter, found[name])


@pytest.mark.parametrize("own", [[4, 3, 2, 1, 0], [0, 5, 1, 0, 9], [3] * 5], ids=["1f1b", "any", "constant"])
@pytest.mark.parametrize("name", list(NAMES))
def test_equals_the_lists_of_versions_for_any_delays(name, own):
    net, samples = multilayer(), vectors(30)
    schedule = [rates(k) for k in range(31)]
    expected, losses = naive.train(list(copy.deepcopy(net)), own, samples, schedule, 0.9, 1e-2, name, F.cross_entropy)
    simulator = make(net, rates, 0.9, 1e-2, name, delays_=own)
    assert [simulator.step(x, y) for x, y in samples] == pytest.approx(losses, rel=1e-12, abs=1e-13)
    for stage, found in zip(net, expected, strict=True):
        for key, parameter in stage.named_parameters():
            torch.testing.assert_close(parameter.detach(), found[key], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "past"])
def test_updates_that_change_nothing_can_be_skipped(name, large):
    if large:  # rows shown in place
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(128, 160), nn.Sequential(nn.Tanh(), nn.Linear(160, 128)), nn.Linear(128, 3))
        samples = vectors(12, 128, torch.float32)
    else:
        net, samples = convolutional(torch.float32), images(12, torch.float32)
    simulator, other = make(net, 0.04, 0.9, 1e-2, name), make(copy.deepcopy(net), 0.04, 0.9, 1e-2, name)
    other.skip(7)
    assert (other.steps, other.updates) == (7, 7)
    assert [other.step(x, y) for x, y in samples] == [simulator.step(x, y) for x, y in samples]
    found = weights(simulator.model)
    assert all(torch.equal(value, found[name]) for name, value in weights(other.model).items())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "spectrain"])
def test_no_delay_is_torch_sgd_bit_for_bit(name):
    net, samples = convolutional(), images(25)
    plain = copy.deepcopy(net)
    optimizer = torch.optim.SGD(plain.parameters(), 1.0, momentum=0.9, weight_decay=1e-2)
    simulator = make(net, rates, 0.9, 1e-2, name, delays_=constant_delays(6, 0))
    for k, (x, y) in enumerate(samples):
        optimizer.param_groups[0]["lr"] = rates(k)
        optimizer.zero_grad()
        value = F.cross_entropy(plain(x), y)
        value.backward()
        optimizer.step()
        assert simulator.step(x, y) == value.item()
        for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_stashing_in_a_residual_network_is_consistent_delayed_sgd():
    torch.manual_seed(0)
    net = models.resnet20(norm="group", width=8)
    D, samples = 2, images(5, shape=(1, 3, 8, 8))
    versions, velocity = [weights(net)], {}
    for k, (x, y) in enumerate(samples):
        stale = {n: w.detach().requires_grad_() for n, w in versions[max(0, k - D)].items()}
        value = F.cross_entropy(torch.func.functional_call(net, stale, (x,)), y)
        new = {}
        for (n, w), g in zip(versions[k].items(), torch.autograd.grad(value, list(stale.values())), strict=True):
            velocity[n] = g if k == 0 else velocity[n] * 0.9 + g
            new[n] = torch.add(w, velocity[n], alpha=-0.01)
        versions.append(new)
    simulator = Simulator(
        net, [["conv1", "bn1", "layer1", "layer2"], ["layer3"], ["linear"]], [D] * 3, 0.01, 0.9, 0.0, "stash"
    )
    for x, y in samples:
        simulator.step(x, y)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, versions[-1][name])


class AsConvolutions(nn.Module):
    """A multilayer network whose linear layers are 1 x 1 convolutions."""

    def __init__(self, net):
        super().__init__()
        self.stages = nn.ModuleList()
        for stage in net:
            linear = stage[0]
            layer = nn.Conv2d(linear.in_features, linear.out_features, 1).to(linear.weight.dtype)
            layer.weight.data.copy_(linear.weight[:, :, None, None])
            layer.bias.data.copy_(linear.bias)
            self.stages.append(nn.Sequential(layer, *stage[1:]))

    def forward(self, x):
        x = x[:, :, None, None]
        for stage in self.stages:
            x = stage(x)
        return x.flatten(1)


@pytest.mark.parametrize("name", list(NAMES))
def test_a_1x1_convolution_trains_as_the_linear_layer(name):
    net = multilayer()
    swapped = AsConvolutions(net)
    one = make(net, rates, 0.9, 1e-3, name)
    other = Simulator(swapped, [[f"stages.{s}"] for s in range(5)], delays(5), rates, 0.9, 1e-3, name)
    for x, y in vectors(30):
        assert one.step(x, y) == pytest.approx(other.step(x, y), rel=1e-12)
    for mine, theirs in zip(net.parameters(), swapped.parameters(), strict=True):
        torch.testing.assert_close(mine.flatten(), theirs.flatten(), rtol=1e-11, atol=1e-13)


def test_an_update_of_several_samples_is_the_batch_of_them():
    net, samples = multilayer(), vectors(24)
    whole = copy.deepcopy(net)
    one, other = make(net, rates, 0.9, 1e-3, "sc", update_size=4), make(whole, rates, 0.9, 1e-3, "sc")
    for first in range(0, 24, 4):
        group = samples[first : first + 4]
        single = [one.step(x, y) for x, y in group]
        together = other.step(torch.cat([x for x, _ in group]), torch.cat([y for _, y in group]))
        assert sum(single) / 4 == pytest.approx(together, rel=1e-12)
    for mine, theirs in zip(net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


def test_a_rate_set_between_steps_is_that_of_a_schedule():
    samples = vectors(20)
    one, other = multilayer(), multilayer()
    scheduled, by_hand = make(one, rates, 0.9, 0.0, "lwpv"), make(other, 1.0, 0.9, 0.0, "lwpv")
    for k, (x, y) in enumerate(samples):
        by_hand.lr = rates(k)
        assert by_hand.step(x, y) == scheduled.step(x, y)


def test_the_model_holds_the_newest_weights_after_an_error_in_the_backward_pass():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x * 1

        @staticmethod
        def backward(_ctx, *_gradients):  # type: ignore[override]
            raise RuntimeError("no backward")

    net, samples = multilayer(), vectors(9)
    broken = False
    simulator = make(net, 0.05, 0.9, 0.0, "lwpv", loss=lambda y, t: F.cross_entropy(Fails.apply(y) if broken else y, t))
    for x, y in samples[:-1]:
        simulator.step(x, y)
    newest, broken = weights(net), True
    with pytest.raises(RuntimeError, match="no backward"):
        simulator.step(*samples[-1])
    assert all(torch.equal(p, newest[n]) for n, p in net.named_parameters())
    assert all(p.grad is None for p in net.parameters())


def test_batch_norm_of_one_sample_is_refused():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
    simulator = Simulator(net, [["0"], ["1"]], [2, 0], 0.1)
    with pytest.raises(RecoupError, match=r"1 is a batch norm.*group norm"):
        simulator.step(torch.randn(1, 1, 4, 4), torch.tensor([0]))
    assert math.isfinite(simulator.step(torch.randn(2, 1, 4, 4), torch.tensor([0, 1])))


def test_autocast_is_refused():
    simulator = make(multilayer(dtype=torch.float32), 0.1)
    with torch.autocast("cpu"), pytest.raises(RecoupError, match="autocast"):
        simulator.step(*vectors(1, dtype=torch.float32)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delays_": [0, 1]}, "2 delays for 5 stages"),
        ({"delays_": [0, 1, -1, 0, 0]}, r"delays\[2\]=-1"),
        ({"delays_": [0, 1, 0.5, 0, 0]}, r"delays\[2\]=0.5"),
        ({"momentum": -0.1}, "momentum must be a number from 0"),
        ({"weight_decay": math.nan}, "weight_decay must be a number from 0"),
        ({"mitigation": "lwp"}, "the names are none, stash"),
        ({"update_size": 0}, "update_size"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(RecoupError, match=message):
        make(multilayer(), 0.1, **options)


@pytest.mark.parametrize("rate", [-0.1, math.nan])
def test_bad_rates(rate):
    with pytest.raises(RecoupError, match=r"learning rate of update 0|lr="):
        make(multilayer(), rate).step(*vectors(1)[0])


@pytest.mark.parametrize(
    "wrong", [{"momentum": 1.5}, {"momentum": math.nan}, {"lr": "0.1"}, {"lr": math.nan}, {"lr": -0.1}, {"lr": True}]
)
def test_rates_and_momenta_that_are_none_are_refused_where_they_are_given(wrong):
    (name,) = wrong
    with pytest.raises(RecoupError, match=f"{name}="):
        make(multilayer(), **{"lr": 0.1, "momentum": 0.9, **wrong})
