"""Codes of floats and integers against ml_dtypes, numpy and a model of bit strings."""

# ruff: noqa: A001, A002 - format is the word of the contract and of the field

import math
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from recoup import RecoupError
from recoup.formats import BlockCodes, BlockFloat, Float, FloatFields, Int, code_bits, decode, encode, quantize
from recoup.formats.spec import _named_floats
from tests.formats import code_model, oracle
from tests.formats.inputs import SPECIAL, assert_same_bits, ints, patterns, small_floats


def _types() -> dict[str, type]:
    """Every name that recoup shares with ml_dtypes or numpy."""
    found = {}
    for name in _named_floats():
        names = [prefix + name for prefix in ("", "float8_", "float6_", "float4_")]
        known = [getattr(library, long) for library in (ml_dtypes, np) for long in names if hasattr(library, long)]
        if known:
            found[name] = known[0]
    return found


TYPES = _types()
EXHAUSTIVE = [name for name in TYPES if name not in ("float32", "float64")]
LBA = [
    Float.lba(4, 7, bias=10),
    Float.lba(4, 3, bias=3),
    Float.lba(1, 0, bias=0),
    Float.lba(3, 2, 9, rounding="nearest"),
]


def test_the_names_shared_with_ml_dtypes() -> None:
    assert set(_named_floats()) - set(TYPES) == {"tf32", "fp10_154", "fp10_163"}


@pytest.mark.parametrize("name", EXHAUSTIVE)
def test_every_code_is_ml_dtypes_both_ways(name: str) -> None:
    format, dtype = Float.parse(name), np.dtype(TYPES[name])
    count = 1 << code_bits(format)
    codes = np.arange(count, dtype=np.uint8 if dtype.itemsize == 1 else np.uint16)
    with np.errstate(invalid="ignore"):  # it warns of signalling NaNs
        expected = codes.view(dtype).astype(np.float64)
    if name.endswith("fnuz"):
        assert np.isnan(expected).nonzero()[0].tolist() == [count // 2]
        expected[count // 2] = -0.0  # ours keeps the sign of zero
    values = torch.from_numpy(expected)
    found = decode(torch.arange(count), format)
    assert_same_bits(found, values)
    numbers = ~values.isnan()
    assert torch.equal(encode(values[numbers], format), torch.arange(count)[numbers])
    assert torch.equal(encode(values[numbers].float(), format), torch.arange(count)[numbers])
    if not numbers.all():
        nan = int(np.array(np.nan, dtype).view(codes.dtype))
        assert (
            encode(torch.tensor([math.nan, -math.nan]), format).tolist() == [nan, nan] == [FloatFields(format).nan] * 2
        )


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("float64", torch.float64)])
def test_the_bits_of_float32_and_float64(name: str, dtype: torch.dtype) -> None:
    x = patterns(dtype)
    integer, mask = (torch.int32, (1 << 32) - 1) if dtype == torch.float32 else (torch.int64, -1)
    codes, format = x.view(integer).long() & mask, Float.parse(name)
    assert torch.equal(encode(x, format)[~x.isnan()], codes[~x.isnan()])
    assert_same_bits(decode(codes, format).to(dtype), x)


@pytest.mark.parametrize("format", [*(Float.parse(name) for name in (*EXHAUSTIVE, "fp10_154", "fp10_163")), *LBA])
def test_listed_values_are_consecutive_codes(format: Float) -> None:
    values = torch.tensor(format.values(), dtype=torch.float64)
    fields = FloatFields(format)
    first = 0 if format.subnormals else 1 << fields.fraction  # codes from 1 on below the smallest normal are none
    codes = torch.arange(len(values)) + max(first - 1, 0)
    if fields.flag is not None:
        codes = torch.arange(-1, len(values) - 1) + (1 << fields.flag)
    codes[0] = 0
    assert torch.equal(encode(values, format), codes)
    assert codes[-1] == fields.largest
    assert torch.equal(encode(-values, format), codes + (1 << fields.sign))


def test_the_twelve_bit_accumulator_has_thirteen() -> None:
    format = Float.lba(4, 7, bias=10)
    fields = FloatFields(format)
    assert (format.bits, fields.bits, fields.fraction, fields.exponent, fields.sign, fields.flag) == (
        12,
        13,
        7,
        4,
        11,
        12,
    )
    nonzero = decode(torch.arange(1 << 12, 1 << 13), format)
    assert len(nonzero.unique()) == 4096
    assert not nonzero.isnan().any()
    assert_same_bits(decode(torch.tensor([0, 1 << 11]), format), torch.tensor([0.0, -0.0], dtype=torch.float64))
    with pytest.raises(RecoupError, match=r"codes\[0\] is 0x1, which is no code of Float"):
        decode(torch.tensor([1]), format)


