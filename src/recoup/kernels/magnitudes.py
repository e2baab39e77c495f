"""The largest and the smallest magnitude of a float32 array, in one pass over its bits."""

import ctypes
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from torch import Tensor

from recoup.kernels.llvm import Native, function, loop

I32, I64 = ir.IntType(32), ir.IntType(64)
LANES = 32
MAGNITUDE = 0x7FFFFFFF


def magnitudes(x: Tensor) -> tuple[int, int]:
    """Bits of the largest magnitude and of the smallest that is not zero; both zero if there is none.

    Magnitudes compare as their bits do; NaN and infinities are above every other number.
    """
    plain = x.detach()
    if not plain.is_contiguous():
        plain = plain.mT if plain.dim() > 1 and plain.mT.is_contiguous() else plain.contiguous()
    ends = np.empty(2, dtype=np.int32)
    _kernel()(plain.data_ptr(), plain.numel(), ends.ctypes.data)
    return int(ends[0]), int(ends[1])


@cache
def _kernel() -> Native:
    integers = I32.as_pointer()
    module, b, v = function("magnitudes", ir.VoidType(), {"x": integers, "n": I64, "ends": integers})
    lanes = ir.VectorType(I32, LANES)
    mask = ir.Constant(lanes, [I32(MAGNITUDE)] * LANES)
    one = ir.Constant(lanes, [I32(1)] * LANES)
    whole = b.and_(v["n"], I64(-LANES))
    start = [ir.Constant(lanes, None), ir.Constant(lanes, [I32(-1)] * LANES)]
    with loop(b, I64(0), whole, LANES, start) as blocks:
        x = b.load(b.bitcast(b.gep(v["x"], [blocks.index]), lanes.as_pointer()), align=4)
        blocks.carry(*_wider(b, b.and_(x, mask), one, *blocks.values))
    high, low = blocks.values
    single = I32(1)
    ends: list[Any] = [I32(0), I32(-1)]
    for lane in range(LANES):
        size = b.extract_element(high, I32(lane))
        ends[0] = b.select(b.icmp_signed(">", size, ends[0]), size, ends[0])
        size = b.extract_element(low, I32(lane))
        ends[1] = b.select(b.icmp_unsigned("<", size, ends[1]), size, ends[1])
    with loop(b, whole, v["n"], 1, ends) as rest:
        size = b.and_(b.load(b.gep(v["x"], [rest.index])), I32(MAGNITUDE))
        rest.carry(*_wider(b, size, single, *rest.values))
    b.store(rest.values[0], v["ends"])
    b.store(b.add(rest.values[1], single), b.gep(v["ends"], [I64(1)]))
    b.ret_void()
    return Native(module, "magnitudes", None, [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p])


def _wider(b: ir.IRBuilder, size: Any, one: Any, high: Any, low: Any) -> tuple[Any, Any]:
    """The largest size, and the smallest less one, unsigned: zero becomes the largest number of all."""
    less = b.sub(size, one)
    high = b.select(b.icmp_signed(">", size, high), size, high)
    return high, b.select(b.icmp_unsigned("<", less, low), less, low)
