"""The largest and the smallest magnitude of a float32 array, in one pass over its bits."""

import ctypes
from functools import cache
from typing import Any

from llvmlite import ir
from torch import Tensor

from recoup.kernels.llvm import I32, I64, P, loop
from recoup.kernels.signature import Kernel, Signature
from recoup.kernels.vector import Vector

LANES = 32  # two registers of AVX-512, so that two chains of comparisons overlap
MAGNITUDE = 0x7FFFFFFF
Ends = ctypes.c_int32 * 2
ENDS = Signature.of(x=P, n=I64, ends=P)


def magnitudes(x: Tensor) -> tuple[int, int]:
    """Bits of the largest magnitude and of the smallest that is not zero; both zero if there is none.

    Magnitudes compare as their bits do; NaN and infinities are above every other number.
    """
    if not x.is_contiguous():
        x = x.mT if x.dim() > 1 and x.mT.is_contiguous() else x.contiguous()
    ends = Ends()
    _kernel().native.call(x.data_ptr(), x.numel(), ends)
    return ends[0], ends[1]


def both(x: Tensor, y: Tensor) -> tuple[int, int, int, int]:
    """`magnitudes` of two contiguous arrays, or of their transposes."""
    ends, call = (ctypes.c_int32 * 4)(), _kernel().native.call
    call(x.data_ptr(), x.numel(), ends)
    call(y.data_ptr(), y.numel(), ctypes.byref(ends, 8))
    return tuple(ends)  # type: ignore[return-value]


@cache
def _kernel() -> Kernel:
    module = ir.Module("magnitudes")
    v = ENDS.define(module, "magnitudes")
    b, code = v.b, Vector(v.b, LANES)
    one = code.constant(1, code.integers)
    whole = b.and_(v["n"], I64(-LANES))
    with loop(b, I64(0), whole, LANES, [code.constant(0, code.integers), code.constant(-1, code.integers)]) as blocks:
        size = code.magnitude(code.load(v["x"], blocks.index))
        blocks.carry(*_wider(b, size, one, *blocks.values))
    high, low = blocks.values
    ends = [code.reduced(high, code.larger), code.reduced(low, lambda x, y: _least(b, x, y))]
    with loop(b, whole, v["n"], 1, ends) as rest:
        size = b.and_(code.get(v["x"], rest.index, I32), I32(MAGNITUDE))
        rest.carry(*_wider(b, size, I32(1), *rest.values))
    code.put(rest.values[0], v["ends"], I64(0))
    code.put(b.add(rest.values[1], I32(1)), v["ends"], I64(1))
    b.ret_void()
    return Kernel(module, "magnitudes", ENDS)


def _wider(b: ir.IRBuilder, size: Any, one: Any, high: Any, low: Any) -> tuple[Any, Any]:
    """The largest size, and the smallest less one, unsigned: zero becomes the largest number of all."""
    return b.select(b.icmp_signed(">", size, high), size, high), _least(b, b.sub(size, one), low)


def _least(b: ir.IRBuilder, x: Any, y: Any) -> Any:
    return b.select(b.icmp_unsigned("<", x, y), x, y)
