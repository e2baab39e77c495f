"""The emitted passes equal the reference at the bounds of what makes them exact, and on other processors."""

import functools
import math
import random

import pytest
import torch

from recoup.formats import Float
from recoup.kernels.llvm import Target, host
from recoup.lightnorm import LightNorm, passes, reference
from recoup.lightnorm.fused import emitted
from recoup.lightnorm.fused.build import EXACT, kernel, plain, recipe, single, small_products
from tests.tiers import slow_but

FP10, GRADIENT = Float.parse("fp10_154"), Float.parse("fp10_163")
TARGETS = {level: Target.named(level) for level in ("haswell", "x86-64")}


def same(found, wanted):
    return torch.equal(found.double().nan_to_num(123.5), wanted.double().nan_to_num(123.5))


def check(x, grad, gamma, beta, config, eps=1e-5):
    """Both passes against the reference."""
    y, xhat, mean, s, r, indices = passes.forward(x, gamma, beta, config, eps)
    wanted, saved = reference.forward(x, gamma, beta, config, eps)
    stats = saved.statistics
    pairs = [(y, wanted), (xhat, saved.normalized), (mean, stats.mean), (s, stats.deviation), (r, stats.reciprocal)]
    assert all(same(a, b) for a, b in pairs)
    if bool(x.isfinite().all()):
        assert torch.equal(indices[..., 0], stats.largest)
        assert torch.equal(indices[..., 1], stats.smallest)
    found = passes.backward(grad, xhat, r, gamma, indices, config)
    assert all(same(a, b) for a, b in zip(found, reference.backward(grad, saved, config), strict=True))


def drawn(shape, rnd, generator):
    """Ordinary, widely spread, tied, constant and extreme values."""
    x = torch.randn(shape, generator=generator)
    kind = rnd.randrange(6)
    if kind == 0:
        x = x * torch.exp2(torch.randint(-20, 20, shape, generator=generator).float())
    elif kind == 1:
        x = torch.randint(-2, 3, shape, generator=generator).float()
    elif kind == 2:
        x = torch.full(shape, rnd.choice([0.0, 1.0, 63488.0, 2.0**-14]))
    elif kind == 3:
        x.view(-1)[rnd.randrange(x.numel())] = rnd.choice([63488.0, 63489.0, 2.0**-14 * (1 - 2.0**-24), -0.0, 1e38])
    elif kind == 4:
        x.view(-1)[rnd.randrange(x.numel())] = rnd.choice([math.inf, -math.inf, math.nan])
    return x


def any_unit(rnd):
    """A config, channels and places: what kernels are built for."""
    formats = [None, FP10, GRADIENT, Float.ieee(4, 3, subnormals=False, rounding="zero")]
    config = LightNorm(
        forward=rnd.choice(formats),
        backward=rnd.choice(formats),
        block=rnd.choice([None, 1, 3, 4, 8, 16]),
        chunks=rnd.choice([1, 2, 3, 8]),
        shared=rnd.choice(["outlier", "max"]),
    )
    return config, (rnd.choice([1, 2, 3]), rnd.choice([1, 2, 3, 5, 8, 17]), rnd.choice([16, 17, 31, 64, 100, 257]))


def check_any(units, rnd, generator):
    """So many units, each with three inputs: most of the time goes into building kernels."""
    for _ in range(units):
        config, shape = any_unit(rnd)
        for _ in range(3):
            gamma, beta = (drawn((1, shape[1], 1), rnd, generator).nan_to_num(1, 2, 3).view(-1) for _ in range(2))
            x, grad = drawn(shape, rnd, generator), drawn(shape, rnd, generator) * 2.0 ** rnd.choice([-30, -10, 0, 12])
            check(x, grad, gamma, beta, config)


@pytest.mark.parametrize("seed", slow_but(range(2), range(4)))
def test_any_case_equals_the_reference(seed):
    check_any(6, random.Random(seed), torch.Generator().manual_seed(seed))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_other_processors_give_the_same_bits(target, monkeypatch):
    monkeypatch.setattr(emitted, "kernel", functools.partial(kernel, target=TARGETS[target]))
    monkeypatch.setattr("recoup.lightnorm.fused.build.host", lambda: TARGETS[target])
    recipe.cache_clear()
    emitted.plan.cache_clear()
    try:
        check_any(4, random.Random(7), torch.Generator().manual_seed(7))
    finally:
        recipe.cache_clear()
        emitted.plan.cache_clear()


