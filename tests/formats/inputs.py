"""Inputs that the format tests share: bit patterns, special values, hypothesis strategies, and what equality means."""

# ruff: noqa: A002 - format is the word of the contract and of the field

import torch
from hypothesis import strategies as st
from torch import Tensor

from recoup.formats import BlockFloat, Float, Int

SPECIAL = (0.0, 1.401298464324817e-45, 1.1754942106924411e-38, 1.1754943508222875e-38, 3.4028234663852886e38, torch.inf)
FLOAT64_SPECIAL = (5e-324, 2.2250738585072014e-308, 1.7976931348623157e308)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int64)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal in every bit, the sign of zero included; any NaN equals any NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    different = (bits(actual.contiguous()) != bits(expected.contiguous())) & ~(actual.isnan() & expected.isnan())
    assert not different.any(), (
        f"{different.sum()} differ, the first: {actual[different][:4].tolist()}, not {expected[different][:4].tolist()}"
    )


def patterns(dtype: torch.dtype, count: int = 3_000, seed: int = 0) -> Tensor:
    """Random bit patterns, numbers of everyday size with ties among them, and special values."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.float32:
        random = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, generator=generator).view(dtype)
    else:
        random = torch.randint(-(2**62), 2**62, (count,), generator=generator).mul(2).view(dtype)
    everyday = torch.randn(count, dtype=dtype, generator=generator)
    everyday *= torch.exp2(torch.randint(-24, 24, (count,), generator=generator).to(dtype))
    ties = torch.arange(-1024, 1024, dtype=dtype) / 32
    special = torch.tensor([*SPECIAL, *(FLOAT64_SPECIAL if dtype == torch.float64 else ()), torch.nan], dtype=dtype)
    return torch.cat([random, everyday, ties, special, -special])


def float16_patterns() -> Tensor:
    """Every float16, as float32."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).float()


def bfloat16_neighbourhoods() -> Tensor:
    """Every bfloat16 as float32, and beside each a tie, its neighbours and the last float32 before the next."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32)[:, None] << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    return (high | low).view(torch.float32).flatten()


def random_for(x: Tensor, seed: int = 1) -> Tensor:
    """Random integers for stochastic rounding, as the operators draw them."""
    generator = torch.Generator().manual_seed(seed)
    dtype, above = (torch.int32, 1 << 30) if x.dtype == torch.float32 else (torch.int64, 1 << 62)
    return torch.randint(above, x.shape, dtype=dtype, generator=generator)


@st.composite
def small_floats(draw: st.DrawFn, rounding: tuple[str, ...] = ("nearest", "zero")) -> Float:
    """Formats whose values can be listed."""
    mantissa = draw(st.integers(0, 4))
    low = draw(st.integers(-12, 8))
    high = low + draw(st.integers(0, 8))
    steps = 1 << mantissa
    top = draw(st.integers(0, steps - 1))
    return Float(
        mantissa,
        low,
        high,
        subnormals=draw(st.booleans()),
        rounding=draw(st.sampled_from(rounding)),  # type: ignore[arg-type]
        overflow=draw(st.sampled_from(("saturate", "inf"))),
        largest=draw(st.sampled_from((None, 2.0**high * (1 + top / steps)))),
    )


@st.composite
def numbers_near(draw: st.DrawFn, format: Float) -> float:
    """Values of the format, ties between them, their neighbours, and anything at all."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.floats(width=32) | st.floats())
    scale = 2.0 ** (draw(st.integers(format.min_exponent - 3, format.max_exponent + 1)) - format.mantissa - 2)
    value = draw(st.integers(-(8 << format.mantissa), 8 << format.mantissa)) * scale
    return value * draw(st.sampled_from((1.0, 1.0, 1 - 2.0**-23, 1 + 2.0**-23, 1 - 2.0**-52, 1 + 2.0**-52)))


ints = st.builds(Int, bits=st.integers(1, 24), signed=st.booleans(), overflow=st.sampled_from(("saturate", "wrap")))
block_floats = st.builds(
    BlockFloat,
    exponent=st.integers(2, 8),
    significand=st.integers(1, 24),
    block=st.integers(1, 9),
    dim=st.just(0),
    shared=st.sampled_from(("outlier", "max")),
    rounding=st.sampled_from(("zero", "nearest")),
)
