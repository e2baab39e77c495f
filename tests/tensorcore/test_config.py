"""The unit's config."""

import math

import pytest

from recoup.errors import RecoupError
from recoup.grammar import parse_config
from recoup.tensorcore import TensorCore
from recoup.tensorcore.wing import CARD


@pytest.mark.parametrize(
    "unit", [*CARD.presets.values(), TensorCore(("e5m2", "e4m3fn"), promotion=64, amax=16, scale="calibrated")]
)
def test_round_trips(unit):
    assert parse_config(repr(unit)) == unit
    assert TensorCore.from_dict(unit.to_dict()) == unit
    assert TensorCore.from_code(unit.code) == unit
    assert hash(unit.replace()) == hash(unit)


def test_one_format_twice_is_one():
    assert TensorCore(("e4m3fn", "e4m3fn")) == TensorCore()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"operands": "fp8"}, "operands must be one of 'e4m3fn'"),
        ({"operands": ("e4m3fn", "e5m2", "e5m2")}, "operands must be one of"),
        ({"group": 0}, "group must be an integer from 1 to 64"),
        ({"fraction": 36}, "fraction must be an integer from 1 to 35"),
        ({"output": "bfloat16"}, "output must be one of 'e8m13', 'float32', 'float16'"),
        ({"promotion": 48}, "promotion must be a multiple of group, 32"),
        ({"promotion": 0}, "promotion must be an integer from 1"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of"),
        ({"amax": math.nan}, "amax must lie above 0"),
        ({"amax": 449.0}, "at most at 448.0"),
        ({"order": "kck"}, "order must be one of"),
        ({"backward": "float16"}, "backward must be one of"),
    ],
)
def test_bad_input(options, told):
    with pytest.raises(RecoupError, match=told):
        TensorCore(**options)