def test_float64_adds_up_values_of_a_format_exactly_up_to_the_bound():
    # 1-5-4: multiples of 2^-18 below 2^16, 34 bits, so 2^19 of them.
    assert plain(FP10, 1 << 19)
    assert not plain(FP10, (1 << 19) + 1)
    values = torch.full((1 << 19,), 63488.0, dtype=torch.float64)
    values[::2] = 2.0**-14 * (1 + 1 / 16)
    assert float(values.cumsum(0)[-1]) == math.fsum(values.tolist())


def test_a_sum_cut_in_float32_is_that_cut_in_float64():
    # 1-5-4: gamma xhat + beta is a multiple of 2^-36; below 2^16 it has 52 bits.
    assert single(FP10)
    assert FP10.max_exponent + 1 + 2 * (FP10.mantissa - FP10.min_exponent) <= EXACT
    assert not single(GRADIENT)
    x = torch.tensor([[[1.0, -1.0] * 16]]) * (1 - 2.0**-4)
    for gamma in (1.9375, 63488.0, 2.0**-14, -1.0625 * 2.0**-14):
        for beta in (63488.0, -63488.0, 2.0**-14, -(2.0**-14), 0.0):
            vectors = torch.tensor([gamma]), torch.tensor([beta])
            check(x, x * 1e-3, *vectors, LightNorm(block=None, chunks=2))


@pytest.mark.parametrize("grow", [0.5, 1.0, 2.0, 1024.0])
def test_gradients_at_the_bound_of_the_shorter_sum(grow):
    """Just below the bound, at it, and beyond it, where the pass runs again with TwoSum."""
    N, C, P = 2, 4, 64
    config = LightNorm()
    how = recipe(config.backward, config.backward_blocks, torch.float32, C, N * P, stream=False)
    assert how is not None
    assert config.backward is not None
    assert config.forward is not None
    found = small_products(how, config.backward, config.forward, N * P)
    assert found is not None
    exponent = (found[1] >> 23) - 127
    generator = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(N, C, P, generator=generator) for _ in range(2))
    grad = grad.sign() * torch.exp2(torch.randint(-30, 1, grad.shape, generator=generator).float())
    grad[0, :, 0] = 1.875
    check(x, grad * 2.0**exponent * grow, torch.ones(C), torch.zeros(C), config)


def test_results_do_not_depend_on_threads():
    x = torch.randn(4, 8, 4096, generator=torch.Generator().manual_seed(5))
    gamma, beta = torch.ones(8), torch.zeros(8)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y, xhat, _, _, r, indices = passes.forward(x, gamma, beta, LightNorm(), 1e-5)
            found.append([y, xhat, *passes.backward(y, xhat, r, gamma, indices, LightNorm())])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_the_machine_takes_the_emitted_passes():
    assert recipe(FP10, LightNorm().forward_blocks, torch.float32, 16, 1024, stream=False) is not None
    assert host() is not None


@pytest.mark.parametrize("block", [None, 4])
def test_a_top_binade_that_is_incomplete_saturates(block):
    assert FP10.max_exponent == 15
    forward = FP10.replace(largest=40960.0)
    backward = GRADIENT.replace(largest=2.0**GRADIENT.max_exponent * 1.25)
    generator = torch.Generator().manual_seed(11)
    x, grad = (torch.randn(2, 4, 64, generator=generator) for _ in range(2))
    x[0, 0, 0], grad[0, 1, 3] = 60000.0, 2.0**GRADIENT.max_exponent * 1.9
    check(x, grad, torch.ones(4), torch.zeros(4), LightNorm(forward=forward, backward=backward, block=block))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_torch_defaults_are_not_taken(dtype):
    x, grad = (torch.randn(4, 8, 1024, generator=torch.Generator().manual_seed(i)) for i in range(2))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            gamma = torch.ones(8, dtype=torch.float32, device="cpu")
            y, xhat, _, _, r, indices = passes.forward(x, gamma, gamma * 0, LightNorm(), 1e-5)
            found = passes.backward(grad, xhat, r, gamma, indices, LightNorm())
    finally:
        torch.set_default_dtype(before)
    assert [v.dtype for v in (y, xhat, *found)] == [torch.float32] * 5
    check(x, grad, torch.ones(8), torch.zeros(8), LightNorm())
    assert torch.equal(y, passes.forward(x, gamma, gamma * 0, LightNorm(), 1e-5)[0])
