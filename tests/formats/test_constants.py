"""Which formats a dtype can carry, and where float64 is used instead."""

# ruff: noqa: A001, A002 - format is the word of the contract and of the field

import pytest
import torch

from recoup import RecoupError
from recoup.formats import BlockFloat, Float, Int
from recoup.formats.constants import float_constants, kernel_dtype, nearest_constants


@pytest.mark.parametrize(
    "format",
    [
        Float.parse("float32"),
        Float.parse("e5m2"),
        Float(0, -126, 127),
        Int(24),
        Int(24, signed=False),
        BlockFloat(8, 24),
    ],
)
def test_formats_within_float32(format: Float | Int | BlockFloat) -> None:
    assert kernel_dtype(format, torch.float32) == torch.float32
    assert kernel_dtype(format, torch.float64) == torch.float64


@pytest.mark.parametrize(
    "format",
    [
        Float.parse("float64"),
        Float.lba(8, 7, bias=127),
        Float(10, -200, 100),
        Float(10, -20, 200, rounding="zero"),
        BlockFloat(11),
    ],
)
def test_wider_formats_that_a_float32_result_still_fits(format: Float | BlockFloat) -> None:
    assert kernel_dtype(format, torch.float32) == torch.float64


@pytest.mark.parametrize(
    ("format", "message"),
    [
        (Float(10, -20, 200), r"Float\(mantissa=10, .*round up to 2\^128.*max_exponent to at most 127"),
        (Float(10, -20, 128, rounding="stochastic"), r"round up to 2\^128"),
        (Float(30, -10, 10), r"largest value 2047\.99\d+ is no float32; convert x to float64"),
        (Int(25), "Int.bits=25.* at most 24 bits; convert x to float64"),
        (BlockFloat(significand=25), "significands of at most 24 bits; convert x to float64"),
    ],
)
def test_formats_that_would_leave_float32(format: Float | Int | BlockFloat, message: str) -> None:
    assert kernel_dtype(format, torch.float64) == torch.float64
    with pytest.raises(RecoupError, match=message):
        kernel_dtype(format, torch.float32)


def test_constants_by_hand() -> None:
    constants = float_constants(Float.parse("e5m2"), torch.float32)
    assert constants.largest == constants.top == 0x47600000  # 57344
    assert constants.shift == 21
    assert constants.zero_below == 0x37000001  # just above 2^-17, half the smallest subnormal


def test_the_shorter_way_to_nearest_needs_room() -> None:
    assert nearest_constants(Float.parse("e5m2"), torch.float32)
    assert nearest_constants(Float(3, -122, 107), torch.float32)
    for format in (
        Float(3, -123, 107),  # half a quantum below the normal float32s
        Float(3, -122, 108),  # no float32 whose ulp is the top binade's quantum
        Float.parse("float32"),
        Float.parse("fp10_154"),
    ):
        assert nearest_constants(format, torch.float32) is None
    assert nearest_constants(Float.parse("float32"), torch.float64)
