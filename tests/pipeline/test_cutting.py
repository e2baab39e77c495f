"""Where a model can be cut: between stages, of an nn.Sequential between children; every part has something to train."""

import pytest
import torch
from torch import nn

from recoup import models
from recoup.pipeline import automatic, delays
from recoup.pipeline.cutting import Children, Links
from recoup.pipeline.runtime import Plan
from tests.pipeline.ranks import STAGES, network


def sequence(*trained):
    return nn.Sequential(*(nn.Linear(2, 2) if flag else nn.ReLU() for flag in trained))


@pytest.mark.parametrize(
    ("model", "stages", "expected"),
    [
        (network(), STAGES, [(0, 0), (1, 1), (2, 3), (3, 4), (4, 5)]),  # child 1 has two stages
        (sequence(1, 0, 1), [["0"], ["2"]], [(0, 0), (2, 1), (3, 2)]),  # what no stage names stays with the one before
        (sequence(1, 0, 1), [["0"], ["1"], ["2"]], [(0, 0), (2, 2), (3, 3)]),  # no part is a ReLU alone
        (sequence(0, 1, 1), [["0"], ["1"], ["2"]], [(0, 0), (2, 2), (3, 3)]),
        (sequence(1, 1, 0), [["0"], ["1"], ["2"]], [(0, 0), (1, 1), (3, 3)]),
        (sequence(1, 1, 1, 1), [["0"], ["1", "2"], ["3"]], [(0, 0), (1, 1), (3, 2), (4, 3)]),
        (sequence(1, 1, 1), [["0", "2"], ["1"]], [(0, 0), (3, 2)]),  # one stage reaches over the other
        (sequence(1, 1), [["0"], [], ["1"]], [(0, 0), (1, 2), (2, 3)]),
    ],
)
def test_children(model, stages, expected):
    assert Children(model, stages).joints() == expected


def test_stages():
    model = models.resnet20(norm="group", width=8)
    stages = automatic(model)
    found = Links(model, stages).joints()
    trained = [s for s, names in enumerate(stages) if any(list(model.get_submodule(n).parameters()) for n in names)]
    assert found == [(s, s) for s in (*trained, len(stages))]
    for (a, _), (b, _), (c, _) in zip(found, found[1:], found[2:], strict=False):
        cut = [part for part in (a, b - a, c - b, len(stages) - c) if part]
        Plan(model, stages, delays(len(stages)), 0.1, cut=cut).check(len(cut))


def test_what_is_frozen_is_nothing_to_train():
    model = sequence(1, 1, 1)
    model[1].requires_grad_(False)
    assert Children(model, [["0"], ["1"], ["2"]]).joints() == [(0, 0), (2, 2), (3, 3)]
    assert Links(nn.Sequential(model), [["0.0"], ["0.1"], ["0.2"]]).joints() == [(0, 0), (2, 2), (3, 3)]
    assert torch.equal(model(torch.zeros(1, 2)), model(torch.zeros(1, 2)))
