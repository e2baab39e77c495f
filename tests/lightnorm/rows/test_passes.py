"""Every bit of layer and RMS norm: the reference against exact fractions and closed formulas, the passes against it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recoup.formats import Float
from recoup.lightnorm import LightNorm
from recoup.lightnorm.rows import anywhere, cpu, passes, reference
from recoup.lightnorm.scale import gaussian_magnitude, magnitude_constant
from tests.lightnorm.rows import model

NEAREST = {
    "forward": Float.parse("bfloat16"),
    "backward": Float.parse("e5m2"),
    "statistics": Float.parse("float32"),
}
WIDE = Float.parse("float32")
CONFIGS = {
    "default": LightNorm(),
    "max, paper, three": LightNorm(block=3, shared="max", chunks=3, scale="paper"),
    "fp10, x - mu": LightNorm.fp10(difference=LightNorm().statistics, chunks=5),
    "nearest": LightNorm(block=5, chunks=2, scale="hoffer", **NEAREST),
    "wide": LightNorm(WIDE, WIDE, WIDE, block=8, chunks=1),
    "range": LightNorm.range(),
    "blocks alone": LightNorm(None, None, None, block=8, axis="place", chunks=4),
    "statistics alone": LightNorm(None, None, block=None, chunks=2),
}
WITH_FORMATS = ["default", "max, paper, three", "fp10, x - mu", "nearest", "wide"]
KINDS = ("layer", "rms")


def drawn(seed, shape, gain=False, dtype=torch.float32):
    """x, dy, gamma, beta and a gain."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    gamma, beta = (torch.randn(shape[1], generator=generator, dtype=torch.float64) for _ in range(2))
    factor = torch.rand(shape[1], generator=generator) + 0.5 if gain else None
    return (*(v.to(dtype) for v in (x * 3 + 0.5, grad * 0.02, gamma, beta)), factor)


def legal(config, kind):
    return config.replace(scale="gaussian") if kind == "rms" else config


def same(found, expected):
    """Equal bits, signs of zeros included; NaN where NaN."""
    found, expected = found.double(), expected.double()
    nan = found.isnan()
    signs = torch.equal(found.signbit() | nan, expected.signbit() | nan)
    return signs and torch.equal(nan, expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())


def check(x, grad, gamma, beta, gain, kind, config, eps=1e-5):
    """On the kernels and on torch's operations, which CUDA takes: every bit of the reference."""
    y, saved = reference.forward(x, gamma, beta, gain, kind, config, eps)
    expected = reference.backward(grad, saved, gain, kind, config)
    with pytest.MonkeyPatch.context() as patch:
        for way in (cpu, anywhere):
            patch.setattr(passes, "_elementwise", lambda _, way=way: way)
            found, xhat, r, ends = passes.forward(x, gamma, beta, gain, kind, config, eps)
            assert same(found, y)
            assert found.dtype == x.dtype
            assert same(xhat, saved.normalized)
            assert same(r, saved.reciprocal)
            assert torch.equal(ends[~r.isnan()], saved.ends[~r.isnan()])
            gradients = passes.backward(grad, xhat, r, ends, gamma, gain, kind, config)
            for one, other in zip(gradients, expected, strict=True):
                assert same(one, other)
                assert one.dtype == x.dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WITH_FORMATS)
def test_the_reference_against_fractions(name, kind):
    config = legal(CONFIGS[name], kind)
    for seed, (shape, gained) in enumerate([((3, 19), False), ((2, 16), True)]):
        x, grad, gamma, beta, gain = drawn(seed, shape, gained)
        constants = reference.constants_of(kind, shape[1], config).tolist()
        second = model.Model(*(v.numpy() for v in (x, gamma, beta)), gain, kind, config, 1e-5, constants)
        y, saved = reference.forward(x, gamma, beta, gain, kind, config, 1e-5)
        dx, dgamma, dbeta = reference.backward(grad, saved, gain, kind, config)
        gradients = second.backward(grad.numpy())
        factor = np.ones(shape[1]) if gain is None else gain.double().numpy()
        for found, expected in (
            (y, second.y),
            (saved.normalized, second.xhat),
            (saved.reciprocal, second.r),
            (dx, gradients[0]),
            (dgamma, np.array(gradients[1], float) * factor),
            (dbeta, gradients[2]),
        ):
            np.testing.assert_array_equal(found.numpy(), np.array(expected, float).astype(found.numpy().dtype))


