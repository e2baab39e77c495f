"""What a wing's card and its repairs may be, and what they do for a layer that knows little."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.recalibrate import PAIRED


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": {}}, "layers is empty"),
        ({"layers": {nn.Linear: nn.Linear}}, "must be a class that derives from"),
        ({"config": 3}, "config must be a class"),
        ({"default": ("paired",)}, "'paired' is none of its repairs"),
        ({"repairs": (print,)}, "repairs must be a tuple of Repair"),
        ({"repairs": (PAIRED, PAIRED)}, "two of its repairs have one name"),
    ],
)
def test_cards_that_are_refused(trunc, change, said):
    good = {"config": trunc, "layers": rc.wings.cards()[trunc].layers}
    with pytest.raises(rc.RecoupError, match=said):
        rc.wings.Card(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "said"),
    [({"name": ""}, "name must be"), ({"stage": "nope"}, "stage must be one of"), ({"apply": 3}, "apply must be")],
)
def test_repairs_that_are_refused(change, said):
    with pytest.raises(rc.RecoupError, match=said):
        replace(PAIRED, **change)


def test_names_that_are_taken_are_refused(trunc):
    layers = rc.wings.cards()[trunc].layers
    with pytest.raises(rc.RecoupError, match="'nbsmt-2t' is taken by NBSMT"):
        rc.wings.register(rc.wings.Card(config=trunc, layers=layers, presets={"nbsmt-2t": trunc()}))
    with pytest.raises(rc.RecoupError, match=r"must be a recoup\.wings\.Card"):
        rc.wings.register(trunc)


def test_its_statistics_are_paired_with_the_float_network(trunc):
    """A layer that knows `emulate` and `float` alone is float where the other half of a pair is measured."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.rand(64, 4)
    with torch.no_grad():
        off = model[0](x).double().mean(0)
        rc.emulate_(model, trunc(bits=1))
        on = model[0](x).double().mean(0)
        rc.recalibrate_(model, [x])
    assert (on - off).abs().max() > 0.01
    torch.testing.assert_close(model[1].running_mean.double(), on - off, atol=1e-6, rtol=0)


def test_a_repair_of_its_own_by_anothers_name_is_done_as_well(trunc):
    done = []
    own = rc.wings.Repair("paired", "gain", "Its own.", "its own", lambda model, _: done.append(model))
    card = next(card for card in rc.wings.cards().values() if card.config is trunc)
    rc.wings.register(replace(card, repairs=(own,), plan=("paired",), plan_without_norms=("paired",)))
    for layers in ({"0": trunc(), "3": rc.LBA()}, {"0": rc.LBA(), "3": trunc()}):
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
        rc.repair_(rc.emulate_(model, None, layers), [torch.rand(64, 4)])
        assert done.pop() is model
        assert "statistics (recalibrate_" in str(rc.describe(model))
