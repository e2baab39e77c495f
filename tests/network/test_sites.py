"""A survey runs a network as it would run without one."""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.network.sites import survey


def test_a_survey_holds_no_layers_input():
    """Beside a network that nearly fills the memory, all of them at once would not fit."""
    seen, most = [], []

    class Layer(nn.Linear):
        def forward(self, input):  # noqa: A002 -- as torch names it
            seen.append(weakref.ref(input))
            most.append(sum(one() is not None for one in seen))
            return super().forward(input)

    net = nn.Sequential(*(Layer(8, 8) for _ in range(6)))
    with torch.no_grad():
        net(torch.zeros(1, 8))
    plain = max(most)
    seen.clear()
    most.clear()
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


def test_two_threads_survey_one_network_and_each_hears_its_own_pass():
    meet = threading.Barrier(2)

    class Part(nn.Module):
        def __init__(self, waits):
            super().__init__()
            self.layer, self.waits = nn.Linear(8, 8), waits

        def forward(self, x):
            x = self.layer(x)
            if threading.current_thread().name.endswith(self.waits):  # each in another part
                meet.wait(30)
                x = x @ x.mT @ x
                meet.wait(30)
                return x
            return x @ x.mT @ x

    model, x = nn.Sequential(Part("first"), nn.Sequential(Part("second"))), torch.rand(1, 4, 8)
    expected = survey(model, x, "test")
    found = {}

    def run():
        found[threading.current_thread().name] = survey(model, x, "test")

    threads = [threading.Thread(target=run, name=name) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {"first": expected, "second": expected}
    assert [row.calls for row in expected.uncounted] == [1, 1]


def test_layers_that_a_network_runs_on_a_thread_of_its_own_are_surveyed():
    class Net(nn.Sequential):
        def forward(self, input):  # noqa: A002 -- as torch names it
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(super().forward, input).result()

    found = survey(Net(nn.Linear(8, 8)), (8,), "test")
    assert [site.name for site in found.sites] == ["0"]
    assert found.uncounted == ()
