"""Codes of block floating point: every pair of FP10 in a block, and a model of bit strings for the others."""

# ruff: noqa: A001, A002 - format is the word of the contract and of the field

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recoup import RecoupError
from recoup.formats import BlockCodes, BlockFloat, Float, code_bits, decode, encode, quantize
from tests.formats import code_model
from tests.formats.inputs import assert_same_bits, block_floats

FP10 = {"fp10_154": (5, 5), "fp10_163": (6, 4)}  # exponent and significand bits of its blocks


def as_strings(codes: BlockCodes, format: BlockFloat) -> list[str]:
    """Every block of a line of codes, its fields one after the other."""
    lines = []
    for block, shared in enumerate(codes.shared.tolist()):
        line = code_model.digits(shared, format.exponent)
        if codes.outlier is not None and codes.index is not None:
            line += code_model.digits(codes.outlier.tolist()[block], format.exponent)
            line += code_model.digits(codes.index.tolist()[block], (format.block - 1).bit_length())
        elements = codes.elements.tolist()[block * format.block : (block + 1) * format.block]
        lines.append(line + "".join(code_model.digits(element, 1 + format.significand) for element in elements))
    return lines


def rounded(numbers: list[float], format: BlockFloat) -> Tensor:
    """First to the float whose values an outlier may have, as LightNorm does, then in blocks."""
    x = torch.tensor(numbers, dtype=torch.float64)
    return quantize(quantize(x, Float.ieee(format.exponent, format.significand - 1)), format)


@pytest.mark.parametrize("shared", ["outlier", "max"])
@pytest.mark.parametrize("name", FP10)
def test_every_pair_of_fp10_in_a_block_comes_back(name: str, shared: str) -> None:
    positive = torch.tensor(Float.parse(name).values())
    values = torch.cat([positive, -positive])
    x = torch.cartesian_prod(values, values)
    format = BlockFloat(*FP10[name], 2, 1, shared)  # type: ignore[arg-type]
    y = quantize(x, format)
    codes = encode(y, format)
    assert_same_bits(decode(codes, format), y.double())
    packed = torch.zeros(len(y), dtype=torch.int64)
    for tensor in (getattr(codes, field.name) for field in fields(codes)):
        for column in () if tensor is None else tensor.T:
            packed = packed << 7 | column
    bits = y.view(torch.int32).long()
    assert len(packed.unique()) == len((bits[:, 0] << 32 | bits[:, 1] & 0xFFFFFFFF).unique())


numbers = st.lists(
    st.one_of(
        st.floats(-1e6, 1e6),
        st.sampled_from((0.0, -0.0, 1e300, -1e-300)),
        st.builds(math.ldexp, st.integers(-64, 64), st.integers(-40, 40)),
    ),
    min_size=1,
    max_size=20,
)
wide_blocks = st.builds(
    BlockFloat,
    exponent=st.integers(2, 11),
    significand=st.integers(1, 53),
    block=st.integers(1, 7),
    dim=st.just(0),
    shared=st.sampled_from(("outlier", "max")),
)


@settings(max_examples=150)
@given(numbers, block_floats | wide_blocks)
def test_every_rounded_block_has_the_models_code(numbers: list[float], format: BlockFloat) -> None:
    y = rounded(numbers, format)
    codes = encode(y, format)
    blocks = [y.tolist()[start : start + format.block] for start in range(0, len(y), format.block)]
    strings = as_strings(codes, format)
    assert strings == [code_model.block_code(block, format) for block in blocks]
    if len(numbers) >= format.block:
        assert len(strings[0]) == code_bits(format) == round(format.bits * format.block)  # bits are a quotient
    assert_same_bits(decode(codes, format), y)