@settings(max_examples=100)
@given(small_floats())
def test_the_codes_of_small_floats_are_all_and_only_the_models(format: Float) -> None:
    listed = [float(value) for value, _ in oracle.float_values(format)[:-1]]
    if not format.subnormals:
        assert listed == format.values()
    table = {code_model.float_code(x, format): x for value in listed for x in (value, -value)}
    assert len(table) == 2 * len(listed)
    table |= code_model.special_codes(format)
    bits = code_model.exponent_width(format) + format.mantissa + 1 + code_model.has_flag(format)
    assert code_bits(format) == bits
    codes, values = torch.tensor(list(table)), torch.tensor(list(table.values()), dtype=torch.float64)
    assert_same_bits(decode(codes, format), values)
    numbers = ~values.isnan()
    assert torch.equal(encode(values[numbers], format), codes[numbers])
    for code in [*range(-2, (1 << bits) + 2), 1 << 62, -(1 << 63)]:
        if code not in table:
            with pytest.raises(RecoupError, match="which is no code of Float"):
                decode(torch.tensor(code), format)


@settings(max_examples=100)
@given(st.data(), small_floats())
def test_what_is_no_value_is_refused(data: st.DataObject, format: Float) -> None:
    listed = [float(value) for value, _ in oracle.float_values(format)]
    below = data.draw(st.integers(0, len(listed) - 2))
    between = (listed[below] + listed[below + 1]) / 2
    beyond = data.draw(st.sampled_from((between, listed[-1], 5e-324, 2.0**1000)))
    assume(beyond not in listed[:-1])
    x = torch.tensor([[0.0, listed[below]], [-beyond, 0.0]], dtype=torch.float64)
    message = f"encode: x[1, 0] is {-beyond!r}, which is no value of {format!r}; quantize x first"
    with pytest.raises(RecoupError, match=f"^{re.escape(message)}$"):
        encode(x, format)
    for value in (math.inf, -math.inf, math.nan):
        specials = code_model.special_codes(format).values()
        has_code = any(math.isnan(s) if math.isnan(value) else s == value for s in specials)
        if has_code:
            assert_same_bits(
                decode(encode(torch.tensor(value), format), format), torch.tensor(value, dtype=torch.float64)
            )
        else:
            with pytest.raises(RecoupError, match=rf"encode: x is {value!r}, for which Float\(.* has no code"):
                encode(torch.tensor(value), format)


@st.composite
def wide_floats(draw: st.DrawFn) -> Float:
    """Any format at all: codes of up to 64 bits."""
    low = draw(st.integers(-1022, 1023))
    span = draw(st.sampled_from([2**n - 1 for n in range(11)] + [2**n for n in range(11)]) | st.integers(0, 2045))
    high, mantissa = min(low + span, 1023), draw(st.integers(0, 52))
    largest = draw(st.none() | st.integers(0, (1 << mantissa) - 1).map(lambda f: math.ldexp(1 + f / 2**mantissa, high)))
    return Float(mantissa, low, high, subnormals=draw(st.booleans()), rounding="zero", largest=largest)


def _near(format: Float) -> Tensor:
    ends = [2.0**format.min_exponent, format.smallest_subnormal, format.largest_value, 3 * format.smallest_subnormal]
    x = patterns(torch.float64, count=30)[-300:]
    return torch.cat([torch.tensor([*ends, *(math.nextafter(end, math.inf) for end in ends)]).double(), x])


@settings(max_examples=100)
@given(wide_floats())
def test_every_rounded_number_has_the_models_code(format: Float) -> None:
    x = _near(format)
    y = quantize(x[~x.isnan()], format)
    y = torch.cat([y, -y])
    codes = encode(y, format)
    mask = (1 << code_bits(format)) - 1
    assert [code & mask for code in codes.tolist()] == [code_model.float_code(value, format) for value in y.tolist()]
    if code_bits(format) < 64:
        assert torch.equal(codes, codes & mask)
    assert_same_bits(decode(codes, format), y)


def test_sixty_four_bits_fill_the_int64() -> None:
    format = Float.lba(10, 52, bias=511)
    assert code_bits(format) == 64
    x = torch.tensor([0.0, -0.0, 1.0, -format.largest_value], dtype=torch.float64)
    assert encode(x, format).tolist() == [0, 1 << 62, (511 << 52) - (1 << 63), -1]
    assert_same_bits(decode(encode(x, format), format), x)


@pytest.mark.parametrize(("signed", "bits"), [(s, b) for s in (True, False) for b in (1, 2, 4, 8, 16)])
def test_every_integer_is_numpys_both_ways(signed: bool, bits: int) -> None:
    format, codes = Int(bits, signed), np.arange(1 << bits, dtype=np.uint16)
    padded = (codes << (16 - bits)).astype(np.uint16)
    values = (padded.view(np.int16) if signed else padded).astype(np.float64) / 2 ** (16 - bits)
    x = torch.from_numpy(values)
    assert_same_bits(decode(torch.arange(1 << bits), format), x)
    assert torch.equal(encode(x, format), torch.arange(1 << bits))
    assert torch.equal(encode(x.float(), format), torch.arange(1 << bits))


