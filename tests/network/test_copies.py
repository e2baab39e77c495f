"""A copy of a network never computes with the network it was made of."""

import functools
import sys
import types
import weakref
from collections import deque
from typing import Any

import pytest
import torch
from torch import nn

import recoup as rc
from recoup import search
from recoup.network.copies import copied
from tests.networks import small_net

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


GLOBAL = None


def closure(net):
    plain = net.norm.forward
    net.norm.forward = lambda x: plain(x) + 1


def of_self(net):
    net.norm.forward = lambda x, norm=net.norm: nn.BatchNorm2d.forward(norm, x)


def decorated(net):
    @functools.wraps(net.norm.forward)
    def forward(x):
        return forward.__wrapped__(x)  # type: ignore[attr-defined]

    net.norm.forward = forward


def in_a_container(net):
    kept = {"parts": [(net.conv, None)]}

    def forward(x):
        def inner():
            return kept["parts"][0][0](x)

        return inner()

    net.conv_too = forward


def of_a_tensor(net):
    mean = net.norm.running_mean
    net.norm.forward = lambda x: x - mean[:, None, None]


def of_a_global(net):
    global GLOBAL  # noqa: PLW0603 -- as in a notebook
    GLOBAL = net.norm.forward
    net.norm.forward = lambda x: GLOBAL(x) + 1  # type: ignore[misc]


def hook(net):
    net.conv.register_forward_hook(lambda _, __, y: net.norm(y))


def hook_before(net):
    net.conv.register_forward_pre_hook(lambda _, args: (args[0] * net.norm.weight.mean(),))


class Object:
    def __init__(self, does):
        self.does = does

    def __call__(self, *args):
        return self.does(*args)


def of_an_object(net):
    plain = net.norm.forward
    net.norm.forward = Object(lambda x: plain(x) + 1)


KEPT: dict = {}


def in_a_global(net):
    KEPT["norm"] = net.norm
    net.norm.extra = lambda x: KEPT["norm"](x) + 1


def by_a_global_function(net):
    global GLOBAL  # noqa: PLW0603
    plain = net.norm.forward
    GLOBAL = lambda x: plain(x) + 1  # noqa: E731
    net.norm.forward = lambda x: GLOBAL(x) + 1  # type: ignore[misc]


def in_a_python_module(net):
    sys.modules[__name__].HELD = net.norm  # type: ignore[attr-defined]
    module = types.FunctionType(compile("here.HELD(x)", "", "eval"), {"here": sys.modules[__name__]})
    net.conv.extra = module


def in_a_deque(net):
    kept = deque([net.norm])
    net.conv.extra = lambda x: kept[0](x) + 1


class Slot:
    __slots__ = ("layer",)


def in_a_slot(net):
    slot = Slot()
    slot.layer = net.norm
    net.conv.register_forward_hook(lambda _, __, y: slot.layer(y))


def by_a_weak_reference(net):
    norm: Any = weakref.ref(net.norm)
    net.conv.extra = lambda x: norm()(x) + 1


WRAPPED = [closure, of_self, decorated, in_a_container, of_a_tensor, of_a_global, hook, hook_before, of_an_object]
WRAPPED += [in_a_global, by_a_global_function, in_a_python_module, in_a_deque, in_a_slot, by_a_weak_reference]


@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_function_that_holds_a_part_of_the_network_is_refused(wrap):
    net = Net()
    wrap(net)
    with pytest.raises(rc.RecoupError, match=r"test: (conv|norm|the model itself): .* is a function that holds \w+"):
        copied(net, "test")


def bound(net):
    net.norm.forward = types.MethodType(lambda self, x: nn.BatchNorm2d.forward(self, x) + 1, net.norm)


def partial(net):
    net.norm.forward = functools.partial(nn.BatchNorm2d.forward, net.norm)


def object_of_a_method(net):
    net.norm.forward = Object(types.MethodType(nn.BatchNorm2d.forward, net.norm))


def alien(net):
    other = nn.Conv2d(4, 4, 1)
    net.conv.register_forward_hook(lambda _, __, y: other(y))


def by_an_attribute_called_so(net):
    global GLOBAL  # noqa: PLW0603
    GLOBAL = net.norm
    net.conv.extra = lambda x: x.GLOBAL()


def of_torch(net):
    net.conv.extra = lambda x: torch.nn.functional.dropout(x, 0.5)


@pytest.mark.parametrize(
    "wrap", [bound, partial, object_of_a_method, alien, by_an_attribute_called_so, of_torch, lambda _: None]
)
def test_what_a_copy_takes_along_is_copied(wrap):
    net = Net().eval()
    wrap(net)
    other = copied(net, "test")
    before = other(X)
    assert torch.equal(before, net(X))
    with torch.no_grad():
        net.norm.running_mean.add_(1)
    assert torch.equal(other(X), before)
    with torch.no_grad():
        other.norm.running_mean.add_(1)
    assert torch.equal(other(X), net(X))


NOTED, SIZES = {}, weakref.WeakKeyDictionary()


@functools.lru_cache
def width(module):
    return module.weight.shape[0]


@pytest.mark.parametrize(
    "hook",
    [
        lambda module, _, output: NOTED.update({module: output.shape}),
        lambda module, _, output: SIZES.update({module: output.shape}),
        lambda module, *_: width(module) and None,
    ],
    ids=["dict", "weak keys", "lru_cache"],
)
def test_what_a_hook_notes_of_a_layer_is_no_layer(hook):
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].register_forward_hook(hook)
    net(torch.ones(1, 4))
    copied(net, "test")


def test_a_search_refuses_a_network_whose_copy_would_call_it():
    net = small_net()
    name, norm = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d))
    plain = norm.forward
    norm.forward = lambda x: plain(x) + 1
    with pytest.raises(rc.RecoupError, match=f"search: {name}: forward is a function that holds {name} of this very"):
        search.narrowest(net, [(torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))], budget=1.0)


def test_a_pipeline_refuses_it_too():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    plain = net[0].forward
    net[0].forward = lambda x: plain(x) + 1
    with pytest.raises(rc.RecoupError, match=r"pipeline.stage_times: 0: forward is a function that holds 0"):
        rc.pipeline.stage_times(net, [["0"], ["1"]], torch.rand(1, 3), torch.zeros(1, 3))
