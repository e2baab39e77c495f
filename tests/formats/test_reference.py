"""The reference against ml_dtypes, gfloat and exact fractions."""

# ruff: noqa: A001, A002 - format is the word of the contract and of the field

import math

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recoup.formats import BlockFloat, Float, Int
from recoup.formats.reference import quantize
from tests.formats import oracle
from tests.formats.inputs import (
    assert_same_bits,
    bfloat16_neighbourhoods,
    block_floats,
    float16_patterns,
    ints,
    numbers_near,
    random_for,
    small_floats,
)

ML_DTYPES = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3": ml_dtypes.float8_e4m3,
    "e3m4": ml_dtypes.float8_e3m4,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz,
    "e3m2fn": ml_dtypes.float6_e3m2fn,
    "e2m3fn": ml_dtypes.float6_e2m3fn,
    "e2m1fn": ml_dtypes.float4_e2m1fn,
}
WITH_INFINITY = ("bfloat16", "float16", "e5m2", "e4m3", "e3m4")


def through_ml_dtypes(x: Tensor, name: str) -> Tensor:
    with np.errstate(all="ignore"):  # ml_dtypes warns where it overflows
        return torch.from_numpy(x.numpy().astype(ML_DTYPES[name]).astype(x.numpy().dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_bit_pattern_saturates_like_ml_dtypes(name: str, dtype: torch.dtype) -> None:
    x = float16_patterns()
    x = x.double() if dtype == torch.float64 else torch.cat([x, bfloat16_neighbourhoods()])
    x = x[~x.isnan()]
    format = Float.parse(name)
    top = format.largest_value
    expected = through_ml_dtypes(x.clamp(-top, top), name)
    if name.endswith("fnuz"):  # these have no negative zero, ours keeps x's sign
        expected = expected.abs().copysign(x)
    assert_same_bits(quantize(x, format), expected)


@pytest.mark.parametrize("name", WITH_INFINITY)
def test_every_bit_pattern_overflows_like_ml_dtypes(name: str) -> None:
    x = torch.cat([float16_patterns(), bfloat16_neighbourhoods()])
    assert_same_bits(quantize(x, Float.parse(name).replace(overflow="inf")), through_ml_dtypes(x, name))


def test_an_incomplete_top_binade_overflows_from_half_an_ulp_on() -> None:
    x = torch.tensor([448.0, 463.9, 464.0, 480.0, -464.0])  # ml_dtypes rounds the tie, 464, down to 448
    expected = torch.tensor([448.0, 448.0, torch.inf, torch.inf, -torch.inf])
    assert_same_bits(quantize(x, Float.parse("e4m3fn").replace(overflow="inf")), expected)


@pytest.mark.parametrize(
    ("name", "info"),
    [
        ("e5m2", gfloat.formats.format_info_ocp_e5m2),
        ("e4m3fn", gfloat.formats.format_info_ocp_e4m3),
        ("e2m3fn", gfloat.formats.format_info_ocp_e2m3),
        ("float16", gfloat.formats.format_info_binary16),
    ],
)
@pytest.mark.parametrize("rounding", ["nearest", "zero"])
def test_saturating_rounding_like_gfloat(name: str, info: gfloat.FormatInfo, rounding: str) -> None:
    mode = {"nearest": gfloat.RoundMode.TiesToEven, "zero": gfloat.RoundMode.TowardZero}[rounding]
    x = bfloat16_neighbourhoods()[:: 6 * 7 + 1].double()
    x = x[~x.isnan()]
    expected = torch.from_numpy(gfloat.round_ndarray(info, x.numpy(), mode, sat=True))
    format = Float.parse(name).replace(rounding=rounding)
    assert_same_bits(quantize(x, format), expected.copysign(x))


@pytest.mark.parametrize("name", ["fp10_154", "fp10_163"])
def test_fp10_truncates_flushes_and_saturates(name: str) -> None:
    format = Float.parse(name)
    x = bfloat16_neighbourhoods()
    x = x[~x.isnan()]
    y = quantize(x, format)
    small, large = x.abs() < format.smallest_normal, x.abs() > format.largest_value
    mask = -(1 << (23 - format.mantissa))
    truncated = (x.view(torch.int32) & mask).view(torch.float32)
    truncated = torch.where(large, torch.tensor(format.largest_value).copysign(x), truncated)
    assert_same_bits(y, torch.where(small, torch.tensor(0.0).copysign(x), truncated))


@settings(deadline=None, max_examples=100)
@given(st.data(), small_floats())
def test_floats_are_the_nearest_listed_values(data: st.DataObject, format: Float) -> None:
    numbers = data.draw(st.lists(numbers_near(format), min_size=1, max_size=20))
    x = torch.tensor(numbers, dtype=torch.float64)
    expected = [oracle.quantize_float(number, format) for number in numbers]
    assert_same_bits(quantize(x, format), torch.tensor(expected, dtype=torch.float64))
    x = x.float()
    expected = [oracle.quantize_float(number, format) for number in x.tolist()]
    assert_same_bits(quantize(x, format), torch.tensor(expected, dtype=torch.float32))


@settings(deadline=None, max_examples=100)
@given(st.data(), small_floats(rounding=("stochastic",)))
def test_stochastic_rounding_gives_a_neighbour(data: st.DataObject, format: Float) -> None:
    numbers = data.draw(st.lists(numbers_near(format), min_size=1, max_size=20))
    x = torch.tensor(numbers, dtype=torch.float64)
    nothing, everything = torch.zeros_like(x).long(), torch.full_like(x, (1 << 62) - 1, dtype=torch.int64)
    saturating = format.replace(overflow="saturate")
    assert_same_bits(quantize(x, saturating, nothing), quantize(x, saturating.replace(rounding="zero")))
    for before, after in zip(numbers, quantize(x, format, everything).tolist(), strict=True):
        assert_same_bits(torch.tensor(after), torch.tensor(_rounded_away(before, format)))


def _rounded_away(x: float, format: Float) -> float:
    """What the largest random integer gives: the next value away from zero unless less than 2^-62 ulp is missing."""
    truncated = oracle.quantize_float(x, format.replace(rounding="zero", overflow="saturate"))
    if math.isnan(x) or math.isinf(x):
        return oracle.quantize_float(x, format)
    flushed = not format.subnormals and abs(x) < format.smallest_normal
    listed = [float(value) for value, _ in oracle.float_values(format)]
    above = min((value for value in listed if value > abs(truncated)), default=math.inf)
    if flushed or abs(x) == abs(truncated) or (abs(x) - abs(truncated)) / (above - abs(truncated)) < 2.0**-62:
        return truncated
    if above == listed[-1]:
        above = format.largest_value if format.overflow == "saturate" else math.inf
    return math.copysign(above, x)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(-(2**30), 2**30).map(lambda i: i / 4) | st.floats(), min_size=1), ints)
