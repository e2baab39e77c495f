"""Passes and reference against a second definition in Python's numbers, for every option; the blocks' axis."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from recoup.errors import RecoupError
from recoup.formats import Float
from recoup.lightnorm import LightNorm, LightNorm1d, LightNorm2d, layout, passes, reference
from recoup.lightnorm.cost import block_bits, traffic, widths
from recoup.lightnorm.scale import factors
from recoup.study.configs import parse_config
from tests.lightnorm.model import Model

PLACES = LightNorm(axis="place")
NEAREST = {
    "forward": Float.parse("bfloat16"),
    "backward": Float.parse("e5m2"),
    "statistics": Float.parse("float32"),
}
CONFIGS = {
    "default": LightNorm(),
    "places": PLACES,
    "places, max, three": LightNorm(block=3, shared="max", axis="place", chunks=3, scale="paper"),
    "places, nearest": LightNorm(block=5, axis="place", chunks=2, scale="hoffer", **NEAREST),
    "places, no format": LightNorm(forward=None, backward=None, block=8, axis="place", chunks=1),
    "channels, nearest": LightNorm(block=3, chunks=2, **NEAREST),
    "no blocks": LightNorm.fp10(axis="place"),
    "range": LightNorm.range(chunks=5),
}


def drawn(seed, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    gamma, beta = (torch.randn(shape[1], generator=generator, dtype=torch.float64) for _ in range(2))
    return (v.to(dtype) for v in (x * 3 + 0.5, grad * 0.02, gamma, beta))


def assert_same(found, expected):
    """Equal bits, signs of zeros included."""
    found, expected = (np.asarray(v, np.float64) for v in (found, expected))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


def check(x, grad, gamma, beta, config, eps=1e-5):
    """Passes, reference and model: every bit."""
    N, P = x.shape[0], x.shape[2]
    C_K = factors(N * P, config.chunks, config.scale).tolist()
    vectors = gamma.tolist(), beta.tolist()
    model = Model(x.double().numpy(), *vectors, config, eps, x.dtype == torch.float32, C_K)
    y, xhat, mean, s, r, indices = passes.forward(x, gamma, beta, config, eps)
    slow, saved = reference.forward(x, gamma, beta, config, eps)
    for expected, found in (
        (model.y, (y, slow)),
        (model.xhat, (xhat, saved.normalized)),
        (model.mean, (mean, saved.statistics.mean)),
        (model.s, (s, saved.statistics.deviation)),
        (model.r, (r, saved.statistics.reciprocal)),
        (model.high, (indices[..., 0], saved.statistics.largest)),
        (model.low, (indices[..., 1], saved.statistics.smallest)),
    ):
        for one in found:
            assert_same(one.numpy(), expected)
    expected = model.backward(grad.double().numpy())
    for found in (
        passes.backward(grad, xhat, r, gamma, indices, config),
        reference.backward(grad, saved, config),
    ):
        for one, other in zip(found, expected, strict=True):
            assert_same(one.numpy(), other.astype(one.numpy().dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_bit_of_a_step(name, dtype):
    for seed, shape in enumerate([(3, 5, 7), (2, 3, 18), (1, 2, 37), (19, 2, 1), (4, 1, 4)]):
        check(*drawn(seed, shape, dtype), CONFIGS[name])


@settings(max_examples=40)
@given(st.data())
def test_any_shape_and_options(data):
    N, C, P = (data.draw(st.integers(1, most)) for most in (5, 6, 21))
    formats = data.draw(st.sampled_from([{}, NEAREST, {"forward": None}, {"backward": None}, {"statistics": None}]))
    config = LightNorm(
        block=data.draw(st.integers(1, 24)),
        chunks=data.draw(st.integers(1, max(1, N * P // 2))),
        shared=data.draw(st.sampled_from(["outlier", "max"])),
        axis=data.draw(st.sampled_from(["channel", "place"])),
        **formats,
    )
    if N * P < 2:
        return
    x, grad, gamma, beta = drawn(data.draw(st.integers(0, 99)), (N, C, P))
    edges = [0.0, -0.0, 1e-40, 65000.0, -1e6, 2.0**-14, -(2.0**-16), 1.0, 1.5, -1.0]
    for target in (x, grad):
        for _ in range(data.draw(st.integers(0, 6))):
            target.view(-1)[data.draw(st.integers(0, target.numel() - 1))] = data.draw(st.sampled_from(edges))
    check(x, grad, gamma, beta, config)


@pytest.mark.parametrize("name", CONFIGS)
def test_evaluation(name):
    config = CONFIGS[name]
    for shape in [(3, 5, 7), (2, 3, 18), (6, 2, 1)]:
        x, _, gamma, beta = drawn(3, shape)
        mean, var = torch.randn(shape[1]), torch.rand(shape[1]) + 0.1
        y, xhat, r = passes.infer(x, gamma, beta, mean, var, config, 1e-5)
        slow, saved = reference.infer(x, gamma, beta, mean, var, config, 1e-5)
        assert torch.equal(y, slow)
        assert torch.equal(xhat.double(), saved.normalized)
        none = torch.empty(shape[1], 0, 2, dtype=torch.int64)
        found = passes.backward(x, xhat, r, gamma, none, config)
        assert all(map(torch.equal, found, reference.backward(x, saved, config)))


def test_a_constant_chunk_leaves_the_signs_of_zeros():
    """Maximum and minimum are one element there, and its terms are not added at all: -0 stays -0."""
    x, grad, gamma, beta = drawn(4, (1, 1, 32))
    x[..., :8] = 1.0
    grad[:], gamma[:] = 0.0, -1.0
    check(x, grad, gamma, beta, LightNorm.fp10(chunks=4))


@pytest.mark.parametrize("shape", [(6, 3, 5), (2, 3, 4, 5), (3, 3, 1), (9, 3)])
def test_blocks_of_places_end_with_their_sample(shape):
    """A layer's result for a sample does not depend on its neighbours in the batch, few places or many."""
    layer = LightNorm2d if len(shape) == 4 else LightNorm1d
    unit = layer(3, config=LightNorm(block=4, axis="place", chunks=1)).eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4
    y = unit(x)
    assert torch.equal(y, torch.cat([unit(sample) for sample in x.split(1)]))
    assert torch.equal(unit.double()(x.double()).float(), y)
    merged = layout.flattened(x, unit.config)
    assert merged.shape == layout.flattened_shape(x.shape, unit.config) == (shape[0], 3, int(np.prod(shape[2:])))
    assert torch.equal(layout.unflattened(merged, x.shape), x)


