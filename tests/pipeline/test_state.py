"""A state resumes bit for bit, whatever the model keeps beside its weights; and errors leave no trace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recoup.errors import RecoupError
from recoup.pipeline.native import Native
from recoup.pipeline.norms import OnlineNorm2d
from recoup.pipeline.rings import Rings
from tests.pipeline.networks import convolutional, images, make, multilayer, rates, same_state, vectors, weights


@pytest.mark.parametrize("stop", [0, 7, 10])
@pytest.mark.parametrize("name", ["sc", "lwpw+sc", "spectrain", "stash"])
def test_resumes_bit_for_bit(name, stop):
    samples = images(20)
    whole, broken = convolutional(), convolutional()
    first, second = (make(net, rates, 0.9, 1e-3, name, update_size=2) for net in (whole, broken))
    for x, y in samples[:stop]:
        second.step(x, y)
    state = copy.deepcopy(second.state_dict())
    third_net = convolutional()
    third = make(third_net, rates, 0.9, 1e-3, name, update_size=2)
    third.load_state_dict(state)
    expected = [first.step(x, y) for x, y in samples]
    assert [third.step(x, y) for x, y in samples[stop:]] == expected[stop:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), third_net.parameters(), strict=True))


def test_a_state_of_another_run_is_refused():
    one, other = make(multilayer(), 0.1, mitigation="sc"), make(multilayer(), 0.1, mitigation="lwpv")
    with pytest.raises(RecoupError, match="mitigation is"):
        other.load_state_dict(one.state_dict())


def with_statistics(seed=0):
    """Dropout, batch norm and online norm, and a frozen layer: what a state needs beside the weights."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3), OnlineNorm2d(4, 0.9, 0.9), nn.ReLU(), nn.Dropout(0.3)),
        nn.Sequential(nn.Flatten(), nn.Linear(36, 3)),
    )
    net.get_submodule("0.0").requires_grad_(False)
    return net


def everything(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("stop", [5, 6])
def test_dropout_statistics_and_frozen_layers_resume_bit_for_bit(stop):
    samples = images(12, shape=(2, 1, 7, 7))
    whole, broken, fresh = with_statistics(), with_statistics(), with_statistics(seed=7)
    torch.manual_seed(11)
    expected = [make(whole, rates, 0.9, 1e-3, "lwpv+sc", update_size=2)]
    losses = [expected[0].step(x, y) for x, y in samples]
    torch.manual_seed(11)
    first = make(broken, rates, 0.9, 1e-3, "lwpv+sc", update_size=2)
    assert [first.step(x, y) for x, y in samples[:stop]] == losses[:stop]
    state = copy.deepcopy(first.state_dict())
    torch.manual_seed(5)
    second = make(fresh, rates, 0.9, 1e-3, "lwpv+sc", update_size=2)
    second.load_state_dict(state)
    assert [second.step(x, y) for x, y in samples[stop:]] == losses[stop:]
    found, wanted = everything(fresh), everything(whole)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_failed_step_leaves_statistics_as_they_were():
    net, (x, y) = with_statistics(), images(1, shape=(2, 1, 7, 7))[0]
    simulator = make(net, 0.01)
    simulator.step(x, y)
    before = everything(net)
    with pytest.raises(RecoupError, match="the loss of step 1 is nan"):
        simulator.step(x * torch.nan, y)
    after = everything(net)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("configuration"), "no configuration"),
        (lambda s: s.pop("optimizer"), r"incomplete; it differs in \['optimizer'\]"),
        (lambda s: s["optimizer"].pop("velocity"), r"differs in \['velocity'\]"),
        (lambda s: s["ring"].pop(), "must be a list of 3; it is a list of 2"),
        (lambda s: s["ring"].__setitem__(2, s["ring"][2][:, :-1]), r"\['ring'\]\[2\] is torch.float32 \[1, "),
        (lambda s: s["buffers"].pop("0.1.running_mean"), r"differs in \['0.1.running_mean'\]"),
        (lambda s: s.update(gradient=s["gradient"].double()), r"\['gradient'\] is torch.float64"),
        (lambda s: s.update(steps="3"), r"\['steps'\] is a str; it must be a int"),
        (lambda s: s.pop("random"), "the random state"),
        (lambda s: s["configuration"].update(dtype="torch.float64"), "another run: dtype is 'torch.float64'"),
        (lambda s: s["configuration"].update(update_size=9), "another run: update_size is 9"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, told):
    samples = images(6, shape=(2, 1, 7, 7))
    one, other = (make(with_statistics(seed), rates, mitigation="lwpw", update_size=2) for seed in (0, 1))
    for simulator, count in ((one, 5), (other, 3)):
        for x, y in samples[:count]:
            simulator.step(x, y)
    state, before = copy.deepcopy(one.state_dict()), copy.deepcopy(other.state_dict())
    change(state)
    with pytest.raises(RecoupError, match=told):
        other.load_state_dict(state)
    assert same_state(other.state_dict(), before)
    assert same_state(other.state_dict()["ring"], before["ring"])


def test_an_update_that_is_interrupted_does_not_count(monkeypatch):
    samples = vectors(8)
    one, other = multilayer(), multilayer()
    broken, plain = (make(net, rates, mitigation="lwpv+sc") for net in (one, other))
    for k, (x, y) in enumerate(samples):
        if k in (0, 4):
            newest, state, update = weights(one), copy.deepcopy(broken.state_dict()), Native.__call__

            def interrupted(self, version, gradients, update=update):
                update(self, version, gradients)
                raise KeyboardInterrupt  # all of it is done, and nobody was told

            monkeypatch.setattr(Native, "__call__", interrupted)
            with pytest.raises(KeyboardInterrupt):
                broken.step(x, y)
            monkeypatch.setattr(Native, "__call__", update)
            assert all(torch.equal(p, newest[n]) for n, p in one.named_parameters())
            assert same_state(broken.state_dict()["optimizer"], state["optimizer"])
        assert broken.step(x, y) == plain.step(x, y)
    assert same_state(broken.state_dict(), plain.state_dict())


@pytest.mark.parametrize("place", ["show", "show_returning", "rate", "loss", "backward"])
def test_a_step_that_is_interrupted_can_be_done_again(place, monkeypatch):
    samples, interrupt = vectors(10), [False]
    one, other = multilayer(), multilayer()

    def loss(out, y):
        if interrupt[0] and place == "loss":
            raise KeyboardInterrupt
        if interrupt[0] and place == "backward":
            out.register_hook(stop)
        return F.cross_entropy(out, y)

    def stop(*_):
        raise KeyboardInterrupt

    def rate(k):
        if interrupt[0] and place == "rate":
            raise KeyboardInterrupt
        return rates(k)

    broken, plain = (make(net, rate, 0.9, 1e-3, "lwpv+sc", loss=loss, update_size=2) for net in (one, other))
    for k, (x, y) in enumerate(samples):
        if k in (3, 6):
            newest, original, interrupt[0] = weights(one), getattr(Rings, place, None), True
            if original is not None:
                monkeypatch.setattr(Rings, place, stop)
            with pytest.raises(KeyboardInterrupt):
                broken.step(x, y)
            if original is not None:
                monkeypatch.setattr(Rings, place, original)
            interrupt[0] = False
            assert all(torch.equal(p, newest[n]) for n, p in one.named_parameters())
        assert broken.step(x, y) == plain.step(x, y)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