def test_integers(numbers: list[float], format: Int) -> None:
    x = torch.tensor(numbers, dtype=torch.float64)
    expected = [oracle.quantize_int(number, format) for number in numbers]
    assert_same_bits(quantize(x, format), torch.tensor(expected, dtype=torch.float64))
    expected = [oracle.quantize_int(number, format) for number in x.float().tolist()]
    assert_same_bits(quantize(x.float(), format), torch.tensor(expected, dtype=torch.float32))


elements = st.one_of(
    st.floats(width=32),
    st.sampled_from((0.0, -0.0, math.inf, -math.inf, math.nan)),
    st.builds(math.ldexp, st.integers(-64, 64), st.integers(-10, 10)),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(elements, min_size=1, max_size=20), block_floats)
def test_blocks(numbers: list[float], format: BlockFloat) -> None:
    expected = []
    for start in range(0, len(numbers), format.block):
        expected += oracle.quantize_block(numbers[start : start + format.block], format)
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(numbers, dtype=dtype)
        assert_same_bits(quantize(x, format), torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize(
    ("rounding", "block", "expected"),
    [
        # Quantum 2^(1-3+1) = 0.5 for the three, the outlier 100 untouched.
        ("zero", [100.0, 3.9, -1.2, 0.3], [100.0, 3.5, -1.0, 0.0]),
        # 3.9 would carry to 4.0 = 8 quanta: the largest multiple is 7.
        ("nearest", [100.0, 3.9, -1.2, 0.3], [100.0, 3.5, -1.0, 0.5]),
        # Two at the largest exponent: no outlier, quantum 16.
        ("zero", [100.0, 65.0, -17.0, 3.0], [96.0, 64.0, -16.0, 0.0]),
        ("zero", [0.0, 7.3, 0.0, 0.0], [0.0, 7.3, 0.0, 0.0]),
        ("zero", [torch.nan, 7.3, 7.3, 0.1], [torch.nan, 7.0, 7.0, 0.0]),
        ("zero", [torch.inf, 7.3, 1.1, -0.1], [torch.inf, 7.0, 1.0, -0.0]),
    ],
)
def test_the_outlier_rule_by_hand(rounding: str, block: list[float], expected: list[float]) -> None:
    format = BlockFloat(significand=3, rounding=rounding)  # type: ignore[arg-type]
    assert_same_bits(quantize(torch.tensor([block]), format), torch.tensor([expected]))


def test_blocks_beyond_the_shared_exponent_saturate() -> None:
    format = BlockFloat(exponent=3, significand=3, shared="max")  # shared exponents -2 .. 3
    x = torch.tensor([[1000.0, 9.0, -torch.inf, 0.1, 2.0**-5, 2.0**-4, 0.07, 0.2]])
    expected = torch.tensor([[14.0, 8.0, -14.0, 0.0, 0.0, 2.0**-4, 2.0**-4, 3 * 2.0**-4]])
    assert_same_bits(quantize(x, format), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stochastic_blocks_are_unbiased_between_the_truncated_and_the_next(dtype: torch.dtype) -> None:
    format = BlockFloat(significand=4, shared="max", rounding="stochastic")
    x = torch.tensor([8.0, 5.3, -1.9, 0.4], dtype=dtype).repeat(20_000, 1)
    y = quantize(x, format, random_for(x))
    assert torch.equal(y.unique(), torch.tensor([-2.0, -1.0, 0.0, 1.0, 5.0, 6.0, 8.0], dtype=dtype))
    # The standard deviation of a mean of n steps of 1 is at most 1 / (2 sqrt n) = 0.0036; five of them are allowed.
    assert (y.mean(0) - x[0]).abs().max() < 5 / (2 * 20_000**0.5)