def names(found):
    return [type(way).__name__ for way in found]


def test_places_run_apart_from_the_fused_passes():
    x = torch.zeros(3, 4, 20)
    assert names(passes.passes_for(x, PLACES, 8)) == ["SeparatePasses"]
    for config in (LightNorm(), LightNorm.fp10(axis="place")):
        assert names(passes.passes_for(x, config, 8)) == ["EmittedPasses", "GeneralPasses", "SeparatePasses"]
    assert names(passes.passes_for(x.double(), LightNorm(), 8)) == ["GeneralPasses", "SeparatePasses"]


def test_layers_with_blocks_of_places():
    unit = LightNorm2d(6, config=LightNorm(block=8, axis="place"))
    x = (torch.randn(5, 6, 3, 3) * 2).requires_grad_()
    y = unit(x)
    y.backward(torch.randn_like(y) * 0.1)
    slow, saved = reference.forward(x.detach().flatten(2), unit.weight, unit.bias, unit.config, unit.eps)
    assert torch.equal(y.flatten(2), slow)
    assert unit.running_mean is not None
    assert x.grad is not None
    arguments = (x, torch.ones(6), torch.zeros(6), unit.config.code, 1e-5, "layer")
    torch.library.opcheck(torch.ops.recoup.lightnorm_train.default, arguments)
    compiled = torch.compile(copy.deepcopy(unit), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), y)
    last = unit(x.detach().contiguous(memory_format=torch.channels_last))
    assert torch.equal(last, y)
    assert saved.normalized.shape == (5, 6, 9)


def test_the_axis_travels():
    config = LightNorm(block=8, axis="place")
    assert repr(config) == "LightNorm(block=8, axis='place')"
    assert eval(repr(config), {"LightNorm": LightNorm}) == config  # noqa: S307
    assert LightNorm.from_dict(config.to_dict()) == LightNorm.from_code(config.code) == config
    assert config != LightNorm(block=8)
    assert LightNorm.from_dict({"block": 8}).axis == "channel"  # what was stored before there was a choice
    assert parse_config(repr(config)) == config
    assert "axis='place'" in repr(LightNorm2d(3, config=config))
    blocks, others = config.forward_blocks, config.backward_blocks
    assert blocks is not None
    assert others is not None
    assert (blocks.dim, others.dim) == (2, 2)
    for wrong in ("pixel", None, 1):
        with pytest.raises(RecoupError, match=r"LightNorm\(axis=.*axis must be one of 'channel', 'place'"):
            LightNorm(axis=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        LightNorm(None, None, None, 4, 8, "gaussian", "max", "error", "place")  # type: ignore[misc] # keyword only


def test_cost_of_ragged_places():
    config = LightNorm(block=4, shared="max", axis="place")
    assert widths(config) == widths(config.replace(axis="channel"))
    assert widths(config, 3, places=8).blocks == 48.5
    ragged = widths(config, 3, places=9).blocks  # three exponents for nine elements
    assert ragged == pytest.approx(4 * (6 + 5 * 3 / 9) + 3 * (5 + 6 * 3 / 9), rel=1e-15)
    assert block_bits(config.forward_blocks, config.forward, 9) == pytest.approx(6 + 5 / 3, rel=1e-15)
    rows = traffic(nn.Sequential(nn.BatchNorm2d(5)), torch.zeros(2, 5, 3, 3), config).layers
    assert rows[0].blocks == 2 * 5 * (4 * (9 * 6 + 3 * 5) + 3 * (9 * 5 + 3 * 6))
    alone = traffic(nn.Sequential(nn.BatchNorm1d(5)), torch.zeros(2, 5), config).layers
    assert alone[0].blocks == 2 * 5 * (4 * (6 + 5) + 3 * (5 + 6))
    with pytest.raises(RecoupError, match="1 place or more"):
        widths(config, places=0)
