"""Rules against torch's own optimizers, formulas in numpy, and a pipeline that stores all versions of all weights."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recoup.errors import RecoupError
from recoup.pipeline import SGDM, AdamW, Delayed, Mitigation, NAdamW, Nesterov, Simulator, constant_delays
from recoup.pipeline.optimizers import coasting
from recoup.pipeline.update import StageOptimizer
from tests.pipeline.networks import by_child, make, multilayer, vectors

N, RATE = 5, 0.03
START = np.random.default_rng(1).standard_normal(N)


def gradient(k, x):
    return np.cos(k + np.arange(N)) + 0.3 * x


def ours(rule, how, delay=0, steps=40):
    """Weights and predicted weights before each update."""
    weights = torch.tensor(START)
    optimizer = StageOptimizer(weights, [N], [delay], 0, 0, 0, how, rule)
    found = []
    for k in range(steps):
        found.append((weights.numpy().copy(), optimizer.ahead(RATE).numpy().copy()))
        optimizer.step(torch.from_numpy(gradient(k, weights.numpy())), RATE)
    return found


TORCH = {
    "adamw": (AdamW((0.8, 0.99), 1e-6, 0.1), lambda p: torch.optim.AdamW(p, RATE, (0.8, 0.99), 1e-6, 0.1), 1e-14),
    "nesterov": (Nesterov(0.9, 0.1), lambda p: torch.optim.SGD(p, RATE, 0.9, weight_decay=0.1, nesterov=True), 1e-14),
    "sgd": (SGDM(0.9, 0.1), lambda p: torch.optim.SGD(p, RATE, 0.9, weight_decay=0.1), 0),
    # torch keeps the product of the momenta in float32
    "nadam": (
        NAdamW((0.8, 0.99), 1e-6, 0.1, 0.004),
        lambda p: torch.optim.NAdam(p, RATE, (0.8, 0.99), 1e-6, 0.1, 0.004, decoupled_weight_decay=True),
        1e-7,
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_without_delay_they_are_torchs(name):
    rule, theirs, tolerance = TORCH[name]
    parameter = torch.nn.Parameter(torch.tensor(START))
    optimizer = theirs([parameter])
    for k, (weights, _) in enumerate(ours(rule, Mitigation())):
        np.testing.assert_allclose(weights, parameter.detach().numpy(), rtol=0, atol=tolerance)
        parameter.grad = torch.from_numpy(gradient(k, parameter.detach().numpy()))
        optimizer.step()


def adam(beta1, beta2, eps, decay, delay, horizon):
    """The specification's text, in numpy: weights and predictions before each update, Spike Compensation of a delay."""
    w, M, V, found = START, np.zeros(N), np.zeros(N), []
    for t in range(40):
        u = (M / (1 - beta1**t)) / (np.sqrt(V / (1 - beta2**t)) + eps) + decay * w if t else 0
        found.append((w, w - RATE * horizon * u))
        g = gradient(t, w)
        M, V = beta1 * M + (1 - beta1) * g, beta2 * V + (1 - beta2) * g * g
        numerator = (beta1**delay * M + (1 - beta1**delay) * g) / (1 - beta1 ** (t + 1 + delay))
        w = (1 - RATE * decay) * w - RATE * numerator / (np.sqrt(V / (1 - beta2 ** (t + 1))) + eps)
    return found


