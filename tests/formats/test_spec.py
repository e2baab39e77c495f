"""The format objects: fields, names, presets and what they say about themselves."""

# ruff: noqa: A001, A002 - format is the word of the contract and of the field

import copy
import doctest
import pickle
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from recoup import RecoupError
from recoup.formats import BlockFloat, Float, Int, ops, reference, spec

FORMATS = [
    Float(3, -6, 8, largest=448),
    Float.ieee(5, 2, rounding="stochastic", overflow="inf"),
    Float.lba(4, 7, bias=12),
    Int(),
    Int(4, signed=False, overflow="wrap"),
    BlockFloat(),
    BlockFloat(block=16, dim=-1, shared="max", rounding="nearest"),
]


@pytest.mark.parametrize("format", FORMATS)
def test_repr_pickle_dict_and_copy_give_it_back(format: Float | Int | BlockFloat) -> None:
    assert eval(repr(format)) == format  # noqa: S307
    assert pickle.loads(pickle.dumps(format)) == format
    assert type(format).from_dict(format.to_dict()) == format
    assert copy.deepcopy(format) == format
    assert hash(copy.copy(format)) == hash(format)


def test_frozen_and_checked_again_when_replaced() -> None:
    with pytest.raises(AttributeError):
        Int().bits = 4  # type: ignore[misc]
    assert Float.parse("e5m2").replace(overflow="inf").overflow == "inf"
    with pytest.raises(RecoupError, match="overflow='wrap'"):
        Float.parse("e5m2").replace(overflow="wrap")
    with pytest.raises(RecoupError, match="Int: unknown field 'width'; the fields are bits, signed, overflow"):
        Int.from_dict({"width": 3})


def test_numpy_integers_become_plain_ones() -> None:
    format = Float(np.int64(2), np.int32(-14), 15, largest=np.float32(49152))  # type: ignore[arg-type]
    assert repr(format) == repr(Float(2, -14, 15, largest=49152.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mantissa": -1}, r"Float\(mantissa=-1\): mantissa must be an integer from 0 to 52"),
        ({"mantissa": 53}, r"mantissa=53\): .* 0 to 52"),
        ({"mantissa": 2.0}, r"mantissa=2\.0\)"),
        ({"mantissa": True}, r"mantissa=True\)"),
        ({"min_exponent": -1023}, r"min_exponent=-1023\): min_exponent must be an integer from -1022 to 1023"),
        ({"max_exponent": -15}, r"max_exponent=-15\): .* from -14 to 1023 \(min_exponent is -14\)"),
        ({"max_exponent": 1024}, r"max_exponent=1024\)"),
        ({"subnormals": 1}, r"subnormals=1\): subnormals must be True or False"),
        ({"rounding": "up"}, r"rounding='up'\): rounding must be one of 'nearest', 'zero', 'stochastic'"),
        ({"overflow": "wrap"}, r"overflow='wrap'\): overflow must be one of 'saturate', 'inf'"),
        ({"largest": 65536}, r"largest=65536\): .* top binade, from 32768\.0 to 57344\.0 in steps of 8192\.0"),
        ({"largest": 50000.0}, "in steps of 8192.0"),
        ({"largest": float("nan")}, "largest=nan"),
        ({"largest": "57344"}, "largest='57344'"),
    ],
)
def test_float_errors_name_the_field_and_its_range(arguments: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"mantissa": 2, "min_exponent": -14, "max_exponent": 15} | arguments
    with pytest.raises(RecoupError, match=message):
        Float(**fields)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Float.ieee(1, 2), r"Float\.ieee\(exponent=1\): exponent must be an integer from 2 to 11"),
        (lambda: Float.ieee(5, 2, bias=1024), r"Float\.ieee\(bias=1024\): bias must be an integer from -993 to 1023"),
        (lambda: Float.ieee(5, -2), r"mantissa=-2"),
        (lambda: Float.lba(0, 7, 3), r"Float\.lba\(exponent=0\): exponent must be an integer from 1 to 11"),
        (lambda: Float.lba(4, 7, 2000), r"Float\.lba\(bias=2000\): bias must be an integer from -1008 to 1022"),
        (lambda: Float.parse("fp9"), r"Float\.parse\('fp9'\): unknown format; the names are float64, .*fp10_163"),
        (lambda: Float.parse(None), r"Float\.parse\(None\)"),  # type: ignore[arg-type]
        (lambda: Int(0), r"Int\(bits=0\): bits must be an integer from 1 to 53"),
        (lambda: Int(54), r"Int\(bits=54\)"),
        (lambda: Int(signed="no"), r"Int\(signed='no'\): signed must be True or False"),  # type: ignore[arg-type]
        (lambda: Int(overflow="inf"), r"Int\(overflow='inf'\): .* 'saturate', 'wrap'"),  # type: ignore[arg-type]
        (lambda: BlockFloat(exponent=1), r"BlockFloat\(exponent=1\): exponent must be an integer from 2 to 11"),
        (lambda: BlockFloat(significand=0), r"BlockFloat\(significand=0\): .* from 1 to 53"),
        (lambda: BlockFloat(block=0), r"BlockFloat\(block=0\)"),
        (lambda: BlockFloat(dim=1.0), r"BlockFloat\(dim=1\.0\)"),  # type: ignore[arg-type]
        (lambda: BlockFloat(shared="min"), r"shared must be one of 'outlier', 'max'"),  # type: ignore[arg-type]
        (lambda: BlockFloat(rounding="up"), r"BlockFloat\(rounding='up'\)"),  # type: ignore[arg-type]
    ],
)
def test_other_errors(call: Any, message: str) -> None:
    with pytest.raises(RecoupError, match=message):
        call()


