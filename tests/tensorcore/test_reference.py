"""The reference against a model in fractions, and hand-made sums."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recoup.errors import RecoupError
from recoup.tensorcore import TensorCore, reference
from tests.tensorcore import letter
from tests.tensorcore.strategies import KINDS, operands, same, units

HOPPER = TensorCore.hopper_fp8()


@given(units(), st.integers(0, 45), st.sampled_from(KINDS), st.integers(0, 2**30))
@settings(max_examples=60)
def test_equal_to_the_fractions(unit, K, kind, seed):
    unit = unit.replace(promotion=None)
    a, b = operands(unit, (2, K, 2), kind, seed)
    expected = [[letter.dot(row.tolist(), column.tolist(), unit) for column in b.mT] for row in a]
    assert same(reference.matmul(a, b, unit), torch.tensor(expected))


@pytest.mark.parametrize(
    ("c", "a", "b", "unit", "expected"),
    [
        (1.0, [-(2.0**-7)], [2.0**-7], HOPPER, 1.0),  # cut, not floored
        (-1.0, [2.0**-7], [2.0**-7], HOPPER, -1.0),
        (1 + 2.0**-20, [0.0] * 32, [0.0] * 32, HOPPER, 1.0),  # a group of zeros is not neutral
        (0.0, [1.75] * 2, [1.75] * 2, HOPPER.replace(fraction=1), 6.0),  # 3.0625 keeps one bit below 2^0
        (0.0, [-0.0], [1.0], HOPPER, 0.0),
        (65504.0, [4.0], [4.0], TensorCore.hopper_f16(output="float16"), math.inf),
        (65504.0, [2.0], [4.0], TensorCore.hopper_f16(output="float16"), 65504.0),
        (math.inf, [1.0], [-1.0], HOPPER, math.inf),
        (1.0, [math.inf], [-1.0], TensorCore.hopper_f16(), -math.inf),
    ],
)
def test_steps_by_hand(c, a, b, unit, expected):
    got = reference.step(c, a, b, unit)
    assert (got, math.copysign(1, got)) == (expected, math.copysign(1, expected))


def test_what_is_no_number():
    unit = TensorCore.hopper_f16()
    for c, a, b in ((0.0, math.inf, 0.0), (math.inf, -math.inf, 1.0), (0.0, math.nan, 1.0), (math.nan, 1.0, 1.0)):
        assert math.isnan(reference.step(c, [a], [b], unit))


def test_promotion_adds_in_float32_to_nearest():
    unit = TensorCore.hopper_fp8(promotion=32)
    a, b = torch.full((1, 64), 1.0), torch.full((64, 1), 2.0**-9)
    a[0, 0], b[0, 0] = 256.0, 256.0
    # 65536 swallows the 31 others of its group at 13 bits; the second group's sum of 32 * 2^-9 is added in float32.
    assert reference.matmul(a, b, unit).item() == 65536 + 32 * 2.0**-9
    assert reference.matmul(a, b, unit.replace(promotion=None)).item() == 65536


def test_bad_input():
    with pytest.raises(RecoupError, match=r"a holds 1\.1"):
        reference.matmul(torch.tensor([[1.1]]), torch.tensor([[1.0]]), HOPPER)
