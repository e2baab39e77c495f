"""Weights in place, copied ones and machine code: the same bits, whatever uses a weight, and nothing silently stale."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recoup.errors import RecoupError
from recoup.pipeline import Mitigation, Simulator, delays, layout, native
from recoup.pipeline.mitigation import NAMES
from recoup.pipeline.native import CHUNK
from recoup.pipeline.plan import Plan
from recoup.pipeline.rings import Rings
from recoup.pipeline.runtime import run_local
from tests.pipeline import tick
from tests.pipeline.networks import by_child, convolutional, images, make, multilayer, rates, same_state, vectors

HOWS = {
    **NAMES,
    "half sc": Mitigation(compensation=0.5),
    "lwpv+stash": Mitigation.parse("lwpv+stash"),
    "coasting": Mitigation.parse("coasting+stash"),
    "past": Mitigation.parse("past"),
    "all": Mitigation(compensation=1.0, prediction="velocity", horizon=0.5, shrink=0.97, annealing=9),
}


@pytest.fixture
def in_place(monkeypatch):
    """All weights lie in place."""
    monkeypatch.setattr(layout, "LARGE", 1)


def slow(monkeypatch):
    """Updates as `update.Update` defines them."""
    monkeypatch.setattr(Rings, "_compiled", lambda _: None)


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("how", NAMES.values(), ids=NAMES)
def test_weights_in_place_equal_the_tick_pipeline_bit_for_bit(how):
    net, samples = convolutional(), images(25)
    losses, expected = tick.train(
        [list(stage) for stage in copy.deepcopy(net)], samples, rates, 0.9, 1e-2, how, F.cross_entropy
    )
    simulator = make(net, rates, 0.9, 1e-2, how)
    assert [simulator.step(x, y) for x, y in samples] == losses
    for stage, layers in zip(net, expected, strict=True):
        for layer, found in zip(stage, layers, strict=True):
            for name, parameter in layer.named_parameters():
                assert torch.equal(parameter, found[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("streamed", [False, True])
def test_machine_code_equals_the_definition_bit_for_bit(how, size, dtype, streamed, monkeypatch):
    monkeypatch.setattr(native, "STREAMED", 1 if streamed else 1 << 60)
    net, samples = convolutional(dtype), images(14, dtype)
    plain = copy.deepcopy(net)
    options = {"update_size": size, "clip": 0.5 if size == 3 else None}
    fast = make(net, rates, 0.9, 1e-2, how, **options)
    slow(monkeypatch)
    defined = make(plain, rates, 0.9, 1e-2, how, **options)
    assert fast.rings._native is not None
    assert defined.rings._native is None
    for x, y in samples:
        assert fast.step(x, y) == defined.step(x, y)
        assert same_state(fast.state_dict(), defined.state_dict())
    other = make(convolutional(dtype), rates, 0.9, 1e-2, how, **options)
    other.load_state_dict(copy.deepcopy(fast.state_dict()))
    assert same_state(other.state_dict(), defined.state_dict())
    assert other.step(*samples[0]) == defined.step(*samples[0])


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_of_several_chunks_and_threads(streamed, monkeypatch):
    monkeypatch.setattr(native, "STREAMED", 1 if streamed else 1 << 60)

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(300, 2 * CHUNK // 300 + 7), nn.Tanh(), nn.Linear(2 * CHUNK // 300 + 7, 3))

    generator = torch.Generator().manual_seed(1)
    samples = [(torch.randn(2, 300, generator=generator), torch.tensor([0, 2])) for _ in range(6)]
    threads = torch.get_num_threads()
    nets = [build() for _ in range(3)]
    losses = []
    for which, net in enumerate(nets):
        if which == 2:
            slow(monkeypatch)
        simulator = Simulator(net, [["0", "1"], ["2"]], [3, 0], 0.05, 0.9, 1e-3, "lwpv+sc")
        assert bool(simulator.rings._in_place)
        try:
            torch.set_num_threads(1)
            simulator.step(*samples[0])
            torch.set_num_threads(2 if which == 1 else 1)
            advance = simulator.rings.advance
            losses.append([simulator.step(x, y) for x, y in samples[1:]])
            assert advance is not None
        finally:
            torch.set_num_threads(threads)
    assert losses[0] == losses[2]


class Reached(nn.Module):
    """A large weight that another module's forward pass uses too, tied to it or through a function."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(4)
        self.one, self.two = (nn.Linear(7, 7, bias=False) for _ in range(2))
        self.last, self.how = nn.Linear(7, 3), how
        if how == "tied":
            self.two.weight = self.one.weight

    def forward(self, x):
        x = torch.tanh(self.one(x))
        x = F.linear(x, self.one.weight) if self.how == "functional" else self.two(x)
        if self.how == "sometimes" and x.sum() > 0.3:
            x = F.linear(x, self.one.weight)
        return self.last(x)


