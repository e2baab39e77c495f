"""The bound is what the worst inputs reach, and no unit's sums leave it."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import recoup as rc
from recoup import lba
from recoup.errors import RecoupError
from recoup.formats import Float, Int
from recoup.lba import FP8, LBA, reference
from tests.lba.strategies import others, truncating

RANGES = st.sampled_from([(0.0, 6.0), (-1.0, 1.0), (-3.0, 0.5), (1.0, 2.0), (-2.0, -1.0), (0.0, 0.0), (-0.1, 0.3)])


def linear(weight, config):
    layer = lba.LBALinear(weight.shape[1], weight.shape[0], bias=False, config=config)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def float32_inside(low, high):
    return [float(torch.tensor(x)) for x in (low, high) if low <= float(torch.tensor(x)) <= high]


@given(RANGES, st.integers(0, 2**31), st.integers(1, 6))
def test_the_bound_is_the_largest_of_all_corners(ends, seed, K):
    weight = torch.randn(3, K, generator=torch.Generator().manual_seed(seed))
    found = lba.bound(linear(weight, LBA()), ends)
    corners = sorted({0.0, *(lba.bounds._below(abs(end)) * math.copysign(1, end) for end in ends)})
    for o in range(3):
        sums = [
            sum(Fraction(float(w)) * Fraction(x) for w, x in zip(weight[o], xs, strict=True))
            for xs in itertools.product(corners, repeat=K)
        ]
        assert found.sums[o] == float(max(map(abs, sums)))
    assert found.largest == max(found.sums)
    assert found.growth == 1


def worst(layer, ends):
    """Inputs that reach the ends of each channel, and random ones."""
    weight = layer.matrix.detach()
    low, high = ends
    up = torch.where(weight > 0, high, low)
    down = torch.where(weight > 0, low, high)
    drawn = torch.rand(40, weight.shape[1]) * (high - low) + low
    return torch.cat([up, down, drawn, torch.where(torch.rand_like(drawn) < 0.5, low, high)])


@settings(max_examples=60)
@given(st.data())
def test_no_step_of_a_unit_leaves_the_bound(data):
    config = data.draw(truncating() | others())
    ends = data.draw(st.sampled_from([(0.0, 4.0), (-1.0, 1.0), (-2.0, 0.5)]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    weight = torch.randn(4, data.draw(st.integers(1, 30)), generator=generator) * 2.0 ** data.draw(st.integers(-6, 2))
    layer = linear(weight, config)
    found = lba.bound(layer, ends)
    whole = isinstance(config.accumulator, Int)
    for step in reference.steps(worst(layer, ends), weight.t(), config):
        if not whole:
            assert bool((step.after.abs() <= torch.tensor(found.sums, dtype=torch.float64) * (1 + 1e-12)).all())
        if found.cannot_saturate and whole:
            assert not bool(step.overflow.any())
            assert step.outer or not bool(step.saturated.any())
        elif found.cannot_saturate:
            assert not bool((step.after.abs() > found.limit).any())


@given(st.integers(2, 8), st.integers(2, 8), st.booleans(), st.integers(1, 200), st.integers(0, 2**31))
def test_bits_of_integers_are_the_fewest_that_hold_the_worst_sums(w_bits, x_bits, signed, K, seed):
    generator = torch.Generator().manual_seed(seed)
    top = 2 ** (w_bits - 1) - 1
    weight = torch.randint(-top, top + 1, (3, K), generator=generator).float()
    ends = (-(2 ** (x_bits - 1)), 2 ** (x_bits - 1) - 1) if signed else (0, 2**x_bits - 1)
    found = lba.bound(linear(weight, LBA.int12()), ends)
    layer = linear(weight, LBA.int12())
    x = worst(layer, tuple(map(float, ends)))[:6]
    sums = (x.double() @ weight.double().t()).flatten()
    low, high = min(0.0, float(sums.min())), max(0.0, float(sums.max()))
    fewest = next(b for b in range(2, 40) if -(2 ** (b - 1)) <= low and high <= 2 ** (b - 1) - 1)
    assert found.bits == fewest
    assert found.cannot_saturate == (fewest <= 12)
    assert found.limit == 2048


def test_integer_operands_count_codes():
    """A2Q: the l1 norm of the weight's codes times the largest activation code."""
    weight = torch.tensor([[3.0, -7.0, 1.5], [0.0, 0.75, 0.5]])
    codes, _ = lba.quantize_operand(weight, Int(4))
    layer = linear(weight, LBA.int16(operands=Int(4)))
    assert lba.bound(layer, (-0.3, 5.0)).sums == tuple((codes.abs().sum(1) * 7).tolist())
    positive = lba.bound(layer, (0.0, 5.0))
    assert positive.sums == (7.0 * 7, 7.0)
    assert positive.bits == 7
    assert lba.bound(layer, (-1.0, 0.0)).sums == positive.sums


