"""Updates and predictions against numpy, fractions and torch's SGD: the identities of the specification.

The gradient is an affine map that is not symmetric, so that no identity holds by accident. Weights are consistent here
(forward and backward see the same); `test_simulator` has the inconsistent ones.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch

from recoup.pipeline import Mitigation
from recoup.pipeline.mitigation import NAMES
from recoup.pipeline.update import StageOptimizer, spike

N, STEPS, RATE = 5, 60, 0.03
GENERATOR = np.random.default_rng(1)
# Eigenvalues with real parts around 1 keep the iteration bounded, so that 1e-12 is relative to numbers of about 1.
MATRIX = np.eye(N) + 0.3 * GENERATOR.standard_normal((N, N))
SHIFT, START = GENERATOR.standard_normal(N), GENERATOR.standard_normal(N)
DELAYS, MOMENTA = [0, 1, 2, 5, 9], [0.0, 0.5, 0.9]


def gradient(x):
    return MATRIX @ x - SHIFT


def ours(how, delay, momentum, steps=STEPS, decay=0.0, position=0, rate=lambda _: RATE):
    """(newest weights, velocity, forward weights) before each update and after the last, of one stage."""
    weights = torch.tensor(START)
    optimizer = StageOptimizer(weights, [N], [delay], position, momentum, decay, how)
    history, seen = [], []
    for k in range(steps + 1):
        seen.append(optimizer.ahead(rate(k)).numpy().copy())
        history.append((weights.numpy().copy(), optimizer.velocity.numpy().copy(), seen[-1]))
        if k < steps:
            optimizer.step(torch.from_numpy(gradient(seen[max(0, k - delay)])), rate(k))
    return history


def model(horizon, delay, momentum):
    """SGD with momentum whose gradient is taken at x - eta T v of D updates ago: (x, v) before each update."""
    x, v, points, history = START, np.zeros(N), [], []
    for k in range(STEPS + 1):
        points.append(x - RATE * horizon * v)
        history.append((x, v))
        v = momentum * v + gradient(points[max(0, k - delay)])
        x = x - RATE * v
    return history


def powers(momentum, delay):
    """m + m^2 + ... + m^D, summed as such."""
    return sum(momentum**i for i in range(1, delay + 1))


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize("name", ["none", "stash", "sc", "lwpv", "lwpw", "lwpv+sc"])
def test_every_method_is_sgd_with_its_gradient_taken_elsewhere(name, delay, momentum):
    spikes = powers(momentum, delay) if name.endswith("sc") else 0
    predicted = delay if name.startswith("lwp") else 0
    expected = model(predicted + spikes, delay, momentum)
    for (w, v, seen), (x, velocity) in zip(ours(NAMES[name], delay, momentum), expected, strict=True):
        np.testing.assert_allclose(v, velocity, rtol=0, atol=1e-12)
        np.testing.assert_allclose(w, x - RATE * spikes * velocity, rtol=0, atol=1e-12)
        np.testing.assert_allclose(seen, x - RATE * (spikes + predicted) * velocity, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.5, 2.0])
@pytest.mark.parametrize("delay", [1, 4])
def test_alpha_of_compensation_stretches_the_horizon(alpha, delay):
    m = 0.9
    horizon = m * (1 - m ** (alpha * delay)) / (1 - m)  # the sum of powers, for exponents that are not whole
    for (w, _, _), (x, v) in zip(ours(Mitigation(alpha), delay, m), model(horizon, delay, m), strict=True):
        np.testing.assert_allclose(w, x - RATE * horizon * v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", ["velocity", "weight"])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_prediction_has_a_horizon_factor(factor, prediction):
    how = Mitigation(prediction=prediction, horizon=factor)
    for (w, _, _), (x, _) in zip(ours(how, 4, 0.9), model(4 * factor, 4, 0.9), strict=True):
        np.testing.assert_allclose(w, x, rtol=0, atol=1e-12)


def test_the_two_forms_of_prediction_differ_only_with_compensation():
    velocity, weight = (ours(NAMES[name], 4, 0.9)[-1][0] for name in ("lwpv", "lwpw"))
    np.testing.assert_allclose(velocity, weight, rtol=0, atol=1e-12)
    velocity, weight = (ours(NAMES[name], 4, 0.9)[-1][0] for name in ("lwpv+sc", "lwpw+sc"))
    assert np.abs(velocity - weight).max() > 1e-3


@pytest.mark.parametrize("delay", DELAYS)
def test_prediction_by_weights_with_compensation_follows_the_formulas(delay):
    m = 0.9
    a, b = m**delay, powers(m, delay) / m
    w = before = START
    v, points = np.zeros(N), []
    for found, velocity, seen in ours(NAMES["lwpw+sc"], delay, m):
        points.append(w + delay * (w - before))
        np.testing.assert_allclose(found, w, rtol=0, atol=1e-12)
        np.testing.assert_allclose(velocity, v, rtol=0, atol=1e-12)
        np.testing.assert_allclose(seen, points[-1], rtol=0, atol=1e-12)
        g = gradient(points[max(0, len(points) - 1 - delay)])
        v = m * v + g
        before, w = w, w - RATE * (a * v + b * g)


@pytest.mark.parametrize("delay", [0, 1, 3, 8])
def test_a_compensated_gradient_has_contributed_all_it_should_from_its_arrival_on(delay):
    m = Fraction(9, 10)
    weights = torch.zeros(1, dtype=torch.float64)
    optimizer = StageOptimizer(weights, [1], [delay], 0, 0.9, 0.0, NAMES["sc"])
    for n in range(30):
        optimizer.step(torch.full((1,), float(n == 0), dtype=torch.float64), 1.0)
        in_time = sum(m**j for j in range(n + delay + 1))  # had the gradient come D updates earlier
        assert weights.item() == pytest.approx(-float(in_time), rel=1e-13)  # some tens of roundings


@pytest.mark.parametrize("momentum", [Fraction(1, 2), Fraction(9, 10), Fraction(127, 128), Fraction(1)])
@pytest.mark.parametrize("delay", [0, 1, 2, 17])
def test_the_coefficients(momentum, delay):
    a, b = spike(float(momentum), delay)
    # (1 - m^D) / (1 - m) loses the digits that 1 - m has before its first one: 7 bits at 127/128
    assert a == pytest.approx(float(momentum**delay), rel=1e-13)
    assert b == pytest.approx(float(sum(momentum**j for j in range(delay))), rel=1e-13, abs=0)


def test_the_coefficients_without_momentum():
    assert spike(0.0, 0) == (1.0, 0.0)
    assert spike(0.0, 3) == (0.0, 1.0)


@pytest.mark.parametrize("name", ["none", "sc", "lwpv+sc"])
def test_momentum_of_one(name):
    spikes = 3 if name.endswith("sc") else 0
    horizon = spikes + (3 if name.startswith("lwp") else 0)
    expected = model(horizon, 3, 1.0)[:20]  # it diverges: compare while numbers are small
    for (w, _, _), (x, v) in zip(ours(NAMES[name], 3, 1.0)[:20], expected, strict=True):
        np.testing.assert_allclose(w, x - RATE * spikes * v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize(("name", "delay", "nesterov"), [("sc", 0, False), ("none", 0, False), ("sc", 1, True)])
def test_torchs_sgd(name, delay, nesterov, decay):
    weights, parameter = torch.tensor(START), torch.nn.Parameter(torch.tensor(START))
    mine = StageOptimizer(weights, [N], [delay], 0, 0.9, decay, NAMES[name])
    theirs = torch.optim.SGD([parameter], RATE, momentum=0.9, weight_decay=decay, nesterov=nesterov)
    for k in range(STEPS):
        g = torch.from_numpy(np.cos(k + np.arange(N)))
        parameter.grad = g.clone()
        theirs.step()
        mine.step(g, RATE)
        if delay:  # a v + b g sums in another order than g + m v
            torch.testing.assert_close(weights, parameter.detach(), rtol=0, atol=1e-14)
        else:
            assert torch.equal(weights, parameter.detach())


@pytest.mark.parametrize("name", ["none", "sc", "lwpv", "lwpw+sc"])
def test_decay_acts_on_the_newest_weights_and_is_not_shrunk(name):
    m, delay, beta, decay = 0.9, 3, 0.8, 0.1
    how = NAMES[name].replace(shrink=beta)
    a, b = (m**delay, (1 - m**delay) / (1 - m)) if how.compensation else (1.0, 0.0)
    w, v, points = START, np.zeros(N), []
    for found, velocity, seen in ours(how, delay, m, decay=decay):
        np.testing.assert_allclose(found, w, rtol=0, atol=1e-12)
        np.testing.assert_allclose(velocity, v, rtol=0, atol=1e-12)
        points.append(seen)
        g = beta**delay * gradient(points[max(0, len(points) - 1 - delay)]) + decay * w
        v = m * v + g
        w = w - RATE * (a * v + b * g)


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize(("position", "delay"), [(0, 4), (2, 3), (5, 0)])
def test_spectrain_predicts_in_both_passes(position, delay, factor):
    how = Mitigation(prediction="spectrain", horizon=factor)
    weights = torch.tensor(START)
    optimizer = StageOptimizer(weights, [N], [delay], position, 0.9, 0.0, how)
    for k in range(10):
        rate = RATE / (k + 1)
        w, v = weights.numpy(), optimizer.velocity.numpy()
        ahead, returning = optimizer.ahead(rate).clone().numpy(), optimizer.returning(rate).clone().numpy()
        np.testing.assert_allclose(ahead, w - rate * factor * (delay + position) * v, rtol=0, atol=1e-14)
        np.testing.assert_allclose(returning, w - rate * factor * position * v, rtol=0, atol=1e-14)
        optimizer.step(torch.from_numpy(gradient(ahead)), rate)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "spectrain"])
def test_other_methods_return_through_the_newest_weights(name):
    optimizer = StageOptimizer(torch.tensor(START), [N], [3], 2, 0.9, 0.0, NAMES[name])
    optimizer.step(torch.ones(N, dtype=torch.float64), 0.1)
    assert optimizer.returning(0.1) is optimizer.weights


@pytest.mark.parametrize("delay", [0, 1, 6])
@pytest.mark.parametrize("name", ["none", "sc"])
def test_pipemares_rate_rises_to_the_full_one(name, delay):
    m, K = 0.9, 8
    a, b = (m**delay, (1 - m**delay) / (1 - m)) if name == "sc" else (1.0, 0.0)
    w, v, points = START, np.zeros(N), []
    for k, (found, _, seen) in enumerate(ours(NAMES[name].replace(annealing=K), delay, m)):
        np.testing.assert_allclose(found, w, rtol=0, atol=1e-12)
        points.append(seen)
        g = gradient(points[max(0, k - delay)])
        v = m * v + g
        w = w - RATE / (delay or 1) ** (1 - min(k / K, 1)) * (a * v + b * g)


def test_the_prediction_uses_the_rate_it_is_given():
    optimizer = StageOptimizer(torch.tensor(START), [N], [4], 0, 0.9, 0.0, NAMES["lwpv"])
    optimizer.step(torch.from_numpy(gradient(START)), 0.1)
    w, v = optimizer.weights.numpy(), optimizer.velocity.numpy()
    np.testing.assert_allclose(optimizer.ahead(0.25).numpy(), w - 0.25 * 4 * v, rtol=0, atol=1e-14)


HOWS = [*NAMES.values(), Mitigation(0.5, "velocity", 2.0, shrink=0.9, annealing=3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", HOWS, ids=repr)
def test_neighbouring_stages_are_the_same_bits_as_single_ones(how, dtype):
    sizes, own, first = [3, 0, 64, 7], [6, 4, 2, 0], 2
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(sum(sizes), generator=generator, dtype=dtype)
    parts = [part.clone() for part in whole.split(sizes)]
    together = StageOptimizer(whole, sizes, own, first, 0.9, 1e-2, how)
    alone = [
        StageOptimizer(part, [len(part)], [D], first + s, 0.9, 1e-2, how)
        for s, (part, D) in enumerate(zip(parts, own, strict=True))
    ]
    for k in range(8):
        g = torch.randn(sum(sizes), generator=generator, dtype=dtype)
        for optimizer, part in zip(alone, g.split(sizes), strict=True):
            optimizer.step(part.clone(), 0.1 / (k + 1))
        together.step(g, 0.1 / (k + 1))
        assert torch.equal(whole, torch.cat(parts))
        assert torch.equal(together.ahead(0.1), torch.cat([o.ahead(0.1) for o in alone]))
        assert torch.equal(together.returning(0.1), torch.cat([o.returning(0.1) for o in alone]))


@pytest.mark.parametrize("how", HOWS, ids=repr)
def test_the_state_goes_on_bit_for_bit(how):
    def made():
        return StageOptimizer(torch.tensor(START), [2, 3], [4, 2], 0, 0.9, 1e-2, how)

    one, other = made(), made()
    for k in range(5):
        one.step(torch.from_numpy(np.cos(k + np.arange(N))), 0.1)
    state = one.state()
    one.step(torch.ones(N, dtype=torch.float64), 0.1)  # a copy: what follows must not reach it
    other.load(state)
    other.step(torch.ones(N, dtype=torch.float64), 0.1)
    assert one.updates == other.updates == 6
    assert torch.equal(one.weights, other.weights)
    assert torch.equal(one.ahead(0.2), other.ahead(0.2))
