"""The torch optimizer for delayed loops: against the simulator, under schedulers, saved and loaded, misused."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from recoup.errors import RecoupError
from recoup.pipeline import DelayedSGD, Mitigation, Simulator
from tests.pipeline.networks import by_child, multilayer, vectors, weights

NAMES = ["none", "sc", "lwpv", "lwpw", "lwpv+sc", "lwpw+sc"]


def loop(net, optimizer, samples, delays, scheduler=None):
    """A user's loop: gradients at the weights that each child had ``delays`` updates ago, forward and backward."""
    kept, losses = [], []
    for k, (x, y) in enumerate(samples):
        with optimizer.ahead():
            kept.append(weights(net))
        names = {name: int(name.partition(".")[0]) for name in kept[0]}
        stale = {n: kept[max(0, k - delays[s])][n].requires_grad_() for n, s in names.items()}
        value = F.cross_entropy(functional_call(net, stale, (x,)), y)
        found = torch.autograd.grad(value, list(stale.values()))
        for parameter, gradient in zip(net.parameters(), found, strict=True):
            parameter.grad = gradient
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(value.item())
    return losses


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("delay", [0, 1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_simulator_bit_for_bit(name, delay, dtype):
    net = multilayer(stages=1, dtype=dtype)  # one layer: its own backward pass uses no weights, so none is stale
    other, samples = copy.deepcopy(net), vectors(25, dtype=dtype)
    optimizer = DelayedSGD(net.parameters(), 0.05, delay, 0.9, 1e-2, name)
    simulator = Simulator(other, [[""]], [delay], 0.05, 0.9, 1e-2, name)
    assert loop(net, optimizer, samples, [delay]) == [simulator.step(x, y) for x, y in samples]
    assert same(net, other)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_groups_have_their_own_delays(alpha):
    net, own = multilayer(), [8, 6, 4, 2, 0]
    other, samples = copy.deepcopy(net), vectors(30)
    groups = [{"params": stage.parameters(), "delay": D} for stage, D in zip(net, own, strict=True)]
    optimizer = DelayedSGD(groups, 0.05, 99, mitigation=Mitigation(compensation=alpha))
    simulator = Simulator(other, by_child(other), own, 0.05, 0.9, 0.0, Mitigation(compensation=alpha, stash=True))
    assert loop(net, optimizer, samples, own) == [simulator.step(x, y) for x, y in samples]
    assert same(net, other)


@pytest.mark.parametrize("name", NAMES)
def test_groups_have_their_own_numbers(name):
    first, second = multilayer(stages=1, seed=1), multilayer(stages=1, seed=2)
    options = [{"delay": 2, "lr": 0.1, "momentum": 0.5, "weight_decay": 0.0}, {"lr": 0.02, "weight_decay": 0.1}]
    groups = [{"params": net.parameters(), **o} for net, o in zip((first, second), options, strict=True)]
    optimizer, defaults = DelayedSGD(groups, 1.0, 3, 0.9, 0.0, name), {"delay": 3, "momentum": 0.9}
    both, alone = nn.ModuleList([first, second]), copy.deepcopy(nn.ModuleList([first, second]))
    singles = [
        DelayedSGD(n.parameters(), **{**defaults, **o}, mitigation=name) for n, o in zip(alone, options, strict=True)
    ]
    for x, y in vectors(12):
        with optimizer.ahead():
            sum(F.cross_entropy(net(x), y) for net in both).backward()
        optimizer.step()
        optimizer.zero_grad()
        for net, single in zip(alone, singles, strict=True):
            with single.ahead():
                F.cross_entropy(net(x), y).backward()
            single.step()
            single.zero_grad()
    assert same(both, alone)


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 4, 0.5),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 15),
}


@pytest.mark.parametrize("name", ["sc", "lwpv", "lwpw+sc"])
@pytest.mark.parametrize("kind", list(SCHEDULERS))
def test_torchs_schedulers(kind, name):
    net, samples = multilayer(stages=1), vectors(20)
    other = copy.deepcopy(net)
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    reference, rates = SCHEDULERS[kind](plain), []
    for _ in range(21):
        rates.append(plain.param_groups[0]["lr"])
        plain.step()
        reference.step()
    optimizer = DelayedSGD(net.parameters(), 0.1, 3, mitigation=name)
    losses = loop(net, optimizer, samples, [3], SCHEDULERS[kind](optimizer))
    simulator = Simulator(other, [[""]], [3], lambda k: rates[k], 0.9, 0.0, name)
    assert losses == [simulator.step(x, y) for x, y in samples]
    assert same(net, other)