def test_rounding_to_nearest_adds_what_the_page_says():
    plain, nearest = Float.lba(4, 7, bias=10), Float.lba(4, 7, bias=10, rounding="nearest")
    weight = torch.ones(1, 32)
    assert lba.bound(linear(weight, LBA(plain, plain, 16)), (0.0, 1.0)).sums == (32.0,)
    found = lba.bound(linear(weight, LBA(nearest, nearest, 16)), (0.0, 1.0))
    assert found.growth == pytest.approx((1 + 2**-8) ** (1 + 16 + 2), rel=1e-12)
    assert found.sums[0] == pytest.approx(32 * found.growth, rel=1e-9)
    assert lba.bound(linear(weight, LBA(plain, plain, operands=FP8)), (0.0, 1.0)).sums[0] == pytest.approx(33.0)


def test_chunks_promotion_and_products_have_limits_of_their_own():
    small, large = Float.lba(3, 4, bias=4), Float.parse("float32")  # 15.5
    weight = torch.ones(1, 64)
    assert not lba.bound(linear(weight, LBA(None, small, 8)), (0.0, 1.0)).cannot_saturate
    promoted = lba.bound(linear(weight, LBA(None, small, 8, promotion=large)), (0.0, 1.0))
    assert promoted.cannot_saturate
    assert promoted.limit == large.largest_value
    assert not lba.bound(linear(weight, LBA(None, small, 16, promotion=large)), (0.0, 1.0)).cannot_saturate
    tight = LBA(Float.lba(3, 4, bias=8), Float.lba(4, 7, bias=8))
    assert not lba.bound(linear(torch.ones(1, 2), tight), (0.0, 1.0)).cannot_saturate  # a product of 0.97 at most
    assert lba.bound(linear(torch.ones(1, 2), tight), (0.0, 0.5)).cannot_saturate


def test_the_shift_moves_the_limit():
    layer = linear(torch.ones(1, 100), LBA())
    assert not lba.bound(layer, (0.0, 1.0)).cannot_saturate
    layer.shift = -1
    found = lba.bound(layer, (0.0, 1.0))
    assert (found.cannot_saturate, found.limit, found.sums) == (True, 127.5, (100.0,))


@pytest.mark.parametrize("groups", [1, 2])
def test_padding_is_an_input_of_zero(groups):
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=groups, bias=False)
    model = rc.emulate_(nn.Sequential(conv), LBA.fp32(product=None))
    found = lba.bound(model[0], (1.0, 2.0))
    weight = conv.weight.detach().flatten(1).double()
    expected = torch.maximum(weight.clamp(min=0).sum(1), -weight.clamp(max=0).sum(1)) * 2
    assert torch.tensor(found.sums, dtype=torch.float64) == pytest.approx(expected, rel=1e-3)
    with torch.no_grad():
        y = model(torch.rand(3, 4, 7, 7) + 1).transpose(0, 1).flatten(1).abs().amax(1)
    assert bool((y <= torch.tensor(found.sums)).all())


def test_repr():
    found = lba.bound(linear(torch.ones(1, 10), LBA()), (0.0, 1.0))
    assert repr(found) == "Bound(LBALinear: |sum| <= 10 of 63.75, cannot saturate)"
    wraps = lba.bound(linear(torch.ones(1, 10), LBA.int12("wrap")), (-500, 500))
    assert repr(wraps) == "Bound(LBALinear: |sum| <= 5000 of 2048, may saturate, cannot overflow 14 bits or more)"


def test_bad_input():
    layer = linear(torch.ones(2, 3), LBA())
    for ends in [(1.0, 0.0), (0.0,), 3.0, (0.0, math.inf), (math.nan, 1.0), ("a", "b"), None]:
        with pytest.raises(RecoupError, match=r"^lba\.bound\(input_range=.*must be two numbers \(low, high\)"):
            lba.bound(layer, ends)  # type: ignore[arg-type]
    with pytest.raises(RecoupError, match=r"^lba\.bound: layer must be a layer on a narrow accumulator.*got Linear$"):
        lba.bound(nn.Linear(2, 2), (0.0, 1.0))
    with torch.no_grad():
        layer.weight[1, 2] = math.nan
    with pytest.raises(
        RecoupError, match=r"^layer .LBALinear. .*: lba\.bound: the weight holds 1 NaN or infinite values$"
    ):
        lba.bound(layer, (0.0, 1.0))


def test_transformers_conv1d():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = rc.emulate_(nn.Sequential(Conv1D(3, 5)), LBA())
    found = lba.bound(model[0], (-1.0, 1.0))
    assert found.sums == pytest.approx(model[0].weight.detach().abs().sum(0).tolist())
