"""What passes over calibration images measured is given again where they would measure the same, and only there."""

import functools
import random
import threading
import warnings
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from recoup.calibrate import calibrate_
from recoup.emulate import emulate_, restore_
from recoup.errors import RecoupWarning
from recoup.lba import LBA
from recoup.lba.repair import correct_gain_
from recoup.nbsmt import NBSMT
from recoup.network.attributes import attributes
from recoup.network.emulated import running
from recoup.network.norms import Statistics
from recoup.network.passes import Passes, keeping_passes
from recoup.recalibrate import recalibrate_
from recoup.repair import undo_

IMAGES = [torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]

RAN = []


class Net(nn.Module):
    """Three convolutions, of which the first stays in float under NB-SMT; it counts its passes and may misbehave."""

    def __init__(self, does=lambda _: None):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.last, self.does = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), does
        self.register_buffer("memory", torch.zeros(1))

    @property
    def passes(self):
        """Batches since it was set; no network holds them, which would then be another one after each pass."""
        return len(RAN)

    @passes.setter
    def passes(self, _):
        RAN.clear()

    def forward(self, x):
        RAN.append(self)
        self.does(self)
        return self.last(self.norm(self.conv(self.first(x).relu())).relu()).mean((2, 3))


def network(does=lambda _: None):
    torch.manual_seed(0)
    net = Net(does).eval()
    calibrate_(net, IMAGES)
    return net


def repaired(net, config, method):
    """The statistics and gains after a repair on a config, which is taken back, and how many batches it ran."""
    emulate_(net, config)
    net.passes = 0
    if method == "gain":
        correct_gain_(net, IMAGES)
    else:
        recalibrate_(net, IMAGES, method)
    found = [net.norm.running_mean.clone(), net.norm.running_var.clone()]
    found += [layer.gain.clone() for layer in (net.conv, net.last) if getattr(layer, "gain", None) is not None]
    undo_(net)
    restore_(net)
    return found, net.passes


STEPS = [
    (NBSMT(threads=1), "average", 2),
    (NBSMT(threads=2), "average", 2),
    (NBSMT(threads=2), "paired", 0),  # both of its runs are known
    (NBSMT(threads=4), "paired", 2),  # the baseline is that of two threads
    (NBSMT(threads=2, policy="A"), "average", 2),
    (LBA(), "average", 2),
    (LBA(), "paired", 2),
    (LBA(chunk=8), "paired", 4),
    (LBA(), "gain", 2),
    (LBA(), "gain", 0),
    (LBA(chunk=8), "gain", 2),
    (LBA(), "paired", 0),
    (LBA(), "ema", 2),
]


def test_repairs_share_what_they_measure():
    kept, passes = network(), Passes()
    for config, method, batches in STEPS:
        expected, _ = repaired(network(), config, method)
        with keeping_passes(passes, "images"):
            found, ran = repaired(kept, config, method)
        assert ran == batches, (config, method)
        assert all(map(torch.equal, found, expected))


def changed_weight(net):
    net.conv.weight.data[0, 0, 0, 0] += 1


def changed_statistics(net):
    net.norm.running_mean += 1


def changed_norm(net):
    net.norm.weight.data *= 2


def changed_buffer(net):
    net.memory += 1


def changed_class(net):
    net.last.__class__ = type("Own", (nn.Conv2d,), {})


def changed_scale(net):
    net.conv.activation_scale *= 2


@pytest.mark.parametrize(
    "change",
    [changed_weight, changed_statistics, changed_norm, changed_buffer, changed_class, changed_scale],
)
def test_what_changes_a_pass_has_it_made_anew(change):
    net, passes = network(), Passes()
    with keeping_passes(passes, "images"):
        repaired(net, NBSMT(threads=2), "average")
        assert repaired(net, NBSMT(threads=2), "average")[1] == 0
        change(net)
        found, ran = repaired(net, NBSMT(threads=2), "average")
    other = network()
    change(other)
    assert ran == 2
    assert all(map(torch.equal, found, repaired(other, NBSMT(threads=2), "average")[0]))


def test_other_images_threads_and_gains_are_other_passes():
    net, passes = network(), Passes()
    with keeping_passes(passes, 0):
        bare, _ = repaired(net, LBA(), "paired")
    with keeping_passes(passes, 1):
        assert repaired(net, LBA(), "paired")[1] == 4
        emulate_(net, LBA())
        correct_gain_(net, IMAGES)
        net.passes = 0
        recalibrate_(net, IMAGES)
        assert net.passes == 2  # the baseline has no gain
        assert not torch.equal(net.norm.running_var, bare[1])


def draws(net):
    torch.rand(1)


def draws_in_python(net):
    random.random()


def draws_in_numpy(net):
    np.random.rand()


def remembers(net):
    net.memory += 1


def warns(net):
    warnings.warn("again", RecoupWarning, stacklevel=2)


def counts(net):
    net.count = getattr(net, "count", 0) + 1


def counts_in_a_list(net):
    net.__dict__.setdefault("seen", [0])[0] += 1


class Counts:
    """A function with a memory."""

    def __init__(self):
        self.count = 0

    def __call__(self, _):
        self.count += 1


def counting():
    count = 0

    def counts(_):
        nonlocal count
        count += 1

    return counts


STATEFUL = [counts, counts_in_a_list, Counts(), counting()]