@pytest.mark.parametrize("how", ["tied", "functional"])
def test_a_large_weight_used_elsewhere_is_as_a_small_one(how, monkeypatch):
    def trained():
        net = Reached(how).double()
        simulator = Simulator(net, [["one", "two"], ["last"]], [3, 0], 0.1, 0.9, 1e-2, "lwpv+sc")
        return [simulator.step(x, y) for x, y in vectors(12)], net.state_dict(), simulator

    losses, state, _ = trained()
    monkeypatch.setattr(layout, "LARGE", 1)
    found, other, simulator = trained()
    names = {simulator._layout.places[i].name for i in simulator.rings._in_place}
    assert "one.weight" not in names
    assert "last.weight" in names
    assert found == losses
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.usefixtures("in_place")
def test_a_use_that_only_some_samples_have_is_refused_not_stale():
    net = Reached("sometimes").double()
    simulator = Simulator(net, [["one", "two"], ["last"]], [3, 0], 1e-4)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(200, 1, 7, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        sums = [float(net.two(torch.tanh(net.one(x))).sum()) for x in drawn]
    common, x = [x for x, s in zip(drawn, sums, strict=True) if s < 0][:5], drawn[sums.index(max(sums))]
    assert max(sums) > 1
    for usual in common:
        simulator.step(usual, torch.tensor([1]))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        simulator.step(x, torch.tensor([1]))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.usefixtures("in_place")
def test_an_activation_that_was_written_to_is_refused():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(7, 7), nn.Linear(7, 3)

        def forward(self, x):
            y = torch.tanh(self.one(x))
            z = self.two(y)
            y.mul_(2)
            return z

    simulator = Simulator(Writes(), [["one"], ["two"]], [3, 1], 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        simulator.step(torch.ones(1, 7), torch.tensor([1]))


@pytest.mark.usefixtures("in_place")
def test_a_loss_may_reach_weights_in_place(monkeypatch):
    def trained():
        net = multilayer()
        penalty = net.get_submodule("2.0").weight
        simulator = make(
            net, 0.1, mitigation="lwpv", loss=lambda out, y: F.cross_entropy(out, y) + penalty.pow(2).sum()
        )
        return [simulator.step(x, y) for x, y in vectors(12)], net.state_dict()

    losses, state = trained()
    monkeypatch.setattr(layout, "LARGE", 1 << 14)
    found, other = trained()
    assert found == losses
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("mitigation", ["stash", "lwpw+sc", "spectrain", "past"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_whose_weights_lie_in_place(mitigation, ranks):
    one, other, samples = multilayer(), multilayer(), vectors(20)
    how = {"stages": by_child(one), "delays": delays(5), "lr": rates, "mitigation": Mitigation.parse(mitigation)}
    losses = run_local(Plan(one, **how), samples, ranks).losses
    simulator = Simulator(other, loss=F.cross_entropy, **how)
    assert losses == [simulator.step(x, y) for x, y in samples]
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_a_rate_that_was_not_foreseen_predicts_again():
    samples = vectors(12)
    for name in ("lwpv+sc", "spectrain", "past"):
        one, other = multilayer(), multilayer()
        schedule = [rates(k) for k in range(12)]  # ends with the run: the rate after the last step is not known
        known, told = make(one, lambda k: schedule[k], mitigation=name), make(other, 1.0, mitigation=name)  # noqa: B023
        for k, (x, y) in enumerate(samples):
            told.lr = schedule[k]
            assert known.step(x, y) == told.step(x, y)


def test_gradients_of_all_kinds():
    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.table = nn.Embedding(9, 4, sparse=True)
            self.transposed, self.unused = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(3))
            self.last = nn.Linear(5, 3)

        def forward(self, x):
            return self.last(self.table(x).sum(1) @ self.transposed.contiguous())

    one = Kinds().double()
    plain = copy.deepcopy(one)
    simulator = Simulator(one, [[""]], [0], 0.1, 0.9, 1e-2)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    for k in range(5):
        x, y = torch.tensor([[k, 1, 2]]), torch.tensor([k % 3])
        optimizer.zero_grad()
        value = F.cross_entropy(plain(x), y)
        value.backward()
        for p in plain.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
        optimizer.step()
        assert simulator.step(x, y) == value.item()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), plain.parameters(), strict=True))


def test_bad_clips_and_rules():
    for clip in (0, -1.0, float("nan"), "1", True):
        with pytest.raises(RecoupError, match="clip must be a number above 0"):
            make(multilayer(), 0.1, clip=clip)
    with pytest.raises(RecoupError, match="optimizer must be a rule such as"):
        make(multilayer(), 0.1, optimizer=torch.optim.SGD)
