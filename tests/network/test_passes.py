"""What passes over calibration images measured is given again where they would measure the same, and only there."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from recoup.calibrate import calibrate_
from recoup.emulate import emulate_, restore_
from recoup.errors import RecoupWarning
from recoup.lba import LBA
from recoup.lba.repair import correct_gain_
from recoup.nbsmt import NBSMT
from recoup.network.emulated import running
from recoup.network.norms import Statistics
from recoup.network.passes import Passes, keeping_passes
from recoup.recalibrate import recalibrate_
from recoup.repair import undo_

IMAGES = [torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


class Net(nn.Module):
    """Three convolutions, of which the first stays in float under NB-SMT; it counts its passes and may misbehave."""

    def __init__(self, does=lambda _: None):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.last, self.does = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), does
        self.register_buffer("memory", torch.zeros(1))
        self.passes = 0

    def forward(self, x):
        self.passes += 1
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


@pytest.mark.parametrize("does", [draws, draws_in_python, draws_in_numpy, remembers, warns])
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
