"""NB-SMT's convolutions on the CPU: unsigned 8-bit operands times signed 8-bit weights, summed exactly.

On CPUs with 8-bit dot products (VNNI, AMX) oneDNN's integer convolution is faster than a float convolution of the same
layer. CPUs without them saturate in 16 bits, silently: `probe` finds out by provoking it, and then float32 (float64
where sums may leave 24 bits) does the work, with the same result.

Legend: N images, O output channels, C channels of the operand (all groups together), H W / h w input / output sizes.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.errors import RecoupError
from recoup.kernels import llvm
from recoup.nbsmt.operand import operands
from recoup.network.checks import float32_products

__all__ = ["Backend", "Int8Convolution", "exact_convolution", "operands", "probe"]

Pair = tuple[int, int]


class Int8Convolution:
    """A convolution of 8-bit integers with weights packed for one input shape.

    Called with uint8 [N, C, H, W] in channels_last strides it returns float32 [N, O, h, w] in channels_last: the exact
    sums of products, rounded to float32 (so exact below 2^24). Padding is with zeros. The sums are kept in 32 bits,
    that they fit is the caller's to check.

    The operator runs with unit scales, because its kernels round a real scale differently from one CPU to the next.

    Args:
        weight: int8 [O, C / groups, kh, kw].
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d.
        shape: of the input. Packing for another shape would re-arrange the weights in every call.
    """

    def __init__(
        self, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int, shape: tuple[int, ...]
    ) -> None:
        self.shape = tuple(shape)
        self._ones = torch.ones(weight.shape[0], dtype=torch.float32)
        self._zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
        self._geometry = (list(stride), list(padding), list(dilation), groups)
        with _default_of_floats():
            self._packed: Tensor = torch.ops.onednn.qconv_prepack(
                weight.contiguous(), self._ones, 1.0, 0, *self._geometry, list(shape)
            )

    def __call__(self, operand: Tensor) -> Tensor:
        if operand.shape != self.shape:
            raise RecoupError(f"Int8Convolution: packed for input {list(self.shape)}; got {list(operand.shape)}")
        scales = (self._packed, self._ones, self._zeros, None)
        output = (1.0, 0, torch.float32, "none", [], "")
        return torch.ops.onednn.qconv2d_pointwise(operand, 1.0, 0, *scales, *self._geometry, *output)


@contextmanager
def _default_of_floats() -> Iterator[None]:
    """float32 as torch's default dtype, of which oneDNN's packing makes scales of its own: it fails on others."""
    before = torch.get_default_dtype()
    if before == torch.float32:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def exact_convolution(
    operand: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int, bound: int
) -> Tensor:
    """The same sums as `Int8Convolution` by a convolution of floats, for any CPU.

    Args:
        operand: whole numbers, uint8 or float32 [N, C, H, W]: codes 0..255 or signed values; channels_last is fastest.
        weight: int8 [O, C / groups, kh, kw].
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d.
        bound: no partial sum exceeds this magnitude. float32 is exact below 2^24; from there on float64 is used, and
            its result rounded to float32.

    Returns:
        float32 [N, O, h, w], channels_last.
    """
    sums = whole_convolution(operand, weight, stride, padding, dilation, groups, bound)
    return sums.to(torch.float32).contiguous(memory_format=torch.channels_last)


def whole_convolution(
    operand: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int, bound: int
) -> Tensor:
    """The sums of `exact_convolution` as whole numbers, in float32 where it holds them, else in float64."""
    dtype = torch.float32 if bound < 2**24 and _float32_is_plain() else torch.float64
    last = torch.channels_last
    x, w = operand.to(dtype, memory_format=last), weight.to(dtype, memory_format=last)
    with float32_products(x):
        return F.conv2d(x, w, None, stride, padding, dilation, groups)


def _float32_is_plain() -> bool:
    """Whether float32 convolutions multiply and add only: without oneDNN torch may take NNPACK's Winograd transform."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


