"""The CPU passes against the reference, and the reference against fractions and closed formulas."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recoup.formats import Float, quantize
from recoup.lightnorm import LightNorm, passes, reference
from recoup.lightnorm.scale import constant, factors, sizes

CONFIGS = {
    "default": LightNorm(),
    "range": LightNorm.range(),
    "banner": LightNorm.range(chunks=1, scale="paper"),
    "fp10": LightNorm.fp10(),
    "max, paper": LightNorm(shared="max", scale="paper", chunks=3),
    "nearest, subnormals": LightNorm(Float.parse("bfloat16"), Float.parse("e5m2"), Float.parse("float32"), block=3),
    "blocks only": LightNorm(forward=None, backward=None, statistics=None, block=5, chunks=2),
    "statistics only": LightNorm(forward=None, backward=None, block=None),
}


def drawn(seed, shape, dtype=torch.float32, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    gamma, beta = (torch.randn(shape[1], generator=generator, dtype=dtype) for _ in range(2))
    return x * scale + 1, grad * 0.01, gamma, beta


def same(x, y):
    """Equal bits, signs of zeros included; NaN where NaN."""
    nan = y.isnan()
    signs = torch.equal(x.signbit() | nan, y.signbit() | nan)
    return signs and torch.equal(x.isnan(), nan) and torch.equal(x.nan_to_num(), y.nan_to_num())


def check(x, grad, gamma, beta, config, eps=1e-5):
    expected, saved = reference.forward(x, gamma, beta, config, eps)
    y, xhat, mean, s, r, indices = passes.forward(x, gamma, beta, config, eps)
    stats = saved.statistics
    assert same(y, expected)
    assert same(xhat.double(), saved.normalized)
    assert same(mean, stats.mean)
    assert same(s, stats.deviation)
    assert same(r, stats.reciprocal)
    if not mean.isnan().any():
        assert torch.equal(indices, torch.stack([stats.largest, stats.smallest], 2))
    found = passes.backward(grad, xhat, r, gamma, indices, config)
    for one, other in zip(found, reference.backward(grad, saved, config), strict=True):
        assert same(one, other)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 6, 23), (5, 7, 40), (1, 5, 64), (2, 3, 200)])
def test_passes_equal_the_reference(name, dtype, shape):
    check(*drawn(1, shape, dtype), CONFIGS[name])


@settings(max_examples=60)
@given(st.data())
def test_any_values(data):
    config = CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))]
    N, C, P = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9)), data.draw(st.integers(16, 70))
    x, grad, gamma, beta = drawn(
        data.draw(st.integers(0, 999)), (N, C, P), scale=2.0 ** data.draw(st.integers(-20, 12))
    )
    specials = [0.0, -0.0, 1e-40, 63488.0, 65000.0, -1e6, 2.0**-14, 2.0**-14 - 2.0**-30, math.nan, math.inf, -math.inf]
    for target in (x, grad):
        for _ in range(data.draw(st.integers(0, 4))):
            target.view(-1)[data.draw(st.integers(0, target.numel() - 1))] = data.draw(st.sampled_from(specials))
    if data.draw(st.booleans()):
        x[:, 0] = data.draw(st.sampled_from([0.0, 3.0, -1e5]))  # a constant channel
    check(x, grad, gamma, beta, config)


@pytest.mark.parametrize("name", ["default", "fp10", "nearest, subnormals"])
def test_the_reference_against_fractions(name):
    """Sums, means and normalised values of one channel, exactly."""
    config = CONFIGS[name]
    x, _, gamma, beta = drawn(2, (2, 4, 32))
    y, saved = reference.forward(x, gamma, beta, config, 1e-5)
    forward, statistics = config.forward, config.statistics
    assert forward is not None
    assert statistics is not None
    blocks = config.forward_blocks
    x_q = quantize(x, forward) if blocks is None else quantize(quantize(x, forward), blocks)
    for c in range(4):
        values = [Fraction(v) for v in x_q[:, c].flatten().tolist()]
        mean = float(quantize(torch.tensor(float(sum(values) / len(values)), dtype=torch.float64), statistics))
        assert mean == float(saved.statistics.mean[c])
        s = Fraction(0)
        for k, part in enumerate(np.array_split(np.array(values, dtype=object), config.chunks)):
            s += Fraction(factors(64, config.chunks, config.scale)[k]) * (max(part) - min(part))
        s = s / config.chunks + Fraction(1e-5)
        assert float(s) == pytest.approx(float(saved.statistics.deviation[c]), rel=1e-15)
        r = Fraction(float(saved.statistics.reciprocal[c]))
        for value, found in zip(values, saved.normalized[:, c].flatten().tolist(), strict=True):
            rounded = float((value - Fraction(mean)) * r)  # to nearest, as float64 does
            assert float(quantize(torch.tensor(rounded, dtype=torch.float64), forward)) == found
    assert y.dtype == torch.float32


def closed(x, gamma, beta, config, eps):
    """The formulas of the specification, in plain differentiable torch; extrema by first index."""
    N, C, P = x.shape
    flat = x.transpose(0, 1).reshape(C, -1)
    mean, s = flat.mean(1), eps
    for part, factor in zip(
        flat.split(sizes(N * P, config.chunks), 1), factors(N * P, config.chunks, config.scale), strict=True
    ):
        s = s + float(factor) / config.chunks * (part.amax(1) - part.amin(1))
    return gamma[:, None] * (x - mean[:, None]) / s[:, None] + beta[:, None]


@pytest.mark.parametrize("chunks", [1, 3, 8])
@pytest.mark.parametrize("scale", ["gaussian", "paper", "hoffer"])
def test_without_formats_it_is_range_batch_norm(chunks, scale):
    config = LightNorm.range(chunks=chunks, scale=scale)
    x, grad, gamma, beta = drawn(3, (3, 4, 25), torch.float64)
    leaves = [v.clone().requires_grad_() for v in (x, gamma, beta)]
    y = closed(*leaves, config, 1e-5)
    expected = torch.autograd.grad(y, leaves, grad)
    found, xhat, _, _, r, indices = passes.forward(x, gamma, beta, config, 1e-5)
    torch.testing.assert_close(found, y.detach(), rtol=1e-12, atol=1e-12)
    for one, other in zip(passes.backward(grad, xhat, r, gamma, indices, config), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_banner_has_one_chunk():
    x, _, gamma, beta = drawn(4, (2, 3, 50), torch.float64)
    y = passes.forward(x, gamma, beta, CONFIGS["banner"], 1e-5)[0]
    flat = x.transpose(0, 1).flatten(1)
    s = (flat.amax(1) - flat.amin(1)) / math.sqrt(2 * math.log(100)) + 1e-5
    expected = (x - flat.mean(1)[:, None]) / s[:, None] * gamma[:, None] + beta[:, None]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_ties_go_to_the_first_index_and_constant_chunks_cancel():
    x = torch.tensor([1.0, 3.0, 3.0, 1.0, 2.0, 2.0, 2.0, 2.0] * 4).view(1, 1, 32)
    config = LightNorm.range(chunks=8)
    _, xhat, _, _, r, indices = passes.forward(x, torch.ones(1), torch.zeros(1), config, 1e-5)
    assert indices[0].tolist()[:2] == [[1, 0], [4, 4]]
    grad = torch.zeros(1, 1, 32)
    grad[..., 1] = 1.0
    dx = passes.backward(grad, xhat, r, torch.ones(1), indices, config)[0]
    assert dx[0, 0, 4] == dx[0, 0, 5]
    assert dx[0, 0, 0] > dx[0, 0, 3]


def test_the_scale_estimates_sigma_without_bias():
    """E[s] / sigma within 1 % of 1, on Gaussian data, for n from 64 to 65,536."""
    generator = torch.Generator().manual_seed(5)
    for n in (64, 256, 1024, 4096, 65536):
        channels = max(64, (1 << 22) // n)
        x = torch.randn(1, channels, n, generator=generator)
        s = passes.forward(x, torch.ones(channels), torch.zeros(channels), LightNorm.range(), 0.0)[3]
        assert float(s.mean()) == pytest.approx(1, abs=0.01)
        wide = passes.forward(x, torch.ones(channels), torch.zeros(channels), LightNorm.range(scale="paper"), 0.0)[3]
        assert n < 128 or 1.5 < float(wide.mean()) < 1.8  # the specification: 1.5 to 1.8 sigma


def test_gaussian_constants_against_known_values():
    # E[range]: 2 / sqrt(pi) for two samples, 3 / sqrt(pi) for three; the d2 of control charts beyond.
    known = {2: 2 / math.sqrt(math.pi), 3: 3 / math.sqrt(math.pi), 5: 2.32593, 10: 3.07751, 25: 3.93063}
    for m, expected in known.items():
        assert 1 / constant(m, "gaussian") == pytest.approx(expected, abs=2e-5)
    assert constant(100, "hoffer") / constant(100, "paper") == pytest.approx(0.5402083625, abs=1e-9)


@given(st.integers(2, 400), st.integers(1, 60))
def test_chunk_sizes_are_array_splits(n, chunks):
    assert sizes(n, chunks) == [len(part) for part in np.array_split(np.arange(n), chunks)]


def test_results_do_not_depend_on_threads():
    x, grad, gamma, beta = drawn(6, (16, 12, 400))
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        y, xhat, _, _, r, indices = passes.forward(x, gamma, beta, LightNorm(), 1e-5)
        results.append((y, *passes.backward(grad, xhat, r, gamma, indices, LightNorm())))
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