def test_a_scheduler_of_the_momentum_is_heard():
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = DelayedSGD([parameter], 0.1, 2, 0.9, mitigation="sc")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=12, cycle_momentum=True)
    w, v, momenta = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), set()
    for k in range(11):
        lr, m = (optimizer.param_groups[0][name] for name in ("lr", "momentum"))
        momenta.add(m)
        g = torch.full((3,), math.cos(k), dtype=torch.float64)
        parameter.grad = g.clone()
        optimizer.step()
        schedule.step()
        v = m * v + g
        w = w - lr * (m**2 * v + (1 + m) * g)
        torch.testing.assert_close(parameter.detach(), w, rtol=0, atol=1e-13)  # 1 + m is (1 - m^2) / (1 - m) there
    assert len(momenta) > 5


def test_no_delay_is_torchs_sgd():
    one, other = multilayer(), multilayer()
    mine = DelayedSGD(one.parameters(), 0.1, 0, 0.9, 1e-2, "lwpv+sc")
    theirs = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    for x, y in vectors(12):
        for net, optimizer in ((one, mine), (other, theirs)):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    assert same(one, other)


def test_within_ahead_the_parameters_are_predicted_and_after_it_the_same_bits_as_before():
    net = multilayer()
    optimizer = DelayedSGD(net.parameters(), 0.1, 4, mitigation="lwpv")
    x, y = vectors(1)[0]
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    newest = weights(net)
    with optimizer.ahead():
        for name, p in net.named_parameters():
            v = optimizer.state[p]["velocity"].view(p.shape)
            torch.testing.assert_close(p.detach(), newest[name] - 0.1 * 4 * v, rtol=0, atol=1e-14)
    assert all(torch.equal(p, newest[name]) for name, p in net.named_parameters())
    with pytest.raises(RuntimeError), optimizer.ahead():
        net(x[:, :2])
    assert all(torch.equal(p, newest[name]) for name, p in net.named_parameters())


def test_a_graph_made_ahead_goes_back_through_the_newest_weights():
    net = multilayer(stages=2)
    optimizer = DelayedSGD(net.parameters(), 0.1, 4, mitigation="lwpw")
    x, y = vectors(1)[0]
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    hidden = net[0](x).detach().requires_grad_()
    newest = net.get_parameter("1.0.weight")[:1].detach().clone()
    with optimizer.ahead():
        predicted = net.get_parameter("1.0.weight")[:1].detach().clone()
        (inside,) = torch.autograd.grad(net[1](hidden)[0, 0], hidden)
        output = net[1](hidden)[0, 0]
    (outside,) = torch.autograd.grad(output, hidden)
    assert torch.equal(inside, predicted)
    assert torch.equal(outside, newest)
    assert (newest - predicted).abs().max() > 1e-3


@pytest.mark.parametrize("stop", [0, 1, 9])
@pytest.mark.parametrize("name", NAMES)
def test_goes_on_from_its_state_bit_for_bit(name, stop):
    samples = vectors(20)
    net = multilayer(stages=2)
    optimizer = DelayedSGD(net.parameters(), 0.1, 3, 0.9, 1e-2, name)
    train = lambda net, optimizer, part: [one(net, optimizer, x, y) for x, y in part]  # noqa: E731
    train(net, optimizer, samples[:stop])
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(net, optimizer, samples[stop:])
    again = multilayer(stages=2, seed=9)
    resumed = DelayedSGD(again.parameters(), 1.0, 0, 0.5, 0.0, name)
    train(again, resumed, samples[:5])  # what it did before must not matter
    file.seek(0)
    state = torch.load(file)
    again.load_state_dict(state["net"])
    resumed.load_state_dict(state["optimizer"])
    assert train(again, resumed, samples[stop:]) == expected
    assert same(net, again)


def one(net, optimizer, x, y):
    optimizer.zero_grad()
    with optimizer.ahead():
        value = F.cross_entropy(net(x), y)
    value.backward()
    optimizer.step()
    return value.item()