@dataclass(frozen=True, slots=True)
class Backend:
    """How this CPU runs NB-SMT convolutions.

    Attributes:
        name: ``int8`` (oneDNN's integer convolution) or ``float32`` (`exact_convolution`).
        isa: the 8-bit dot products oneDNN may use here: ``AMX``, ``AVX-512 VNNI``, ``AVX2 VNNI``, ... or ``none``.
        reason: why this one was chosen, a sentence.
    """

    name: str
    isa: str
    reason: str


@cache
def probe() -> Backend:
    """Find out, once per process, whether 8-bit convolutions are exact on this CPU.

    All activations 255 and all weights 127 or -128 overflow the 16-bit pair sums of CPUs without 8-bit dot products,
    which random data may not.
    """
    isa = _instructions()
    if not all(hasattr(torch.ops.onednn, name) for name in ("qconv_prepack", "qconv2d_pointwise")):
        return Backend("float32", isa, "this build of torch has no onednn.qconv2d_pointwise")
    try:
        wrong = next((case for case in _CASES if not _exact(*case)), None)
    except (RuntimeError, NotImplementedError) as error:  # torch's, of an operator without a kernel here: it is told
        return Backend("float32", isa, f"onednn.qconv2d_pointwise refused: {str(error).splitlines()[0]}")
    if wrong is None:
        return Backend("int8", isa, f"oneDNN's u8 x s8 convolution is exact on this CPU ({isa})")
    limit = f" under {_LIMIT}={_limit()}" if _limit() else ""
    return Backend(
        "float32", isa, f"oneDNN's u8 x s8 convolution saturates on this CPU{limit}: no 8-bit dot products (VNNI, AMX)"
    )


# Weight shape, size of the input, stride, groups: ragged, blocked and depthwise convolutions, and a linear layer.
_CASES: tuple[tuple[tuple[int, ...], int, int, int], ...] = (
    ((32, 64, 1, 1), 5, 1, 1),
    ((16, 32, 3, 3), 8, 1, 1),
    ((5, 8, 3, 3), 9, 2, 1),
    ((33, 256, 3, 3), 4, 1, 1),
    ((16, 1, 3, 3), 6, 1, 16),
    ((10, 512, 1, 1), 1, 1, 1),
)


def _exact(weight_shape: tuple[int, ...], size: int, stride: int, groups: int) -> bool:
    """Whether one convolution is: an image of 255s and a mixed one; filters of 127s, of -128s and mixed ones."""
    shape = (2, weight_shape[1] * groups, size, size)
    operand = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    operand[0] = 255
    operand[1] = _mixed(shape[1:], 37)
    weight = (_mixed(weight_shape, 89) - 128).to(torch.int8)
    weight[0::3], weight[1::3] = 127, -128
    padding = weight_shape[2] // 2
    geometry = ((stride, stride), (padding, padding), (1, 1), groups)
    sums = Int8Convolution(weight, *geometry, shape)(operand)
    return torch.equal(sums, exact_convolution(operand, weight, *geometry, bound=2**31))


def _mixed(shape: tuple[int, ...], step: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.int32).mul(step).remainder(256).view(shape)


_LIMIT = "ONEDNN_MAX_CPU_ISA"


def _limit() -> str:
    return os.environ.get(_LIMIT, os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()


def _instructions() -> str:
    """The best 8-bit dot product instructions that this CPU has and oneDNN's limit leaves."""
    limit = _limit()
    unlimited = limit in ("", "ALL", "DEFAULT")
    newer = limit.startswith(("AVX512_CORE_", "AVX10"))
    allowed: dict[str, tuple[str, Callable[[], bool]]] = {
        "AMX": ("amx-int8", lambda: unlimited or "AMX" in limit),
        "AVX-512 VNNI": ("avx512vnni", lambda: unlimited or newer),
        "AVX2 VNNI": ("avxvnni", lambda: unlimited or limit.startswith("AVX2_VNNI")),
        "Arm i8mm": ("i8mm", lambda: True),
        "Arm dot product": ("dotprod", lambda: True),
    }
    features = llvm.host().features
    return next((name for name, (feature, legal) in allowed.items() if feature in features and legal()), "none")