ML_DTYPES = [
    "float8_e5m2",
    "float8_e4m3",
    "float8_e3m4",
    "float8_e4m3fn",
    "float8_e5m2fnuz",
    "float8_e4m3fnuz",
    "float8_e4m3b11fnuz",
    "float6_e3m2fn",
    "float6_e2m3fn",
    "float4_e2m1fn",
]


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_value_as_in_ml_dtypes(name: str) -> None:
    format = Float.parse(name)
    dtype = getattr(ml_dtypes, name)
    assert format.bits == ml_dtypes.finfo(dtype).bits
    codes = np.arange(1 << (format.bits - 1), dtype=np.uint8).view(dtype).astype(np.float64)
    assert format.values() == codes[np.isfinite(codes)].tolist()
    assert Float.parse(name.partition("_")[2]) is format


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
def test_range_as_in_numpy(name: str) -> None:
    format = Float.parse(name)
    info = ml_dtypes.finfo(name)
    assert format.bits == info.bits
    assert format.largest_value == float(info.max)
    assert format.smallest_normal == float(info.smallest_normal)
    assert format.smallest_subnormal == float(info.smallest_subnormal)


def test_lightnorm_and_lba_formats() -> None:
    forward, backward = Float.parse("fp10_154"), Float.parse("fp10_163")
    assert (forward.largest_value, forward.smallest_subnormal, forward.bits) == (63488.0, 2.0**-14, 10)
    assert (backward.min_exponent, backward.max_exponent, backward.bits) == (-30, 31, 10)
    assert forward.rounding == backward.rounding == "zero"
    accumulator = Float.lba(4, 7, bias=10)
    assert (accumulator.smallest_subnormal, accumulator.largest_value, accumulator.bits) == (2.0**-10, 63.75, 12)
    assert not accumulator.subnormals
    assert accumulator.rounding == "zero"
    assert Float.lba(4, 7, bias=12).largest_value == 15.9375
    assert Float.lba(3, 4, bias=3, rounding="nearest", overflow="inf").overflow == "inf"


def test_a_complete_top_binade_needs_no_largest() -> None:
    assert Float.ieee(5, 4, largest=63488) == Float.ieee(5, 4)
    assert Float(0, -2, 3, largest=8.0).largest is None


def test_values_of_formats_too_large_to_list() -> None:
    with pytest.raises(RecoupError, match="at most 65536 are listed"):
        Float.parse("float32").values()
    assert len(Float.parse("float16").values()) == 31 * 1024
    assert Float(0, -1, 1).values() == [0.0, 0.5, 1.0, 2.0]
    assert Float(1, -1, 0, subnormals=False).values() == [0.0, 0.5, 0.75, 1.0, 1.5]


def test_integer_ranges() -> None:
    assert (Int(8).smallest_value, Int(8).largest_value) == (-128.0, 127.0)
    assert (Int(8, signed=False).smallest_value, Int(8, signed=False).largest_value) == (0.0, 255.0)
    assert (Int(1).smallest_value, Int(1).largest_value) == (-1.0, 0.0)


@pytest.mark.parametrize(("block", "bits"), [(4, 7.25), (8, 6.625), (16, 6.3125), (32, 6.15625)])
def test_block_storage_as_in_the_paper(block: int, bits: float) -> None:
    assert BlockFloat(block=block, shared="max").bits == bits
    assert BlockFloat(4, 3, 4).bits == 1 + 3 + (4 + 4 + 2) / 4  # a second exponent and the outlier's index


def test_shared_exponents_are_ieees() -> None:
    for exponent in range(2, 12):
        format = BlockFloat(exponent)
        ieee = Float.ieee(exponent, 0)
        assert (format.min_exponent, format.max_exponent) == (ieee.min_exponent, ieee.max_exponent)


@pytest.mark.parametrize("module", [spec, ops, reference], ids=lambda module: module.__name__)
def test_the_examples_in_the_docstrings(module: ModuleType) -> None:
    assert doctest.testmod(module).attempted
    assert not doctest.testmod(module).failed