@settings(max_examples=100)
@given(st.data(), block_floats | wide_blocks)
def test_any_code_in_range_is_a_value_that_can_be_encoded(data: st.DataObject, format: BlockFloat) -> None:
    size = data.draw(st.integers(1, 2 * format.block))
    starts = range(0, size, format.block)
    top = format.max_exponent - format.min_exponent + 1
    elements = data.draw(st.lists(st.integers(0, (2 << format.significand) - 1), min_size=size, max_size=size))
    shared = [data.draw(st.integers(1, top)) for _ in starts]
    codes = BlockCodes(torch.tensor(elements), torch.tensor(shared))
    if format.shared == "outlier":
        outlier = [data.draw(st.integers(code, top)) for code in shared]
        index = [data.draw(st.integers(0, min(format.block, size - start) - 1)) for start in starts]
        codes = replace(codes, outlier=torch.tensor(outlier), index=torch.tensor(index))
    else:
        outlier, index = shared, [0 for _ in starts]
    x = decode(codes, format)
    for i, element in enumerate(elements):
        block, place = divmod(i, format.block)
        exponent = (outlier if index[block] == place else shared)[block] + format.min_exponent - 1
        magnitude = (element % (1 << format.significand)) * code_model.two_to(exponent - format.significand + 1)
        expected = math.copysign(float(magnitude), -1.0 if element >> format.significand else 1.0)
        assert_same_bits(x[i], torch.tensor(expected, dtype=torch.float64))
    assert_same_bits(decode(encode(x, format), format), x)
    assert_same_bits(quantize(x, format), x)


def test_a_block_by_hand() -> None:
    # 100 = 25 * 2^(6 - 4) stands out; the others are multiples of 2^(1 - 4). The second block is one of equals, short.
    codes = encode(torch.tensor([[100.0, 3.5, -1.0, 0.5, -3.0, 2.0]]), BlockFloat())
    assert codes.elements.tolist() == [[25, 28, 32 + 8, 4, 32 + 24, 16]]
    assert codes.shared.tolist() == [[1 + 15, 1 + 15]]
    assert codes.outlier is not None
    assert codes.index is not None
    assert codes.outlier.tolist() == [[6 + 15, 1 + 15]]
    assert codes.index.tolist() == [[0, 0]]


def test_what_is_not_above_the_smallest_exponent_is_no_outlier() -> None:
    codes = encode(torch.tensor([0.0, 0.5, 0.0]), BlockFloat(exponent=2, significand=4, dim=0))  # exponents 0 and 1
    assert codes.elements.tolist() == [0, 4, 0]
    assert codes.outlier is not None
    assert codes.index is not None
    assert (codes.shared.tolist(), codes.outlier.tolist(), codes.index.tolist()) == ([1], [1], [0])


@pytest.mark.parametrize("shared", ["outlier", "max"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_no_exponent_is_wide_enough_for_infinities_and_nan(bad: float, shared: str) -> None:
    format = BlockFloat(11, 24, 4, 0, shared)  # type: ignore[arg-type]
    with pytest.raises(RecoupError, match=rf"encode: x\[1\] is {bad!r}, for which"):
        encode(torch.tensor([0.0, bad, 0.0]), format)


@pytest.mark.parametrize("shared", ["outlier", "max"])
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_blocks_lie_along_any_dimension(dim: int, shared: str) -> None:
    format = BlockFloat(block=4, dim=dim, shared=shared)  # type: ignore[arg-type]
    y = quantize(quantize(torch.randn(5, 6, 7), Float.ieee(5, 4)), format)
    codes = encode(y, format)
    lines = encode(y.movedim(dim, 0).flatten(1).contiguous(), format.replace(dim=0))
    for field in fields(codes):
        found, expected = getattr(codes, field.name), getattr(lines, field.name)
        assert (found is None) == (expected is None) == (shared == "max" and field.name in ("outlier", "index"))
        if found is not None:
            assert torch.equal(found.movedim(dim, 0).flatten(1), expected)
            assert found.is_contiguous()
    assert_same_bits(decode(codes, format), y.double())
    wide = format.replace(block=1 << 31)
    assert_same_bits(decode(encode(quantize(y, wide), wide), wide), quantize(y, wide).double())


def test_scalars_and_nothing() -> None:
    format = BlockFloat(dim=0)
    codes = encode(torch.tensor(-3.0), format)
    assert (codes.elements.shape, codes.shared.shape) == ((), (1,))
    assert_same_bits(decode(codes, format), torch.tensor(-3.0, dtype=torch.float64))
    for shape, blocks in (((0, 3), (0, 3)), ((3, 0), (1, 0))):
        codes = encode(torch.empty(shape), format)
        assert (codes.elements.shape, codes.shared.shape) == (shape, blocks)
        assert decode(codes, format).shape == shape


@settings(max_examples=100)
@given(numbers, block_floats, st.data())
def test_what_a_block_cannot_hold_is_refused(numbers: list[float], format: BlockFloat, data: st.DataObject) -> None:
    y = rounded(numbers, format)
    place = data.draw(st.integers(0, len(y) - 1))
    bad = data.draw(st.sampled_from((math.inf, math.nan)) | st.floats(-1e6, 1e6, width=32))
    x = y.clone()
    x[place] = bad
    codable = math.isfinite(bad) and torch.equal(x, rounded(x.tolist(), format))
    if codable:
        assert_same_bits(decode(encode(x, format), format), x)
    else:
        start = place // format.block * format.block
        with pytest.raises(RecoupError, match=r"encode: x\[(\d+)\] is") as raised:
            encode(x, format)
        assert start <= int(str(raised.value).split("[")[1].split("]")[0]) < start + format.block


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            [1.0, 1.0, 1.0, 1.03125],
            r"x\[0, 3\] is 1\.03125, which is no value of BlockFloat\(.*outliers, .* Float\.ieee\(5, 4\)",
        ),
        (
            [100.5, 1.0, 1.0, 1.0],
            r"x\[0, 0\] is 100\.5,",
        ),  # stays as it is in quantize, and needs more bits than stored
        ([2.0**16, 1.0, 1.0, 1.0], r"x\[0, 0\] is 65536\.0,"),
        ([2.0**-20, 0.0, 0.0, 0.0], r"x\[0, 0\] is 9\.5.*e-07,"),
        ([1.0, torch.inf, 1.0, 1.0], r"x\[0, 1\] is inf, for which BlockFloat\(.* has no code"),
        ([1.0, 1.0, torch.nan, 1.0], r"x\[0, 2\] is nan, for which"),
    ],
)
def test_the_first_element_without_a_code_is_named(block: list[float], message: str) -> None:
    with pytest.raises(RecoupError, match=message):
        encode(torch.tensor([block]), BlockFloat())


