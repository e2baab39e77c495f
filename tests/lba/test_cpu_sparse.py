"""Products that leave zeros out, against those that do not, and against the reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recoup import lba
from recoup.formats import Float
from recoup.kernels.llvm import host
from recoup.lba import LBA, cpu, cpu_sparse, driver, reference
from recoup.lba.ops import convolution
from tests.lba.strategies import truncating

pytestmark = pytest.mark.skipif("avx512f" not in host().features, reason="no AVX-512 here")


def operands(seed, M, K, N, filled, spread):
    """Rows and columns, of which so many elements are not zero; ``spread``: octaves of their magnitudes."""
    random = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*shape, generator=random) for shape in ((M, K), (K, N)))
    a, b = (x * 2.0 ** torch.randint(-spread, 1, x.shape, generator=random) for x in (a, b))
    return a, b.clamp_min(0) if filled == 0.5 else b * (torch.rand(b.shape, generator=random) < filled)


@pytest.fixture
def calls(monkeypatch):
    """One for every product that leaves zeros out."""
    made = []
    product = cpu_sparse.product
    monkeypatch.setattr(cpu_sparse, "product", lambda *args: made.append(1) or product(*args))
    return made


def dense(a, b, config):
    """Without them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_sparse, "pays", lambda *_: False)
        return lba.matmul(a, b, config)


@settings(max_examples=12, deadline=None)
@given(
    config=truncating(),
    chunk=st.sampled_from([16, 32, 48, None]),
    M=st.sampled_from([1, 12, 16, 33, 64, 70]),
    K=st.sampled_from([16, 32, 144, 160]),
    N=st.sampled_from([1, 16, 50]),
    filled=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    spread=st.sampled_from([0, 12]),
    seed=st.integers(0, 2**31),
)
def test_products_equal_those_with_zeros_and_the_reference(config, chunk, M, K, N, filled, spread, seed):
    config = config.replace(chunk=chunk)
    a, b = operands(seed, M, K, N, filled, spread)
    expected = dense(a, b, config)
    with pytest.MonkeyPatch.context() as patch:

        def pays(x, columns, chosen, config):
            chunk = min(config.chunk or x.shape[2], x.shape[2])
            return len(x) == 1 and cpu_sparse.takes(chosen.form, cpu.current_target(), x.shape[2], chunk)

        patch.setattr(cpu_sparse, "pays", pays)
        found = lba.matmul(a, b, config)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))  # the signs of zeros too
    assert torch.equal(found, reference.matmul(a, b, config))


@pytest.mark.parametrize("config", [LBA(), LBA(product=None), LBA(Float.lba(4, 3, 5), Float.lba(4, 3, 5))])
def test_convolutions_behind_a_relu_leave_zeros_out(config, calls):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 32, 9, 9, generator=random).mul(20).clamp_min(4).sub(4)
    weight = torch.randn(32, 32, 3, 3, generator=random)
    arguments = (config.code, [1, 1], [1, 1], [1, 1], 1, 0, "a layer")
    found = convolution(x, weight, *arguments)
    assert calls
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_sparse, "pays", lambda *_: False)
        assert torch.equal(found, convolution(x, weight, *arguments))


@pytest.mark.parametrize("outputs", [16, 80, 128, 20])
@pytest.mark.parametrize(("size", "stride"), [(8, 1), (9, 2), (8, 2)])  # 64, 25 and 16 pixels an image
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sums_lie_image_by_image(outputs, size, stride, layout, calls, monkeypatch):
    """Written there where panels and blocks are filled, else copied; from image blocks that do not divide the batch."""
    random = torch.Generator().manual_seed(outputs)
    x = torch.randn(19, 16, size, size, generator=random).relu().contiguous(memory_format=layout)
    weight = torch.randn(outputs, 16, 3, 3, generator=random)
    monkeypatch.setattr(driver, "IMAGE_BYTES", 4 * 8 * x[0].numel())
    monkeypatch.setattr(cpu_sparse.torch, "get_num_threads", lambda: 1)  # or there would be too few columns
    arguments = (LBA().code, [stride] * 2, [1, 1], [1, 1], 1, 0, "a layer")
    found = convolution(x, weight, *arguments)
    assert bool(calls) == (outputs != 20)
    monkeypatch.setattr(cpu_sparse, "pays", lambda *_: False)
    assert torch.equal(found, convolution(x, weight, *arguments))
    assert found.is_contiguous(memory_format=layout)


def test_columns_of_one_group_may_hold_few_terms_and_many():
    """Those that are through wait for the others with products of zero."""
    random = torch.Generator().manual_seed(5)
    a, b = torch.randn(16, 160, generator=random), torch.randn(160, 64, generator=random)
    b[:, ::4], b[:, 1::4], b[16:48, 2::4] = 0, b[:, 1::4] * (torch.rand(160, 16, generator=random) < 0.2), 0
    found = lba.matmul(a, b, LBA())
    assert torch.equal(found, reference.matmul(a, b, LBA()))


@pytest.mark.parametrize(
    ("config", "M", "filled", "used"),
    [
        (LBA(), 32, 0.3, True),
        (LBA(), 32, 1.0, False),  # nothing to leave out
        (LBA(), 18, 0.3, False),  # lanes without rows
        (LBA(chunk=8), 32, 0.3, False),
        (LBA(product=None, accumulator=Float.lba(4, 7, 10, rounding="nearest")), 32, 0.3, False),
    ],
)
def test_where_it_pays(config, M, filled, used, calls):
    a, b = operands(1, M, 288, 512, filled, 0)
    assert torch.equal(lba.matmul(a, b, config), reference.matmul(a, b, config))
    assert bool(calls) == used


@pytest.mark.parametrize("shape", [(1, 2048, 1024), (1, 100, 5000), (3, 64, 56, 56), (200, 16, 8, 8), (1, 7, 3)])
def test_zeros_are_counted_in_a_sample(shape):
    """A pass over all of a large operand took a tenth of its product's time."""
    found = cpu_sparse._few(torch.empty(shape, device="meta"))
    assert min(cpu_sparse.SAMPLE, math.prod(shape)) // 2 < found.numel() <= cpu_sparse.SAMPLE
    source = torch.zeros(1, 64, 4096)
    source[:, 20:] = 1  # which the first rows do not show
    assert cpu_sparse._few(source).float().mean() > 0.6


def test_infinities_and_nan_meet_zeros_as_before():
    a, b = operands(2, 16, 144, 512, 0.3, 0)
    b[3, 5], b[4, 6], a[2, 7] = torch.inf, torch.nan, torch.inf
    config = LBA(nonfinite="propagate")
    found, expected = lba.matmul(a, b, config), dense(a, b, config)
    assert found.isnan().any()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
