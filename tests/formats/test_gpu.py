"""The Triton kernels against the reference, bit for bit: interpreted everywhere, compiled where there is a GPU.

The interpreter is chosen when triton is imported, so it runs in a process of its own.
"""

# ruff: noqa: A001, A002 - format is the word of the contract and of the field

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from recoup.formats import BlockFloat, Float, Int, quantize, reference
from tests.formats.inputs import assert_same_bits, patterns, random_for
from tests.fresh import CONTEXT

pytest.importorskip("triton")

Format = Float | Int | BlockFloat
DTYPES = (torch.float32, torch.float64)
FLOATS = [
    Float.parse("e4m3fn"),
    Float.parse("e4m3fn").replace(overflow="inf"),
    Float.parse("fp10_154"),
    Float.parse("bfloat16").replace(rounding="zero", overflow="inf"),
    Float.parse("float32").replace(overflow="inf"),
    Float(0, -3, 4),
    Float.ieee(5, 2, rounding="stochastic", overflow="inf"),
    Float.ieee(8, 3, rounding="stochastic", subnormals=False),
]
INTEGERS = [
    Int(8),
    Int(24, signed=False),
    Int(5, overflow="wrap"),
    Int(24, signed=False, overflow="wrap"),
]
BLOCKS = [
    BlockFloat(exponent, 5, 3, dim, shared, rounding)  # type: ignore[arg-type]
    for exponent, dim, shared, rounding in itertools.chain(
        itertools.product((5,), (1, -1), ("outlier", "max"), ("zero", "nearest", "stochastic")),
        [(8, 0, "outlier", "nearest"), (8, 0, "max", "stochastic")],
    )
]


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def _quantize(x: np.ndarray, format: Format, random: np.ndarray | None) -> np.ndarray:
    from recoup.formats import gpu

    chance = None if random is None else torch.from_numpy(random)
    return gpu.quantize(torch.from_numpy(x), format, chance).numpy()


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[[Tensor, Format, Tensor | None], Tensor]]:
    with ProcessPoolExecutor(1, mp_context=CONTEXT, initializer=_interpret) as pool:

        def quantize(x: Tensor, format: Format, random: Tensor | None) -> Tensor:
            chance = None if random is None else random.numpy()
            return torch.from_numpy(pool.submit(_quantize, x.numpy(), format, chance).result())

        yield quantize


def _chance(x: Tensor, format: Format) -> Tensor | None:
    return random_for(x) if not isinstance(format, Int) and format.rounding == "stochastic" else None


def _input(dtype: torch.dtype, format: Format) -> Tensor:
    x = patterns(dtype, count=800)
    if isinstance(format, BlockFloat):
        index = torch.randint(x.numel(), (2, 7, 9, 3), generator=torch.Generator().manual_seed(0))
        return x[index]
    return torch.cat([x[:1600], x[1600 :: 1 + 6], x[-40:]])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", [*FLOATS, *INTEGERS, *BLOCKS], ids=repr)
def test_interpreted_kernels_equal_the_reference(
    interpreted: Callable[[Tensor, Format, Tensor | None], Tensor], format: Format, dtype: torch.dtype
) -> None:
    x = _input(dtype, format)
    chance = _chance(x, format)
    assert_same_bits(interpreted(x, format, chance), reference.quantize(x, format, chance))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", [*FLOATS, *INTEGERS, *BLOCKS], ids=repr)
def test_compiled_kernels_equal_the_reference(format: Format, dtype: torch.dtype) -> None:
    from recoup.formats import gpu

    x = _input(dtype, format)
    chance = _chance(x, format)
    on_gpu = gpu.quantize(x.cuda(), format, None if chance is None else chance.cuda())
    assert_same_bits(on_gpu.cpu(), reference.quantize(x, format, chance))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_operators_on_a_gpu() -> None:
    x = torch.randn(3, 8, 5, 5, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
    for format in (Float.parse("e5m2"), Int(), BlockFloat(), Float.lba(8, 7, bias=127)):
        y = quantize(x, format)
        assert y.stride() == x.stride()
        assert_same_bits(y.detach().cpu(), quantize(x.detach().cpu(), format))
    generator = torch.Generator("cuda").manual_seed(0)
    assert quantize(x, Float.ieee(5, 2, rounding="stochastic"), generator=generator).device.type == "cuda"


def _compile_for_hopper() -> list[str]:
    """Machine code for every kernel and variant; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from recoup.formats import gpu

    made = []
    for element, fraction in (("i32", 23), ("i64", 52)):
        variants = [
            (gpu._float_kernel, {"STOCHASTIC": True, "LANES": 1024}),
            (gpu._float_kernel, {"STOCHASTIC": False, "LANES": 1024}),
            (gpu._int_kernel, {"LOW": -128.0, "HIGH": 127.0, "SPAN": 256.0, "WRAP": True, "LANES": 1024}),
            (gpu._block_kernel, {"STOCHASTIC": True, "OUTLIER": True, "LANES": 256}),
        ]
        for kernel, values in variants:
            constants = {"FRACTION": fraction, **values}
            signature = {}
            for name in kernel.arg_names:
                wide = "i64" if fraction == 52 and name in ("largest", "top", "beyond", "infinite_from") else "i32"
                signature[name] = f"*{element}" if name.endswith("_ptr") else wide
            signature |= dict.fromkeys(constants, "constexpr")
            source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()})
            options = {"enable_fp_fusion": False}
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            made += [kernel.__name__] * bool(compiled.asm["cubin"])
    return made


@pytest.mark.slow
def test_kernels_compile_without_a_gpu() -> None:
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        made = pool.submit(_compile_for_hopper).result()
    assert made == ["_float_kernel", "_float_kernel", "_int_kernel", "_block_kernel"] * 2