def closed(x, gamma, beta, gain, kind, config, eps):
    """The formulas of the specification, in plain differentiable torch."""
    s, constants = eps, reference.constants_of(kind, x.shape[1], config).tolist()
    for part, c in zip(x.tensor_split(config.chunks, 1), constants, strict=True):
        span = part.amax(1) - part.amin(1) if kind == "layer" else part.abs().amax(1)
        s = s + c / config.chunks * span
    mean = x.mean(1, keepdim=True) if kind == "layer" else 0
    return (1 if gain is None else gain) * gamma * (x - mean) / s[:, None] + beta


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("chunks", "features", "gained"), [(1, 5, False), (3, 25, True), (8, 17, False)])
def test_without_formats_it_is_the_closed_formula(kind, chunks, features, gained):
    config = LightNorm.range(chunks=chunks)
    x, grad, gamma, beta, gain = drawn(3, (4, features), gained, torch.float64)
    leaves = [v.clone().requires_grad_() for v in (x, gamma, beta)]
    y = closed(*leaves, gain, kind, config, 1e-5)
    expected = torch.autograd.grad(y, leaves, grad)
    found, xhat, r, ends = passes.forward(x, gamma, beta, gain, kind, config, 1e-5)
    torch.testing.assert_close(found, y.detach(), rtol=1e-12, atol=1e-12)
    for one, other in zip(passes.backward(grad, xhat, r, ends, gamma, gain, kind, config), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_passes_equal_the_reference(name, kind):
    config = legal(CONFIGS[name], kind)
    check(*drawn(1, (3, 37), gain=True), kind, config)
    check(*drawn(2, (2, 16), dtype=torch.float64), kind, config)


@settings(max_examples=25)
@given(st.data())
def test_any_values(data):
    kind = data.draw(st.sampled_from(KINDS))
    config = legal(CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))], kind)
    S, D = data.draw(st.integers(0, 3)), data.draw(st.integers(2, 24))
    config = config.replace(chunks=data.draw(st.integers(1, D // 2)), block=data.draw(st.none() | st.integers(1, 26)))
    x, grad, gamma, beta, gain = drawn(data.draw(st.integers(0, 99)), (S, D), data.draw(st.booleans()))
    edges = [0.0, -0.0, 1e-40, 65000.0, -1e6, 2.0**-14, -(2.0**-16), 1.0, 1.5, -1.5, -1.0, math.nan, math.inf]
    for target in (x, grad, gamma[None]) if S else ():
        for _ in range(data.draw(st.integers(0, 4))):
            target.view(-1)[data.draw(st.integers(0, target.numel() - 1))] = data.draw(st.sampled_from(edges[:11]))
    if S and data.draw(st.booleans()):
        data.draw(st.sampled_from([x, grad]))[0, D - 1] = data.draw(st.sampled_from(edges))
    if S and data.draw(st.booleans()):
        x[0] = data.draw(st.sampled_from([0.0, 3.0, -1e5]))  # a constant sample
    check(x, grad, gamma, beta, gain, kind, config)


def test_ties_go_to_the_first_feature():
    x = torch.tensor([[1.0, 3.0, 3.0, 1.0, 2.0, 2.0, 2.0, 2.0], [-2.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, -0.0]])
    config = LightNorm.range(chunks=2)
    for kind, expected in (
        ("layer", [[[1, 0], [-1, -1]], [[1, 0], [-1, -1]]]),
        ("rms", [[[1, -1], [4, -1]], [[-1, 0], [-1, -1]]]),  # loses where x > 0, gains where x < 0, neither at zero
    ):
        found = passes.forward(x, torch.ones(8), torch.zeros(8), None, kind, config, 1e-5)[3]
        assert found.tolist() == expected
    check(x, x / 7, torch.ones(8), torch.zeros(8), None, "rms", LightNorm.fp10(chunks=2))


def test_constants_of_largest_magnitudes():
    for m in (1, 2, 3, 12, 100, 5000):
        assert magnitude_constant(m) == pytest.approx(model.constant(m, "rms", ""), rel=1e-9)  # Simpson's
    assert gaussian_magnitude(1) == pytest.approx(math.sqrt(2 / math.pi), rel=1e-15)
    assert gaussian_magnitude(2) == pytest.approx(2 / math.sqrt(math.pi), rel=1e-15)
    x = torch.randn(4096, 96, generator=torch.Generator().manual_seed(0))
    for kind in KINDS:  # s estimates sigma without bias
        r = passes.forward(x, torch.ones(96), torch.zeros(96), None, kind, LightNorm.range(), 0.0)[2]
        assert float((1 / r).mean()) == pytest.approx(1, abs=0.01)


def test_results_do_not_depend_on_threads():
    x, grad, gamma, beta, gain = drawn(6, (600, 240), gain=True)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y, xhat, r, ends = passes.forward(x, gamma, beta, gain, "layer", LightNorm(), 1e-5)
        results.append((y, *passes.backward(grad, xhat, r, ends, gamma, gain, "layer", LightNorm())))
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))
