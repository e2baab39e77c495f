"""`quantize` and its operators: ``recoup::quantize_float``, ``quantize_int`` and ``quantize_block``.

The operators take a format's fields as plain arguments, so that a traced graph shows them. Their derivative passes the
gradient straight through: it is the identity everywhere, where x saturates too.
"""

# ruff: noqa: A001, A002 - format is the word of the contract and of the field

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.formats import cpu
from recoup.formats.constants import kernel_dtype
from recoup.formats.spec import BlockFloat, Float, Int
from recoup.kernels.operators import needs_triton, register
from recoup.network.checks import instance, strided

__all__ = ["quantize"]

# The random integers of stochastic rounding per dtype: their own dtype, and one above the largest.
RANDOM = {torch.float32: (torch.int32, 1 << 30), torch.float64: (torch.int64, 1 << 62)}
WIDENING = 32  # bits between the two

Format = Float | Int | BlockFloat
Backend = Callable[[Tensor, Format, Tensor | None], Tensor]


def quantize(x: Tensor, format: Format, generator: torch.Generator | None = None) -> Tensor:
    """``x`` rounded to the values of ``format``.

        y_i = round(x_i),   dL/dx = dL/dy

    The result has x's shape, dtype and, where x is dense, strides. It is exact: subnormals count whatever the
    processor's flush-to-zero mode, and the bits are the same on every device and for every number of threads. `Float`,
    `Int` and `BlockFloat` define rounding, overflow, NaN and infinities. Gradients pass straight through.

    For float32 and a format wider than that, the same in float64: a finite x gives what the format says, while an
    infinity that would saturate above float32's range stays an infinity.

    Args:
        x: float32 or float64, on the CPU or a CUDA device (which needs triton).
        format: a `Float`, an `Int` or a `BlockFloat`.
        generator: draws stochastic rounding's random integers (30 bits an element for float32, 62 for float64), one
            for each element in the order of its indices; None is torch's default generator. Other roundings draw none.

    Raises:
        RecoupError: another dtype or device; a format that could turn a finite float32 into a value that is no
            float32; a `BlockFloat` whose dim x lacks; a generator on another device than x.

    >>> quantize(torch.tensor([0.1, 1.25, 1e9]), Float.parse("e5m2"))
    tensor([9.3750e-02, 1.2500e+00, 5.7344e+04])
    """
    if not isinstance(x, Tensor) or x.dtype not in RANDOM or x.device.type not in ("cpu", "cuda", "meta"):
        raise RecoupError(f"quantize: x is {_kind(x)}; it must be a float32 or float64 tensor on cpu or cuda")
    strided(x, "quantize", "x")
    if generator is not None:
        instance(generator, torch.Generator, "quantize", "generator", "torch.Generator().manual_seed(0)")
    random = None
    if isinstance(format, Int):
        return _quantize_int(x, format.bits, format.signed, format.overflow)
    if isinstance(format, Float):
        if format.rounding == "stochastic":
            random = _random(x, generator)
        return _quantize_float(
            x,
            random,
            format.mantissa,
            format.min_exponent,
            format.max_exponent,
            format.subnormals,
            format.rounding,
            format.overflow,
            format.largest,
        )
    if not isinstance(format, BlockFloat):
        raise RecoupError(
            f"quantize: format is {format!r}; it must be a Float, an Int or a BlockFloat, such as Float.parse('e5m2')"
        )
    if x.dim() == 0 and format.dim in (0, -1):  # torch's convention: a scalar has one dimension of one element
        return quantize(x.unsqueeze(0), format, generator).squeeze(0)
    if not -x.dim() <= format.dim < x.dim():
        raise RecoupError(f"quantize: {format!r}: dim must be a dimension of x, whose shape is {list(x.shape)}")
    if format.rounding == "stochastic":
        random = _random(x, generator)
    return _quantize_block(
        x, random, format.exponent, format.significand, format.block, format.dim, format.shared, format.rounding
    )


def _kind(x: Any) -> str:
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    convert = "; convert it with .float()" if x.dtype in (torch.float16, torch.bfloat16) else ""
    return f"a {str(x.dtype).removeprefix('torch.')} tensor on {x.device.type}{convert}"


def _random(x: Tensor, generator: torch.Generator | None) -> Tensor:
    dtype, above = RANDOM[x.dtype]
    if generator is not None and generator.device.type != x.device.type:
        raise RecoupError(f"quantize: the generator is on {generator.device}; it must be on x's device, {x.device}")
    if generator is None:  # not passed on: that variant cannot be traced with dynamic shapes
        return torch.randint(above, x.shape, dtype=dtype, device=x.device)
    return torch.randint(above, x.shape, dtype=dtype, device=x.device, generator=generator)


def _gpu_quantize() -> Backend:
    with needs_triton(
        "a CUDA tensor", "quantize: {who} needs triton, which is not installed; pip install 'recoup[gpu]'"
    ):
        from recoup.formats import gpu
    return gpu.quantize


def _operator(name: str, family: type[Format], fields: str, random: bool) -> Callable[..., Tensor]:
    """Define ``recoup::name(x, <random,> fields)`` for CPU, CUDA, tracing, autograd and vmap."""

    @lru_cache(maxsize=1024)
    def plan(dtype: torch.dtype, *values: Any) -> tuple[Format, torch.dtype]:
        format = family(*values)
        return format, kernel_dtype(format, dtype)

    def run(backend: Backend, x: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        format, dtype = plan(x.dtype, *arguments[random:])
        chance = arguments[0] if random else None
        if dtype == x.dtype:
            return backend(x, format, chance)
        chance = None if chance is None else chance.long() << WIDENING
        return backend(x.to(dtype), format, chance).to(x.dtype)

    def fake(x: Tensor, *arguments: Any) -> Tensor:
        plan(x.dtype, *arguments[random:])  # so that what cannot be honoured is refused where it is traced
        return torch.empty_like(x)

    def batched(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        def batch_first(tensor: Tensor | None, dim: int | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        tensors = [batch_first(arguments[i], in_dims[i]) for i in range(1 + random)]
        format = family(*arguments[1 + random :])
        if isinstance(format, BlockFloat) and format.dim >= 0:
            format = format.replace(dim=format.dim + 1)
        return operator(*tensors, *format.to_dict().values()), 0

    nothing = (None,) * (random + len(fields.split(",")))
    operator = register(
        name,
        {
            "CPU": lambda x, *arguments: run(cpu.quantize, x, arguments),
            "CUDA": lambda x, *arguments: run(_gpu_quantize(), x, arguments),
        },
        fake,
        schema=f"(Tensor x, {'Tensor? random, ' if random else ''}{fields}) -> Tensor",
        backward=lambda _, gradient: (gradient, *nothing),
        vmap=batched,
        waits=False,
    )
    return operator


_quantize_float = _operator(
    "quantize_float",
    Float,
    "int mantissa, int min_exponent, int max_exponent, bool subnormals, str rounding, str overflow, float? largest",
    random=True,
)
_quantize_int = _operator("quantize_int", Int, "int bits, bool signed, str overflow", random=False)
_quantize_block = _operator(
    "quantize_block",
    BlockFloat,
    "int exponent, int significand, int block, int dim, str shared, str rounding",
    random=True,
)
