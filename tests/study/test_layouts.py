"""Test images channels last: where the hardware asks for it and the network takes them, with the same numbers."""

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.data import load
from recoup.nbsmt.wing import CARD as NBSMT_CARD
from recoup.study.hardware import Hardware
from recoup.study.lab import Lab
from recoup.study.layouts import laid_out, takes_channels_last
from tests.networks import images, small_net
from tests.study.examples import small_recipe


class Viewing(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).view(x.shape[0], -1)


class Reading(nn.Module):
    """Runs in any layout and computes something else in another."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        n, c, h, w = x.shape
        return self.conv(x.as_strided((n, c, h, w), (c * h * w, h * w, w, 1))).mean((2, 3))


def test_a_network_that_reads_memory_keeps_its_layout():
    torch.manual_seed(0)
    assert not takes_channels_last(Reading().eval(), images(2))


def test_a_network_that_views_behind_a_convolution_keeps_its_layout():
    assert takes_channels_last(small_net(), images(2))
    assert not takes_channels_last(Viewing().eval(), images(2))
    assert not takes_channels_last(nn.Linear(3, 2), torch.zeros(2, 3))


@pytest.mark.parametrize(("config", "last"), [(rc.NBSMT(2), True), (rc.LBA.m7e4(), False), (rc.LightNorm(), False)])
def test_the_card_decides(config, last):
    batches = load("digits").batches(100)
    given = laid_out(batches, Hardware.plain(config))
    assert getattr(given, "channels_last", False) is last
    assert NBSMT_CARD.channels_last


def test_a_mix_is_fed_so_only_if_all_wings_are_faster():
    mixed = Hardware.found(rc.NBSMT(2), {"a": rc.NBSMT(2), "b": rc.LBA.m7e4()})
    batches = load("digits").batches(100)
    assert len(mixed.cards) == 2
    assert laid_out(batches, mixed) is batches


def test_a_worker_s_lab_lays_images_out_as_the_first_process_s_does(tmp_path, monkeypatch):
    """It is sent without what `check` found, and its float layers would give other last bits."""
    recipe = small_recipe(tmp_path)
    config, fed = recipe.configs[0], []
    monkeypatch.setattr("recoup.study.lab.laid_out", lambda *a: fed.append(laid_out(*a).channels_last) or laid_out(*a))
    for checked in (True, False):
        lab = Lab(recipe)
        if checked:
            lab.check()
        lab.known.setdefault(repr(config), Hardware.plain(config))
        lab.accuracy(config, "float statistics", 3)
        lab.accuracy(None, "float statistics", 3)
    assert fed == [True, True]  # the float network's are as they are read
    assert lab.identity()["channels_last"] is True


def test_what_is_no_batches_of_images_stays_as_it_is():
    windows = [(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64))]
    assert laid_out(windows, Hardware.plain(rc.NBSMT(2))) is windows
