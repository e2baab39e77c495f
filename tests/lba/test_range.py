"""Accumulators that reach further than float32: sums saturate at its largest number, as the reference's do."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from recoup import lba
from recoup.formats import Float
from recoup.lba import LBA, reference

TOP = torch.finfo(torch.float32).max
HUGE = Float(7, -10, 128, False, "zero")


@st.composite
def reaching(draw, least: int = -150):
    """A format whose largest value is about float32's, or far above it."""
    low = draw(st.sampled_from([-150, -126, -100, -60, -10, 0]).filter(lambda e: e >= least))
    high = draw(st.sampled_from([100, 125, 126, 127, 128, 130, 140, 200]))
    rounding = draw(st.sampled_from(["zero", "zero", "nearest"]))
    return Float(
        draw(st.sampled_from([0, 2, 7, 10, 23])), low, high, draw(st.sampled_from([False, False, True])), rounding
    )


units = st.builds(
    LBA,
    product=st.none() | reaching(),
    accumulator=reaching(),
    chunk=st.sampled_from([None, 2, 5]),
    underflow=st.booleans(),
)


def operands(seed: int, scales: tuple[float, float], shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    M, K, N = shape
    a, b = torch.randn(M, K, generator=random), torch.randn(K, N, generator=random)
    return (a.double() * scales[0]).clamp(-TOP, TOP).float(), (b.double() * scales[1]).clamp(-TOP, TOP).float()


SCALES = st.sampled_from([3e38, 1e38, 1e20, 1e10, 1.0, 1e-10, 1e-20, 1e-38, 1e-44])


def test_an_infinite_product_whose_exact_value_saturates():
    a, b = torch.tensor([[3e38, 3e38]]), torch.tensor([[1e10], [1e10]])
    assert lba.matmul(a, b, LBA(product=None, accumulator=HUGE, chunk=None)).item() == TOP
    assert lba.matmul(-a, b, LBA(product=None, accumulator=HUGE, chunk=None)).item() == -TOP


@settings(max_examples=150)
@given(units, st.integers(0, 2**31), st.tuples(SCALES, SCALES), st.sampled_from([(1, 2, 1), (3, 7, 20), (17, 11, 2)]))
def test_products_equal_the_reference(config, seed, scales, shape):
    a, b = operands(seed, scales, shape)
    assert torch.equal(lba.matmul(a, b, config), reference.matmul(a, b, config))


@settings(max_examples=30)
@given(units, st.integers(0, 2**31), st.tuples(SCALES, SCALES))
def test_convolutions_equal_the_reference(config, seed, scales):
    x, w = operands(seed, scales, (2 * 3, 20, 4 * 12))
    x, w = x.view(2, 3, 4, 5), w[:1].view(4, 3, 2, 2)
    y = lba.ops.convolution(x, w, config.code, [1, 1], [1, 0], [1, 1], 1, 0, "layer")
    columns = F.unfold(x, 2, padding=(1, 0))
    expected = [reference.matmul(w.flatten(1), columns[n], config) for n in range(2)]
    assert torch.equal(y.flatten(2), torch.stack(expected))


@pytest.mark.parametrize("gradient", ["recursive_of", "immediate_of", "immediate_diff", "recursive_diff"])
def test_indicators_know_that_huge_sums_overflow(gradient):
    config = LBA(product=None, accumulator=HUGE, chunk=None, gradient=gradient)
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, shape, generator=random) * 2.0**61 for shape in ((4, 6), (6, 5)))
    x, w = a.clone().requires_grad_(), b.clone().requires_grad_()
    lba.matmul(x, w, config).backward(torch.ones(4, 5))
    expected = reference.gradients(a, b, torch.ones(4, 5), config)
    for found, wanted in zip((x.grad, w.grad), expected, strict=True):
        assert torch.equal(found.double(), wanted)