@settings(max_examples=100)
@given(st.data(), ints | st.builds(Int, bits=st.integers(25, 53), signed=st.booleans()))
def test_integers(data: st.DataObject, format: Int) -> None:
    low, high = int(format.smallest_value), int(format.largest_value)
    values = data.draw(st.lists(st.integers(low, high) | st.sampled_from((low, high, 0)), min_size=1))
    x = torch.tensor(values, dtype=torch.float64)
    codes = encode(x, format)
    assert codes.tolist() == [code_model.int_code(value, format) for value in values]
    assert_same_bits(decode(codes, format), x)
    wrong = data.draw(st.sampled_from((0.5, high + 1.0, low - 1.0, -0.0, 1e300, 5e-324, math.inf, -math.inf, math.nan)))
    with pytest.raises(RecoupError, match=r"encode: x\[1\] is"):
        encode(torch.tensor([0.0, wrong], dtype=torch.float64), format)
    for code in (-1, 1 << format.bits):
        with pytest.raises(RecoupError, match="which is no code of Int"):
            decode(torch.tensor([code]), format)


def test_subnormals_count_where_the_processor_flushes_them() -> None:
    x = torch.tensor([SPECIAL[1], -SPECIAL[2]])
    format = Float.parse("float32")
    y = torch.tensor([5e-324, -3e-310], dtype=torch.float64)
    supported = torch.set_flush_denormal(True)
    try:
        assert encode(x, format).tolist() == [1, (1 << 31) + (1 << 23) - 1]
        assert torch.equal(
            decode(encode(y, Float.parse("float64")), Float.parse("float64")).view(torch.int64), y.view(torch.int64)
        )
        with pytest.raises(RecoupError, match="no value of"):
            encode(x, Float.parse("e4m3fn"))
    finally:
        torch.set_flush_denormal(False)
    assert supported or torch.backends.cpu.get_cpu_capability() == "DEFAULT"


@pytest.mark.parametrize("payload", [1, 1 << 21, 1 << 22, (1 << 23) - 1])
def test_every_nan_is_one(payload: int) -> None:
    x = torch.tensor([0x7F800000 | payload], dtype=torch.int32).view(torch.float32)
    assert encode(x, Float.parse("e5m2")).tolist() == [0x7E]
    assert encode(x, Float.parse("e4m3fn")).tolist() == [0x7F]
    for format in (Int(), BlockFloat(dim=0), Float.lba(4, 7, bias=10)):
        with pytest.raises(RecoupError, match=r"x\[0\] is nan, for which"):
            encode(x, format)


def test_any_layout_of_memory_and_any_shape() -> None:
    format = Float.parse("e5m2")
    x = quantize(torch.randn(6, 5, 4), format)
    assert torch.equal(encode(x.transpose(0, 2)[::2], format), encode(x, format).transpose(0, 2)[::2])
    codes = encode(x, format).transpose(0, 1)
    assert torch.equal(decode(codes, format), x.transpose(0, 1).double())
    assert encode(x.requires_grad_(), format).shape == (6, 5, 4)
    assert encode(torch.empty(0, 3), format).shape == (0, 3)
    assert decode(torch.empty(2, 0, dtype=torch.int64), format).shape == (2, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("format", [*map(Float.parse, EXHAUSTIVE), *LBA, Int(8), Int(8, signed=False)])
def test_a_gpu_gives_the_same(format: Float | Int) -> None:
    x = quantize(patterns(torch.float64), format)
    x = x[x.isfinite()]
    codes = encode(x, format)
    assert torch.equal(encode(x.cuda(), format).cpu(), codes)
    assert_same_bits(decode(codes.cuda(), format).cpu(), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode(torch.ones(2).half(), Int()), r"encode: x is a float16 tensor on cpu; it must be a float32"),
        (lambda: encode([1.0], Int()), r"encode: x is a list; it must be"),
        (
            lambda: encode(torch.ones(2), "e5m2"),
            r"encode: format is 'e5m2'; it must be a Float, an Int or a BlockFloat",
        ),
        (lambda: decode(torch.ones(2), Int()), r"decode: the codes are a float32 tensor on cpu; they must be an int64"),
        (lambda: decode(torch.ones(2).long(), 8), r"decode: format is 8; it must be"),
        (
            lambda: decode(torch.ones(2).long(), BlockFloat()),
            r"an int64 tensor on cpu; those of BlockFloat\(.* BlockCodes",
        ),
        (lambda: decode(BlockCodes(torch.ones(1).long(), torch.ones(1).long()), Int()), r"the codes are a BlockCodes"),
        (lambda: code_bits("e5m2"), r"code_bits: format is 'e5m2'"),
        (lambda: FloatFields(Int()), r"FloatFields\(format=Int\(.*: format must be a Float"),
        (lambda: encode(torch.tensor(0.1), Int()), r"encode: x is 0\.10000000149011612, which is no value of Int\("),
    ],
)
def test_what_cannot_be_coded_is_said(call, message: str) -> None:
    with pytest.raises(RecoupError, match=message):
        call()