@pytest.mark.parametrize("delay", [0, 1, 6])
@pytest.mark.parametrize("name", ["none", "sc", "lwpv", "coasting", "coasting+sc"])
def test_adam_with_compensation_and_predictions_follows_the_formulas(name, delay):
    how = Mitigation.parse(name)
    reach = coasting(0.8, delay) if "coasting" in name else delay
    wanted = adam(0.8, 0.99, 1e-6, 0.1, delay if "sc" in name else 0, reach * (how.prediction != "none"))
    for found, expected in zip(ours(AdamW((0.8, 0.99), 1e-6, 0.1), how, delay), wanted, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def test_adam_compensated_for_one_update_is_nadam_of_constant_momentum():
    one, other = AdamW((0.8, 0.99)), NAdamW((0.8, 0.99))
    for a, b in zip(ours(one, Mitigation.parse("sc"), 1), ours(other, Mitigation()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_sgd_compensated_for_one_update_is_nesterovs():
    for a, b in zip(ours(SGDM(), Mitigation.parse("sc"), 1), ours(Nesterov(), Mitigation()), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(ours(SGDM(), Mitigation.parse("sc"), 5), ours(Nesterov(), Mitigation.parse("sc"), 4), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("delay", [0, 1, 7, 90])
def test_coasting_is_the_sum_of_the_fading_steps(memory, delay):
    assert coasting(memory, delay) == pytest.approx(sum(memory**i for i in range(1, delay + 1)), rel=1e-12)


def versions(net, rule, delays, samples, how, clip=None):
    """A pipeline that keeps every version of every weight: those of a pass are chosen per child, in float64."""
    alpha = 1.0 if how.compensation else 0.0
    kept = [[{n: p.detach().clone() for n, p in child.named_parameters()}] for child in net]
    seen, losses = [[dict(v[0])] for v in kept], []
    state = [{n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in v[0].items()} for v in kept]
    b1, b2 = rule.betas
    for k, (x, y) in enumerate(samples):
        stale = [
            {n: p.clone().requires_grad_() for n, p in seen[s][max(0, k - D)].items()} for s, D in enumerate(delays)
        ]
        out = x
        for child, own in zip(net, stale, strict=True):
            out = torch.func.functional_call(child, own, (out,))
        value = F.cross_entropy(out, y)
        losses.append(value.item())
        flat = [p for own in stale for p in own.values()]
        found = iter(torch.autograd.grad(value, flat))
        for s, D in enumerate(delays):
            own = {n: next(found) for n in stale[s]}
            norm = sum(float((g * g).sum()) for g in own.values()) ** 0.5
            factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
            new, ahead = {}, {}
            for n, w in kept[s][k].items():
                g, (M, V) = own[n] * factor, state[s][n]
                M, V = b1 * M + (1 - b1) * g, b2 * V + (1 - b2) * g * g
                state[s][n] = M, V
                d = alpha * D
                numerator = (b1**d * M + (1 - b1**d) * g) / (1 - b1 ** (k + 1 + d))
                root = (V / (1 - b2 ** (k + 1))).sqrt() + rule.eps
                new[n] = w - RATE * (numerator / root + rule.weight_decay * w)
                u = (M / (1 - b1 ** (k + 1))) / root + rule.weight_decay * new[n]
                T = 0.0 if how.prediction == "none" else coasting(b1, D) if how.reach == "coasting" else D
                ahead[n] = new[n] - RATE * T * u
            kept[s].append(new)
            seen[s].append(ahead)
    return losses, [v[-1] for v in kept]


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("name", ["stash", "coasting+stash", "lwpv+stash", "lwpv+stash+sc"])
def test_a_pipeline_of_adam_equals_the_one_that_stores_all_versions(name, clip):
    net, samples, own = multilayer(), vectors(25), [8, 6, 4, 2, 0]
    rule, how = AdamW((0.8, 0.99), 1e-6, 0.1), Mitigation.parse(name)
    losses, expected = versions(copy.deepcopy(net), rule, own, samples, how, clip)
    simulator = make(net, RATE, mitigation=how, optimizer=rule, clip=clip)
    found = [simulator.step(x, y) for x, y in samples]
    np.testing.assert_allclose(found, losses, rtol=0, atol=1e-10)
    for child, wanted in zip(net, expected, strict=True):
        for n, p in child.named_parameters():
            torch.testing.assert_close(p.detach(), wanted[n], rtol=0, atol=1e-10)


def test_no_delay_is_torchs_adamw_on_a_network():
    net, samples = multilayer(), vectors(40)
    plain = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(plain.parameters(), 1e-2)
    simulator = make(net, 1e-2, optimizer=AdamW(), delays_=constant_delays(5, 0), mitigation="coasting+stash")
    for x, y in samples:
        optimizer.zero_grad()
        value = F.cross_entropy(plain(x), y)
        value.backward()
        optimizer.step()
        assert simulator.step(x, y) == pytest.approx(value.item(), abs=1e-12)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["none", "sc", "lwpw", "coasting", "coasting+sc"])
def test_delayed_equals_the_simulator_bit_for_bit(name):
    net = multilayer(stages=1)
    other, samples, kept = copy.deepcopy(net), vectors(20), []
    optimizer = Delayed(net.parameters(), AdamW(), 0.02, 3, name)
    simulator = Simulator(other, by_child(other), [3], 0.02, optimizer=AdamW(), mitigation=name)
    for k, (x, y) in enumerate(samples):
        with optimizer.ahead():
            kept.append({n: p.detach().clone() for n, p in net.named_parameters()})
        stale = {n: p.requires_grad_() for n, p in kept[max(0, k - 3)].items()}
        value = F.cross_entropy(torch.func.functional_call(net, stale, (x,)), y)
        for p, g in zip(net.parameters(), torch.autograd.grad(value, list(stale.values())), strict=True):
            p.grad = g
        optimizer.step()
        assert simulator.step(x, y) == value.item()
    fresh = Delayed(net.parameters(), AdamW(), 0.02, 3, name)
    fresh.load_state_dict(optimizer.state_dict())
    with pytest.raises(RecoupError, match=r"the state is of rule AdamW\(.*, here AdamW\(betas=\(0.5"):
        Delayed(net.parameters(), AdamW((0.5, 0.9)), 0.02, 3, name).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("make_", "message"),
    [
        (lambda: AdamW(betas=(0.9, 1.0)), "betas must be two numbers from 0 to below 1"),
        (lambda: AdamW(eps=-1.0), "eps must be a number from 0"),
        (lambda: AdamW(weight_decay=float("nan")), "weight_decay must be a number from 0"),
        (lambda: NAdamW(momentum_decay=-1.0), "momentum_decay must be a number from 0"),
        (lambda: SGDM(momentum="0.9"), "momentum must be a number from 0"),
        (lambda: Mitigation(reach="coasting"), "only a prediction along the velocity coasts"),
        (lambda: Mitigation(stash=True, past=True), "stash and past both say which weights"),
        (lambda: Mitigation.parse("lwpv+lwpw"), "a forward pass has one prediction"),
        (lambda: Mitigation.parse("sc+sc"), "the names are"),
        (lambda: Delayed([torch.nn.Parameter(torch.ones(1))], torch.optim.SGD, 0.1, 2), "optimizer must be a rule"),
    ],
)
def test_bad_values(make_, message):
    with pytest.raises(RecoupError, match=message):
        make_()


def test_torchs_schedule_of_the_momentum_has_no_compensation():
    simulator = make(multilayer(), 0.1, optimizer=NAdamW(momentum_decay=0.004), mitigation="sc")
    with pytest.raises(RecoupError, match="Spike Compensation needs a constant momentum"):
        simulator.step(*vectors(1)[0])


@pytest.mark.parametrize(
    "rule", [SGDM(0.5), Nesterov(0.5, 0.1), AdamW((0.5, 0.9)), NAdamW(momentum_decay=0.1)], ids=repr
)
def test_the_repr_can_be_pasted_back(rule):
    assert eval(repr(rule)) == rule  # noqa: S307
    assert type(rule).from_dict(rule.to_dict()) == rule