def test_a_loaded_state_is_a_copy():
    net = multilayer(stages=1)
    optimizer = DelayedSGD(net.parameters(), 0.1, 3)
    x, y = vectors(1)[0]
    one(net, optimizer, x, y)
    state = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(state)
    optimizer.load_state_dict(state)
    one(net, optimizer, x, y)
    assert all(torch.equal(state["state"][i]["velocity"], kept["state"][i]["velocity"]) for i in (0, 1))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_with_its_network(copied):
    net = multilayer(stages=2)
    optimizer = DelayedSGD(net.parameters(), 0.1, 3, mitigation="lwpw+sc")
    samples = vectors(8)
    for x, y in samples[:4]:
        one(net, optimizer, x, y)
    twin, its = copied((net, optimizer))
    assert [one(net, optimizer, x, y) for x, y in samples[4:]] == [one(twin, its, x, y) for x, y in samples[4:]]
    assert same(net, twin)


def test_the_state_of_another_mitigation_is_refused():
    net = multilayer(stages=1)
    compensated, predicted = (DelayedSGD(net.parameters(), 0.1, 2, mitigation=m) for m in ("sc", "lwpw"))
    x, y = vectors(1)[0]
    one(net, compensated, x, y)
    with pytest.raises(RecoupError, match=r"mitigation Mitigation\(compensation=1\.0\), here Mitigation\(prediction="):
        predicted.load_state_dict(compensated.state_dict())
    assert not predicted.state
    with pytest.raises(RecoupError, match="mitigation None, here"):
        predicted.load_state_dict(torch.optim.SGD(net.parameters(), 0.1).state_dict())


def test_steps_and_predictions_within_ahead_are_refused():
    net = multilayer(stages=1)
    optimizer = DelayedSGD(net.parameters(), 0.1, 2, mitigation="lwpv")
    x, y = vectors(1)[0]
    one(net, optimizer, x, y)
    newest, velocity = weights(net), [s["velocity"].clone() for s in optimizer.state.values()]
    with optimizer.ahead():
        with pytest.raises(RecoupError, match=r"DelayedSGD\.step within `ahead`"):
            optimizer.step()
        with pytest.raises(RecoupError, match=r"DelayedSGD\.ahead within `ahead`"), optimizer.ahead():
            pass
    assert all(torch.equal(p, newest[n]) for n, p in net.named_parameters())
    assert all(torch.equal(s["velocity"], v) for s, v in zip(optimizer.state.values(), velocity, strict=True))
    optimizer.step()  # and then it may


def test_gradients_are_left_and_parameters_without_one_too():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = DelayedSGD([used, unused], 0.1, 2, weight_decay=0.5)
    used.grad = torch.tensor([1.0, 2.0])
    assert optimizer.step(lambda: (used * 1).sum().item()) == 2.0
    assert used.grad.tolist() == [1.0, 2.0]
    assert unused.tolist() == [1.0, 1.0]
    assert used.tolist() != [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, r"lr=-0\.1\): lr must be from 0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"momentum": 1.5}, r"momentum=1\.5\): momentum must be from 0 to 1"),
        ({"weight_decay": -1.0}, "weight_decay must be from 0"),
        ({"delay": -1}, r"DelayedSGD\(delay=-1\): delay must be an integer from 0"),
        ({"delay": 1.5}, "delay=1.5"),
        ({"mitigation": "lwp"}, "the names are"),
        ({"mitigation": "stash"}, r"stash, past and spectrain choose .* use pipeline\.Simulator"),
        ({"mitigation": "spectrain"}, "stash, past and spectrain"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(RecoupError, match=message):
        DelayedSGD(multilayer().parameters(), **{"lr": 0.1, "delay": 1, **options})


def test_bad_parameters():
    optimizer = DelayedSGD([nn.Parameter(torch.zeros(2))], 0.1, 1)
    for bad in (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, 3).t()):
        with pytest.raises(RecoupError, match="must be contiguous float32 or float64"):
            optimizer.add_param_group({"params": [nn.Parameter(bad)]})
    with pytest.raises(RecoupError, match="delay=-3"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "delay": -3})
    assert len(optimizer.param_groups) == 1  # nothing was added