@pytest.mark.parametrize("does", [draws, draws_in_python, draws_in_numpy, remembers, warns, *STATEFUL])
def test_a_pass_that_does_more_than_measure_is_made_again(does):
    net = network()
    net.does = does
    with keeping_passes(Passes(), "images"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for method in ("average", "paired"):
            assert repaired(net, LBA(), method)[1] == {"average": 2, "paired": 4}[method]
    assert len(said) == (6 if does is warns else 0)


def test_without_a_keeper_every_pass_is_made():
    net = network()
    for _ in range(2):
        assert repaired(net, LBA(), "average")[1] == 2


def test_a_pass_that_fails_is_not_kept():
    net, passes, before = network(), Passes(), Statistics.of(network())
    net.does = lambda _: (_ for _ in ()).throw(KeyError("own"))
    with keeping_passes(passes, "images"):
        with pytest.raises(KeyError):
            repaired(net, LBA(), "average")
        assert not passes.known
        net.does = lambda _: None
        undo_(net)
        restore_(net)
        found, ran = repaired(net, LBA(), "average")
    assert ran == 2
    assert torch.equal(before.buffers["norm"]["running_mean"], net.norm.running_mean)
    assert all(map(torch.equal, found, repaired(network(), LBA(), "average")[0]))


def test_what_a_layer_acts_as():
    net = network()
    emulate_(net, NBSMT(threads=2))
    two = net.conv.acts_as()
    net.conv.bias_correction = torch.ones(8)
    assert net.conv.acts_as() != two
    with running(net, "baseline"):
        baseline = net.conv.acts_as()
    with running(net, "float"):
        assert net.conv.acts_as() not in (two, baseline)
    restore_(net)
    emulate_(net, NBSMT(threads=4))
    assert net.conv.acts_as() != two
    with running(net, "baseline"):
        assert net.conv.acts_as() == baseline


class Cycled(nn.Module):
    """Scales every batch otherwise, by a number of its own."""

    def __init__(self, net):
        super().__init__()
        self.net, self.steps = net, 0

    def forward(self, x):
        self.steps += 1
        return self.net(x * (1 + self.steps % 4))


def test_a_network_that_counts_its_batches_gets_no_stale_statistics():
    """Each pass moves the counter by 2 of a period of 4, so that two passes in a row see other batches."""
    found = []
    for passes in (Passes(), None):
        net, found_here = Cycled(network()).eval(), []
        for _ in range(2):
            with keeping_passes(passes, "images") if passes else nullcontext():
                emulate_(net, LBA())
                recalibrate_(net, IMAGES, "average")
                found_here.append(net.net.norm.running_var.clone())
                undo_(net)
                restore_(net)
        found.append(found_here)
    assert all(map(torch.equal, *found))
    assert not torch.equal(*found[0])


def hook(net):
    return net.conv.register_forward_hook(lambda _, __, y: y + 1)


def hook_before(net):
    return net.conv.register_forward_pre_hook(lambda _, args: (args[0] + 1,))


def hook_of_all(_):
    return register_module_forward_hook(lambda module, _, y: y + 1 if isinstance(module, nn.Conv2d) else None)


@pytest.mark.parametrize("put", [hook, hook_before, hook_of_all])
def test_a_network_with_hooks_shares_no_pass(put):
    net, passes = network(), Passes()
    with keeping_passes(passes, "images"):
        bare, _ = repaired(net, NBSMT(threads=2), "average")
        handle = put(net)
        try:
            hooked, ran = repaired(net, NBSMT(threads=2), "average")
            assert repaired(net, NBSMT(threads=2), "average")[1] == ran == 2
        finally:
            handle.remove()
        assert not torch.equal(hooked[0], bare[0])
        assert repaired(net, NBSMT(threads=2), "average")[1] == 0


OTHERS = [
    {"a": 1, "b": (2.0, [None, "c"])},
    np.arange(3),
    torch.arange(3),
    torch.arange(3).to(torch.float32),
    random.Random(0),
    np.random.default_rng(0),
    Counts(),
    lambda x: x + 1,
    lambda x: x + 2,
    functools.partial(torch.add, 1),
]


def test_plain_attributes_tell_networks_apart():
    net, seen = network(), set()
    for value in OTHERS:
        net.other = value
        assert attributes(net) == attributes(net)
        assert attributes(net) not in seen
        seen.add(attributes(net))
    net.other = OTHERS[4]
    net.other.random()
    assert attributes(net) not in seen
    net.other = net.conv  # registered: the network's own
    assert attributes(net) is not None


@pytest.mark.parametrize("value", [torch.Generator(), threading.Lock(), torch.ones(2).to_sparse(), open])
def test_what_cannot_be_told_is_not(value):
    net = network()
    net.other = value
    assert (attributes(net) is None) == (value is not open)  # a function of Python's own is known by its name


def test_functions_are_told_apart_by_what_they_say():
    """Not by who else holds their constants, or by how often they ran."""

    def made(factor):
        def act(x):
            return x * 2.5 * factor, "a text", (1.5, "and another")

        net = network()
        net.act = act
        return net

    net: Any = made(2)
    told = attributes(net)
    held = [net.act.__code__.co_consts, *net.act.__code__.co_consts]
    for _ in range(100):
        net.act(1.0)
    assert told is not None
    assert attributes(net) == told
    assert attributes(made(2)) == told != attributes(made(3))
    assert held
