"""The specification's formulas and constants, each from numpy in float64 or from exact numbers: no recoup inside."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from recoup.errors import RecoupError
from recoup.formats import BlockFloat, Float, quantize
from recoup.lightnorm import LightNorm, LightNorm1d, LightNorm2d, passes
from recoup.lightnorm.scale import constant, gaussian_range
from tests.lightnorm import model

SCALES = ("gaussian", "paper", "hoffer")
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}  # the issue's: sums, products and quotients of float64 in another order


def step(x, grad, gamma, beta, chunks, scale, eps):
    """y, dx, dgamma, dbeta of [n, C]: sections 1 and 3 of the specification."""
    n, C = x.shape
    parts = np.array_split(np.arange(n), chunks)
    constants = [model.constant(len(part), scale) for part in parts]
    mu = x.mean(0)
    s = sum(c * np.ptp(x[part], axis=0) for c, part in zip(constants, parts, strict=True)) / chunks + eps
    xhat = (x - mu) / s
    S = (grad * xhat).sum(0)
    dx = gamma / s * (grad - grad.mean(0))
    for c, part in zip(constants, parts, strict=True):
        term = gamma * c * S / (s * chunks)
        for channel in range(C):  # numpy's arg functions take the first of equals
            dx[part[np.argmax(x[part, channel])], channel] -= term[channel]
            dx[part[np.argmin(x[part, channel])], channel] += term[channel]
    return gamma * xhat + beta, dx, S, grad.sum(0)


def layer_step(x, grad, gamma, beta, config, eps, dtype=torch.float64):
    unit = LightNorm1d(x.shape[1], eps, config=config, dtype=dtype)
    with torch.no_grad():
        assert unit.weight is not None
        unit.weight.copy_(torch.from_numpy(gamma))
        unit.bias.copy_(torch.from_numpy(beta))
    leaf = torch.from_numpy(x).to(dtype).requires_grad_()
    y = unit(leaf)
    y.backward(torch.from_numpy(grad).to(dtype))
    assert leaf.grad is not None
    return [v.detach().numpy() for v in (y, leaf.grad, unit.weight.grad, unit.bias.grad)]


def inputs(seed, n, C):
    r = np.random.default_rng(seed)
    return r.normal(1, 3, (n, C)), r.normal(size=(n, C)), r.normal(size=C), r.normal(size=C)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("n", "chunks"), [(16, 8), (17, 8), (23, 8), (2, 1), (3, 1), (50, 7), (64, 1), (97, 3)])
def test_forward_and_backward_without_formats(n, chunks, scale):
    x, grad, gamma, beta = inputs(n, n, 3)
    config = LightNorm.range(chunks=chunks, scale=scale)
    found = layer_step(x, grad, gamma, beta, config, 1e-5)
    for one, other in zip(found, step(x, grad, gamma, beta, chunks, scale, 1e-5), strict=True):
        np.testing.assert_allclose(one, other, **TOLERANCE)


@pytest.mark.parametrize("axis", ["channel", "place"])
def test_ties_and_constants_without_formats(axis):
    x = np.tile([[2.0, 5.0], [2.0, -1.0], [-3.0, 5.0], [-3.0, -1.0], [0.5, 0.0]], (5, 1))
    x[:, 1] = np.round(x[:, 1])
    x = np.concatenate([x, np.full((25, 1), 0.75), np.where(np.arange(25)[:, None] < 12, 1.0, 2.0)], 1)
    _, grad, gamma, beta = inputs(1, 25, 4)
    found = layer_step(x, grad, gamma, beta, LightNorm.range(chunks=3, axis=axis), 1e-3)
    expected = list(step(x, grad, gamma, beta, 3, "gaussian", 1e-3))
    # In a constant chunk the two terms meet at one element and cancel: numpy leaves their rounding there.
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-11)
    assert np.array_equal(found[0][:, 2], np.full(25, beta[2]))


@pytest.mark.parametrize("chunks", [1, 5])
def test_dx_against_central_differences(chunks):
    """The derivative of the closed formula itself, element by element; 2e-9 in the specification."""
    x, grad, gamma, beta = inputs(7, 23, 2)

    def loss(v):
        return float((step(v, grad, gamma, beta, chunks, "gaussian", 1e-5)[0] * grad).sum())

    h = 1e-5
    expected = np.empty_like(x)
    for at in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[at] += h
        down[at] -= h
        expected[at] = (loss(up) - loss(down)) / (2 * h)
    found = layer_step(x, grad, gamma, beta, LightNorm.range(chunks=chunks), 1e-5)[1]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-9)


def test_constants():
    for m in (2, 3, 5, 8, 64, 1000, 20000):
        assert constant(m, "paper") == 1 / math.sqrt(2 * math.log(m))
        assert constant(m, "hoffer") / constant(m, "paper") == pytest.approx(model.HOFFER, rel=4e-16)
        # 1e-9: Simpson's rule over the maximum's density, an expectation written another way
        assert constant(m, "gaussian") == pytest.approx(model.constant(m, "gaussian"), rel=1e-9)
    assert 0.175 * (1 + math.sqrt(math.pi * math.log(4))) == model.HOFFER
    assert constant(3, "gaussian") == pytest.approx(math.sqrt(math.pi) / 3, rel=1e-14)
    for e in range(4, 15):  # the specification: with Banner's constant 1.5 to 1.8 sigma
        assert 1.5 <= round(constant(2**e, "paper") * gaussian_range(2**e), 2) <= 1.8


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
def test_running_statistics(momentum):
    unit = LightNorm1d(3, 1e-3, momentum, config=LightNorm.range(chunks=2), dtype=torch.float64)
    mean, var = np.zeros(3), np.ones(3)
    for batch in range(3):
        x = inputs(batch, 21, 3)[0]
        unit(torch.from_numpy(x))
        parts = np.array_split(x, 2)
        s = sum(model.constant(len(part), "gaussian") * np.ptp(part, axis=0) for part in parts) / 2
        factor = 1 / (batch + 1) if momentum is None else momentum
        mean, var = (1 - factor) * mean + factor * x.mean(0), (1 - factor) * var + factor * s**2
    np.testing.assert_allclose(unit.running_mean, mean, **TOLERANCE)
    np.testing.assert_allclose(unit.running_var, var, **TOLERANCE)
    assert unit.num_batches_tracked == 3
    x = inputs(9, 5, 3)[0]
    y = unit.eval()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-3), **TOLERANCE)


def test_fp10():
    forward, backward = LightNorm().forward, LightNorm().backward
    assert forward is not None
    assert backward is not None
    for form, exponents, mantissa, bias, largest in ((forward, 5, 4, 15, 63488.0), (backward, 6, 3, 31, 1.875 * 2**31)):
        codes = itertools.product(range(1, 2**exponents - 1), range(2**mantissa))
        values = [0.0, *sorted((1 + f / 2**mantissa) * 2.0 ** (e - bias) for e, f in codes)]
        assert form.values() == values
        assert max(values) == largest
        x = torch.tensor([*values, *(-v for v in values)], dtype=torch.float32)
        assert torch.equal(quantize(x, form), x)
        assert torch.equal(quantize(x, form).signbit(), x.signbit())
        above = torch.nextafter(x, torch.full_like(x, torch.inf) * x.sign())  # truncated, flushed or saturated
        assert torch.equal(quantize(above[1 : len(values)], form), x[1 : len(values)])
        below = torch.nextafter(x[2 : len(values)], torch.tensor(0.0))
        assert torch.equal(quantize(below, form), x[1 : len(values) - 1])
        tiny = torch.nextafter(x[1:2], torch.tensor(0.0))
        ends = torch.cat([tiny, -tiny, torch.tensor([math.inf, -math.inf, 3e38])])
        assert quantize(ends, form).tolist() == [0.0, -0.0, largest, -largest, largest]


@pytest.mark.parametrize("shared", ["max", "outlier"])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_every_pair_of_fp10_values_in_a_block(name, shared):
    """All blocks of two magnitudes: numpy on float64, exact."""
    config = LightNorm(block=2, shared=shared)
    form, blocks = getattr(config, name), getattr(config, f"{name}_blocks")
    values = np.array(form.values())
    a, b = (v.ravel() for v in np.meshgrid(values, -values[::-1]))
    pair = np.stack([a, b], 1)
    exponent = np.where(pair == 0, -9999, np.frexp(pair)[1] - 1)
    first = exponent.max(1)
    lone = (exponent == first[:, None]).sum(1) == 1
    quantum = 2.0 ** (np.maximum(first, form.min_exponent) - form.mantissa)
    crushed = np.trunc(pair / quantum[:, None]) * quantum[:, None]
    # alone at the top it stays, and then the other one is at E2 by itself: nothing is lost in a block of two
    expected = np.where(lone[:, None], pair, crushed) if shared == "outlier" else crushed
    found = quantize(torch.from_numpy(pair)[:, :, None], blocks).numpy()[:, :, 0]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(pair))
    again = quantize(torch.from_numpy(found)[:, :, None], blocks).numpy()[:, :, 0]
    np.testing.assert_array_equal(again, found)
    np.testing.assert_array_equal(quantize(torch.from_numpy(found), form).numpy(), found)  # stays FP10


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ([16.0, 1.0625, 0.984375, -0.0], [16.0, 1.0625, 0.9375, -0.0]),  # E2 = 0, quantum 1/16
        ([16.0, 17.0, 1.5, -0.75], [16.0, 17.0, 1.0, -0.0]),  # two at the top: no outlier
        ([16.0, -16.0, 0.0, 0.0], [16.0, -16.0, 0.0, 0.0]),
        ([0.0, 3.25, 0.0, -0.0], [0.0, 3.25, 0.0, -0.0]),  # all others are zero
        ([16.0, 15.9375, 1e-3, 0.0], [16.0, 15.5, 0.0, 0.0]),
        ([2.0**-14, 2.0**-15, 2.0**-18, 2.0**-19], [2.0**-14, 2.0**-15, 2.0**-18, 0.0]),  # E2 clamps to -14
    ],
)
def test_the_outlier_rule_by_hand(block, expected):
    found = quantize(torch.tensor(block).view(1, 4, 1), BlockFloat())
    assert found.flatten().tolist() == expected
    assert found.flatten().signbit().tolist() == [math.copysign(1, v) < 0 for v in expected]


def test_widths_of_the_statistics():
    config = LightNorm()
    assert config.statistics == Float(12, -14, 15, subnormals=False, rounding="zero")
    assert config.gradient_statistics == Float(11, -30, 31, subnormals=False, rounding="zero")
    assert config.replace(backward=None).gradient_statistics is None
    merged = torch.from_numpy(inputs(3, 64, 4)[0].T[None].copy())
    _, _, mean, s, r, _ = passes.forward(merged, torch.ones(4), torch.zeros(4), LightNorm.range(), 1e-5)
    rounded = LightNorm(forward=None, backward=None, block=None)
    _, _, mean_S, s_S, r_S, _ = passes.forward(merged, torch.ones(4), torch.zeros(4), rounded, 1e-5)
    assert torch.equal(s, s_S)
    for exact, found in ((mean, mean_S), (r, r_S)):
        fraction, power = np.frexp(exact.numpy())
        np.testing.assert_array_equal(found.numpy(), np.trunc(fraction * 2**13) / 2**13 * 2.0**power)


@pytest.mark.parametrize("chunks", [1, 4, 8])
def test_too_few_elements(chunks):
    unit = nn.Sequential(LightNorm2d(2, config=LightNorm.range(chunks=chunks)))
    unit(torch.randn(chunks, 2, 1, 2))  # n = 2K
    if chunks > 1:
        with pytest.raises(
            RecoupError, match=rf"{2 * chunks - 1} elements; {chunks} chunks need at least {2 * chunks}"
        ):
            unit(torch.randn(2 * chunks - 1, 2, 1, 1))
    assert unit(torch.randn(0, 2, 3, 3)).shape == (0, 2, 3, 3)  # as torch's
