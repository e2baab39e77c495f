"""The CPU kernels against the reference, bit for bit."""

# ruff: noqa: A001, A002 - format is the word of the contract and of the field

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recoup.formats import BlockFloat, Float, Int, cpu, reference
from tests.formats.inputs import assert_same_bits, block_floats, patterns, random_for, small_floats

DTYPES = (torch.float32, torch.float64)
OPTIONS = list(
    itertools.product((True, False), ("nearest", "zero", "stochastic"), ("saturate", "inf"))
)  # subnormals, rounding, overflow

FLOATS = {
    "e5m2": Float.ieee(5, 2),
    "e4m3fn": Float.parse("e4m3fn"),
    "one binade, no mantissa": Float(0, 0, 0),
    "no mantissa": Float(0, -3, 4),
    "bfloat16": Float.parse("bfloat16"),
    "float32": Float.parse("float32"),
    "float32's bottom": Float(23, -126, -126),
    "float32's top": Float(4, 100, 127, largest=2.0**127),
    "an odd incomplete top": Float(3, -6, 8, largest=416.0),
    "the widest of the shorter way to nearest": Float(3, -122, 107),
    "just too wide for it": Float(3, -123, 108),
}
FLOAT64_ONLY = {
    "float64": Float.parse("float64"),
    "no mantissa, every binade": Float(0, -1022, 1023),
    "float64's bottom": Float(52, -1022, -1022),
    "wider than float32": Float(30, -140, 200),
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("dtype", "name"), [*itertools.product(DTYPES, FLOATS), *((torch.float64, name) for name in FLOAT64_ONLY)]
)
def test_floats(dtype: torch.dtype, name: str) -> None:
    x = patterns(dtype)
    random = random_for(x)
    for subnormals, rounding, overflow in OPTIONS:
        format = {**FLOATS, **FLOAT64_ONLY}[name].replace(subnormals=subnormals, rounding=rounding, overflow=overflow)
        chance = random if rounding == "stochastic" else None
        assert_same_bits(cpu.quantize(x, format, chance), reference.quantize(x, format, chance))


@settings(deadline=None, max_examples=60)
@given(small_floats(("nearest", "zero", "stochastic")), st.integers(0, 9))
def test_small_floats(format: Float, seed: int) -> None:
    for dtype in DTYPES:
        x = patterns(dtype, 300, seed)
        ties = torch.arange(-1000, 1000, dtype=dtype) * 2.0 ** (format.min_exponent - format.mantissa - 2)
        x = torch.cat([x, ties, ties * 2.0 ** (format.max_exponent - format.min_exponent)])
        chance = random_for(x) if format.rounding == "stochastic" else None
        assert_same_bits(cpu.quantize(x, format, chance), reference.quantize(x, format, chance))


@pytest.mark.parametrize(
    ("dtype", "bits"), [*itertools.product(DTYPES, (1, 2, 8, 24)), (torch.float64, 25), (torch.float64, 53)]
)
def test_integers(dtype: torch.dtype, bits: int) -> None:
    x = patterns(dtype)
    for signed, overflow in itertools.product((True, False), ("saturate", "wrap")):
        format = Int(bits, signed, overflow)  # type: ignore[arg-type]
        assert_same_bits(cpu.quantize(x, format), reference.quantize(x, format))


# Few and many columns behind the block dimension, a ragged last block, more than one tile of columns.
SHAPES = [
    ((5,), 0),
    ((37, 6), 1),
    ((3, 9, 5), 1),
    ((6, 10, 5, 4), 1),
    ((4, 5, 7, 3), -1),
    ((7, 600), 0),
    ((2, 9, 1100), 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_blocks(dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for kind in (slice(None), slice(3000, None)):  # bit patterns of every exponent too; or numbers of everyday size
        x = patterns(dtype)[kind]
        x = x[torch.randint(x.numel(), shape, generator=generator)]
        random = random_for(x)
        for shared, rounding, exponent in itertools.product(
            ("outlier", "max"), ("zero", "nearest", "stochastic"), (2, 5, 8)
        ):
            format = BlockFloat(exponent, 5, 4, dim, shared, rounding)  # type: ignore[arg-type]
            chance = random if rounding == "stochastic" else None
            assert_same_bits(cpu.quantize(x, format, chance), reference.quantize(x, format, chance))


@settings(deadline=None, max_examples=60)
@given(st.data(), block_floats, st.lists(st.integers(1, 12), min_size=1, max_size=4), st.sampled_from(DTYPES))
def test_blocks_of_any_shape(data: st.DataObject, format: BlockFloat, shape: list[int], dtype: torch.dtype) -> None:
    format = format.replace(
        dim=data.draw(st.integers(-len(shape), len(shape) - 1)),
        rounding=data.draw(st.sampled_from(("zero", "nearest", "stochastic"))),
    )
    x = patterns(dtype, 1000, seed=data.draw(st.integers(0, 9)))
    x = x[torch.randint(x.numel(), shape, generator=torch.Generator().manual_seed(0))]
    chance = random_for(x) if format.rounding == "stochastic" else None
    assert_same_bits(cpu.quantize(x, format, chance), reference.quantize(x, format, chance))


@pytest.mark.parametrize(
    "format",
    [
        Float.parse("e4m3fn"),
        Float.ieee(5, 2, rounding="stochastic"),
        Int(),
        BlockFloat(),
        BlockFloat(dim=-1),
        BlockFloat(rounding="stochastic"),
    ],
)
def test_threads_do_not_change_the_bits(threads: None, format: Float | Int | BlockFloat) -> None:
    x = patterns(torch.float32, 170_000)[: 6 * 50 * 1000].reshape(6, 50, 1000)
    chance = None if isinstance(format, Int) or format.rounding != "stochastic" else random_for(x)
    torch.set_num_threads(1)
    one = cpu.quantize(x, format, chance)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert_same_bits(cpu.quantize(x, format, chance), one)


@pytest.mark.parametrize(
    "format",
    [Float.parse("bfloat16"), Float.parse("float32"), BlockFloat(8, 24, dim=0), Float(3, -122, 107)],
)
def test_subnormals_count_where_the_processor_flushes_them(format: Float | BlockFloat) -> None:
    x = torch.arange(-(2**24), 2**24, 4097, dtype=torch.int32).view(torch.float32)
    expected = reference.quantize(x, format)
    assert torch.set_flush_denormal(True)
    try:
        actual = cpu.quantize(x, format)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(actual, expected)
