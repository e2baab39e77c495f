"""What repairs and costs measure is what layers compute, whatever hooks make of it afterwards."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize

import recoup as rc
from recoup.errors import RecoupWarning
from recoup.network.sites import survey

X = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))


class Does(nn.Module):
    """A hook as a module of its own."""

    def __init__(self, does):
        super().__init__()
        self.does = does

    def forward(self, x):
        return self.does(x)


def network(convert):
    torch.manual_seed(0)
    return convert(nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 8)).eval())


def narrow(net):
    return rc.emulate_(net, rc.LBA.m7e4())


def shared(net):
    return rc.emulate_(rc.calibrate_(net, [X], layers={"re:.*": True}), rc.NBSMT(threads=4))


REPAIRS = {
    "gain": (narrow, rc.lba.correct_gain_, "gain"),
    "gain of a tensor core": (
        lambda net: rc.emulate_(net, rc.TensorCore.hopper_fp8()),
        rc.tensorcore.correct_gain_,
        "gain",
    ),
    "bias": (shared, rc.correct_bias_, "bias_correction"),
    "bias of rows": (shared, lambda net, data: rc.correct_bias_(net, data, weigh="rows"), "bias_correction"),
}


def fitted(net, name):
    return [value for layer in net if (value := getattr(layer, name, None)) is not None]


@contextmanager
def hooked(layer, does, kind):
    """A hook of a kind on a layer."""
    everywhere = {
        "global": lambda: register_module_forward_hook(lambda m, _, y: does(y) if m is layer else None),
        "global before": lambda: register_module_forward_pre_hook(lambda m, a: (does(*a),) if m is layer else None),
        "own": lambda: layer.register_forward_hook(lambda _, __, y: does(y)),
        "own first": lambda: layer.register_forward_hook(lambda _, __, y: does(y), prepend=True),
        "before": lambda: layer.register_forward_pre_hook(lambda _, a: (does(*a),)),
    }
    handle = everywhere[kind]()
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["global", "global before", "own", "own first", "before"])
@pytest.mark.parametrize("repair", REPAIRS)
def test_a_repair_under_hooks_is_that_of_the_same_network_with_modules_for_them(repair, kind):
    convert, apply, name = REPAIRS[repair]
    does = lambda x: 3 * x + 0.5  # noqa: E731
    net, parts = network(convert), list(network(convert))
    parts.insert(2 if "before" in kind else 3, Does(does))
    twin = nn.Sequential(*parts)
    with hooked(net[2], does, kind):
        apply(net, [X[:20], X[20:]])
        y = net(X)
    apply(twin, [X[:20], X[20:]])
    assert len(fitted(net, name)) == 3
    assert all(map(torch.equal, fitted(net, name), fitted(twin, name)))
    assert torch.equal(y, twin(X))
    assert "forward" not in vars(net[2])


@pytest.mark.parametrize("repair", REPAIRS)
def test_a_repair_under_a_parametrization_is_that_of_its_weight(repair):
    convert, apply, name = REPAIRS[repair]
    net, twin = network(convert), network(convert)
    parametrize.register_parametrization(net[2], "weight", Does(lambda w: 2 * w))
    with torch.no_grad():
        twin[2].weight *= 2
    for one in (net, twin):
        apply(one, [X])
    assert all(map(torch.equal, fitted(net, name), fitted(twin, name)))


@pytest.mark.parametrize("repair", REPAIRS)
def test_a_forward_that_was_set_on_a_layer_is_told(repair):
    convert, apply, _ = REPAIRS[repair]
    net = network(convert)
    inner = net[2].forward
    net[2].forward = wrapper = lambda x: inner(x) + 5
    with pytest.warns(RecoupWarning, match="forward was set on 1 layers themselves: 2"):
        apply(net, [X])
    assert net[2].forward is wrapper


def test_sizes_are_those_of_the_layer_and_not_of_what_a_hook_makes_of_its_output():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5)).eval()
    inputs = torch.rand(2, 3, 8, 8)
    net(inputs)
    expected = survey(net, inputs, "test"), rc.nbsmt.cycles(net, inputs), rc.lightnorm.traffic(net, inputs)
    for layer, following in ((net[0], net[1]), (net[1], net[2])):
        layer.register_forward_hook(lambda _, __, y: torch.cat([y, y]))
        following.register_forward_pre_hook(lambda _, a: (a[0][: len(a[0]) // 2],))
    assert expected == (survey(net, inputs, "test"), rc.nbsmt.cycles(net, inputs), rc.lightnorm.traffic(net, inputs))
