"""Layers that are converted and never run are said, by name, and are not taken for layers that give zeros."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recoup as rc
from recoup import lba, nbsmt
from recoup.network.reached import watching


class Tied(nn.Module):
    """A head that reads the weight of a layer and passes the layer by, and a branch that is never taken."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.inner, self.head, self.spare = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(torch.relu(self.body(x)).abs())
        return F.linear(y.abs(), self.head.weight, self.head.bias)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.only.weight)


BATCH = (torch.rand(4, 6), torch.tensor([0, 1, 2, 3]))


def told_of(kind: type[nn.Module]) -> nn.Module:
    with pytest.warns(
        rc.RecoupWarning, match=rf"products in their own forward.*: the model itself \({kind.__name__}\)"
    ):
        return rc.emulate_(kind().eval(), rc.LBA.biased(4, 4))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return told_of(Tied)


NEVER = r"2 of 4 emulated layers never ran: head, spare; "


def test_evaluate_says_what_never_ran(model):
    with pytest.warns(rc.RecoupWarning, match=f"evaluate: {NEVER}.*functional"):
        rc.evaluate(model, [BATCH])


def test_profiles_say_what_never_ran(model):
    with pytest.warns(rc.RecoupWarning, match=f"lba.profile: {NEVER}"):
        assert [row.name for row in lba.profile(model, [BATCH], outputs=8)] == ["body", "inner"]
    rc.restore_(model)
    rc.calibrate_(model, [BATCH], {"inner": True})
    model.spare.activation_scale = 0.1
    rc.emulate_(model, None, {"inner": rc.NBSMT(), "spare": rc.NBSMT()})  # nothing is meant for the model itself
    with pytest.warns(rc.RecoupWarning, match="profile: 1 of 2 emulated layers never ran: spare; "):
        assert [row.name for row in nbsmt.profile(model, [BATCH])] == ["inner"]


def test_a_measurement_that_saw_none_of_its_layers_is_refused():
    model = told_of(Functional)
    with pytest.raises(rc.RecoupError, match=r"lba\.profile: none of the model's 1 emulated layers ran"):
        lba.profile(model, [BATCH])
    with pytest.warns(rc.RecoupWarning, match="evaluate: 1 of 1 emulated layers never ran: only"):
        rc.evaluate(model, [(BATCH[0], torch.zeros(4, dtype=torch.long))])


def test_a_network_all_of_which_runs_is_not_warned_of():
    model = rc.emulate_(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), rc.LBA.biased(4, 4))
    rc.evaluate(model, [BATCH])
    assert len(lba.profile(model, [BATCH], outputs=8)) == 2


def test_no_hook_stays_behind_and_an_error_is_not_covered():
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="mine"), watching({"layer": layer}, "test"):
        raise ValueError("mine")
    assert not layer._forward_pre_hooks
    with pytest.warns(rc.RecoupWarning, match=re.escape("test: 1 of 1")), watching({"a": layer}, "test", refuse=False):
        pass