CODES = encode(torch.tensor([[100.0, 3.5, -1.0, 0.5, -3.0, 2.0]]), BlockFloat())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"elements": [[64, 0, 0, 0, 0, 0]]}, r"codes\.elements\[0, 0\] is 64; in BlockFloat\(.* from 0 to 63"),
        ({"elements": [[0, 0, 0, 0, 0, -1]]}, r"codes\.elements\[0, 5\] is -1;"),
        ({"shared": [[16, 31]]}, r"codes\.shared\[0, 1\] is 31; .* from 1 to 30"),
        ({"shared": [[0, 16]]}, r"codes\.shared\[0, 0\] is 0;"),
        ({"shared": [[16]]}, r"codes\.shared has shape \[1, 1\]; it must be \[1, 2\]"),
        ({"outlier": [[15, 16]]}, r"codes\.outlier\[0, 0\] is 15; .* from 16 to 30"),
        ({"outlier": [[16, 31]]}, r"codes\.outlier\[0, 1\] is 31;"),
        ({"outlier": [[16, 16, 16]]}, r"codes\.outlier has shape \[1, 3\]"),
        ({"index": [[3, 2]]}, r"codes\.index\[0, 1\] is 2; .* from 0 to 1"),
        ({"index": [[-1, 1]]}, r"codes\.index\[0, 0\] is -1; .* from 0 to 3"),
        ({"index": None}, r"codes must have the fields elements, shared, outlier, index and no others"),
    ],
)
def test_codes_out_of_range_are_refused(changes: dict[str, list], message: str) -> None:
    assert decode(CODES, BlockFloat()).tolist() == [[100.0, 3.5, -1.0, 0.5, -3.0, 2.0]]
    changed = {name: None if value is None else torch.tensor(value) for name, value in changes.items()}
    with pytest.raises(RecoupError, match=message):
        decode(replace(CODES, **changed), BlockFloat())


def test_fields_and_dimensions_that_do_not_belong() -> None:
    with pytest.raises(RecoupError, match="must have the fields elements, shared and no others"):
        decode(CODES, BlockFloat(shared="max"))
    with pytest.raises(RecoupError, match=r"BlockCodes: shared is a torch\.float32; it must be an int64 tensor"):
        BlockCodes(CODES.elements, torch.ones(1, 2))
    with pytest.raises(RecoupError, match="BlockCodes: index is a int; it must be"):
        replace(CODES, index=0)
    for call in (lambda f: encode(torch.ones(2, 2), f), lambda f: decode(CODES, f)):
        with pytest.raises(RecoupError, match=r"dim=2, .*: dim must be a dimension of .*, whose shape is \[\d, \d\]"):
            call(BlockFloat(dim=2))
