"""A survey runs a network as it would run without one."""

import weakref

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.network.sites import survey


def test_a_survey_holds_no_layers_input():
    """Beside a network that nearly fills the memory, all of them at once would not fit."""
    seen, most = [], []

    class Layer(nn.Linear):
        def forward(self, x):
            seen.append(weakref.ref(x))
            most.append(sum(one() is not None for one in seen))
            return super().forward(x)

    net = nn.Sequential(*(Layer(8, 8) for _ in range(6)))
    with torch.no_grad():
        net(torch.zeros(1, 8))
    plain = max(most)
    seen.clear(), most.clear()
    survey(net, (8,), "test")
    assert max(most) == plain
    assert not any(one() is not None for one in seen)


def test_where_a_network_fails_its_layers_input_is_named_however_it_is_passed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(input=x)

    with pytest.raises(rc.RecoupError, match=r"at layer 'head' .* whose input is \[1, 3\]"):
        survey(Net(), (3,), "test")
