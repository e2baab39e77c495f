import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recoup.errors import RecoupError
from recoup.formats import Int
from recoup.lba import FP8, quantize_operand


@given(st.integers(-60, 60), st.integers(0, 2**31))
def test_fp8_is_the_nearest_value_of_the_shifted_format(exponent, seed):
    x = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    y, scale = quantize_operand(x, FP8)
    assert scale is None
    factor = 2.0 ** math.ceil(4 - math.log2(float(x.abs().max().double())))
    values = sorted({s * v for v in FP8.values() for s in (1, -1)})
    for before, after in zip(x.tolist(), y.tolist(), strict=True):
        shifted = before * factor
        nearest = min(abs(shifted - v) for v in values)
        if abs(shifted) >= FP8.smallest_normal:
            assert abs(shifted - after * factor) == nearest
        else:
            assert after == 0
    largest = float(x.abs().max()) * factor
    assert 16 <= largest < 32


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_are_symmetric(bits):
    x = torch.randn(100)
    codes, scale = quantize_operand(x, Int(bits))
    assert scale is not None
    top = 2 ** (bits - 1) - 1
    assert float(codes.abs().max()) == top
    assert torch.equal(codes, codes.round())
    assert float((codes * scale - x).abs().max()) <= float(scale) * 0.5001


def test_gradients_pass_straight_through():
    x = torch.randn(20, requires_grad=True)
    quantize_operand(x, FP8)[0].sum().backward()
    assert torch.equal(x.grad, torch.ones(20))
    x = torch.randn(20, requires_grad=True)
    codes, scale = quantize_operand(x, Int(8))
    assert scale is not None
    (codes * scale).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(20))  # divided and multiplied by the scale


@pytest.mark.parametrize("format", [FP8, Int(8)])
def test_zeros_and_nothing(format):  # noqa: A002
    for x in (torch.zeros(3), torch.zeros(0)):
        assert torch.equal(quantize_operand(x, format)[0], x)


@pytest.mark.parametrize("format", [FP8, Int(8)])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_and_scales_nothing(format, value):  # noqa: A002
    x = torch.randn(40)
    x[7] = 0
    expected, scale = quantize_operand(x, format)
    x[7] = expected[7] = value
    y, same = quantize_operand(x, format)
    assert torch.equal(y.nan_to_num(9e9), expected.nan_to_num(9e9))
    assert scale == same


def test_other_formats_are_refused():
    with pytest.raises(RecoupError, match=r"quantize_operand: format must be a Float or an Int; got 'fp8'"):
        quantize_operand(torch.ones(3), "fp8")  # type: ignore[arg-type]


def test_negative_numbers_have_no_unsigned_codes():
    with pytest.raises(RecoupError, match=r"x \[3\] is negative, down to -2, and .* has no sign"):
        quantize_operand(torch.tensor([1.0, -2.0, 0.0]), Int(8, signed=False))
    codes, scale = quantize_operand(torch.tensor([255.0, -0.0, 25.5]), Int(8, signed=False))
    assert codes.tolist() == [255, 0, 26]  # 25.5 to even
    assert scale == 1


@pytest.mark.parametrize("largest", [0, -1.0, math.inf, math.nan, "1", True])
def test_what_is_no_largest_magnitude(largest):
    with pytest.raises(RecoupError, match="largest must be a number above 0"):
        quantize_operand(torch.ones(3), Int(8), largest=largest)
    with pytest.raises(RecoupError, match="of the whole tensor"):
        quantize_operand(torch.ones(3, 2), Int(8), (1,), largest=1.0)


@pytest.mark.parametrize("format", [FP8, Int(4), Int(8)])
@pytest.mark.parametrize("dims", [(1, 2, 3), (-1, -2, 1), (0,), (0, 1, 2, 3)])
def test_slices_have_scales_of_their_own(format, dims):  # noqa: A002
    x = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    x *= 2.0 ** torch.arange(-6, 4, 2)[:, None, None, None]
    x[1] = 0
    y, scale = quantize_operand(x, format, dims)
    inside = {d % 4 for d in dims}
    for index in itertools.product(*(range(1 if d in inside else n) for d, n in enumerate(x.shape))):
        part = tuple(slice(None) if d in inside else slice(i, i + 1) for d, i in enumerate(index))
        alone, own = quantize_operand(x[part], format)
        assert torch.equal(y[part], alone)
        assert scale is None or torch.equal(scale[index], own)
    assert scale is None or scale.shape == tuple(1 if d in inside else n for d, n in enumerate(x.shape))


def test_slices_of_nothing():
    y, scale = quantize_operand(torch.zeros(3, 0), Int(4), (1,))
    assert (y.shape, scale.shape) == ((3, 0), (3, 1))


@pytest.mark.parametrize("dims", [(2,), 1, (0, 0), (0, -2), ("x",), ()])
def test_dims_that_are_not_there(dims):
    with pytest.raises(
        RecoupError, match=r"quantize_operand\(dims=.*\): dims must be a tuple of dimensions of \[3, 4\]"
    ):
        quantize_operand(torch.ones(3, 4), FP8, dims)


def test_a_slice_too_small_for_its_scale():
    x = torch.ones(2, 4)
    x[1] = 1e-38
    codes, scale = quantize_operand(x, Int(8), (1,))
    assert codes.tolist() == [[127.0] * 4, [0.0] * 4]
    assert scale is not None
    assert scale[1] == 1
