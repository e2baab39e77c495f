"""Float activations to 8-bit codes, unsigned or signed: the emitted kernel that every operand starts with."""

import ctypes
from functools import cache
from typing import Any

from llvmlite import ir

from recoup.kernels import llvm
from recoup.nbsmt.faults import NEGATIVE, NOT_FINITE
from recoup.nbsmt.ports import UNSIGNED

LANES = 64
"""Codes per vector: a full vector register of bytes with AVX-512; LLVM splits it on narrower machines."""

SAFE_SCALES = 2.0**-64, 2.0**64
"""Scales for which the fast quotient's intermediate results neither overflow nor become subnormal."""

FLOATS = 16  # floats per step: 4 vectors of 4 on the narrowest machine

BYTE, COUNT, FLOAT = ir.IntType(8), ir.IntType(64), ir.FloatType()
SIGNATURE = ir.FunctionType(ir.IntType(32), [FLOAT.as_pointer(), BYTE.as_pointer(), COUNT, FLOAT])


@cache
def quantise_kernel(fast: bool, target: llvm.Target | None = None, zero: int = UNSIGNED) -> llvm.Native:
    """``quantise(x float*, codes uint8*, count, scale) -> faults``, compiled; see `quantise_module`."""
    types = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_float]
    return llvm.Native(quantise_module(fast, zero), "quantise", ctypes.c_int32, types, target)


def quantise_module(fast: bool, zero: int = UNSIGNED) -> ir.Module:
    """Code for codes: code = clip(round half even(RN(x / scale)) + zero, 0, 255).

    It returns the faults: `NEGATIVE` for some x < 0 where zero is 0, `NOT_FINITE` for some NaN or infinity. What lies
    below the range, and NaN, becomes 0, +infinity 255.

    ``fast`` computes the same quotient RN(x/s) by four multiplications, several times as fast as a division: with
    h = RN(1/s) and l = RN(1/s - h), q = RN(x h + RN(x l)) is one of the two floats around x/s, and for such q
    RN(q + (x - q s) h) = RN(x/s) (Markstein's theorem), if nothing over- or underflows: scales in `SAFE_SCALES`.
    """
    arguments: dict[str, Any] = dict(zip(("x", "codes", "count", "scale"), SIGNATURE.args, strict=True))
    module, b, arg = llvm.function("quantise", SIGNATURE.return_type, arguments)
    quantiser = _Quantiser(b, arg["scale"], fast, zero)
    none = quantiser.zero
    spare = b.alloca(quantiser.vector, LANES // FLOATS), b.alloca(ir.VectorType(BYTE, LANES))
    whole = b.and_(arg["count"], COUNT(-LANES))
    with llvm.loop(b, COUNT(0), whole, LANES, [none, none]) as turn:
        at = b.gep(arg["x"], [turn.index]), b.gep(arg["codes"], [turn.index])
        turn.carry(*quantiser.write(*at, *turn.values))
    some_left = b.zext(b.icmp_signed("<", whole, arg["count"]), COUNT)
    with llvm.loop(b, COUNT(0), some_left, 1, turn.values) as last:
        # The rest goes through memory of our own, so that neither input nor output is touched beyond its end.
        x, codes = (b.bitcast(memory, kind.as_pointer()) for memory, kind in zip(spare, (FLOAT, BYTE), strict=True))
        for i in range(LANES // FLOATS):
            b.store(none, b.gep(spare[0], [COUNT(i)]))
        _copy(b, b.gep(arg["x"], [whole]), x, b.sub(arg["count"], whole))
        last.carry(*quantiser.write(x, codes, *last.values))
        _copy(b, codes, b.gep(arg["codes"], [whole]), b.sub(arg["count"], whole))
    b.ret(quantiser.faults(*last.values))
    return module


def _copy(b: ir.IRBuilder, source: Any, to: Any, count: Any) -> None:
    with llvm.loop(b, COUNT(0), count) as i:
        b.store(b.load(b.gep(source, [i.index])), b.gep(to, [i.index]))


class _Quantiser:
    """Code for the quotient, its rounding and the faults of 64 floats."""

    def __init__(self, b: ir.IRBuilder, scale: Any, fast: bool, zero: int) -> None:
        self.b, self.fast, self.signed = b, fast, zero > 0
        self.vector = ir.VectorType(FLOAT, FLOATS)
        # From 2^23 on floats are whole: the low byte of 2^23 + zero + value is the code, as zero is even.
        constants = (0.0, float(-zero), float(255 - zero), 2.0**23 + zero)
        self.zero, self.bottom, self.top, self.round = (ir.Constant(self.vector, [v] * FLOATS) for v in constants)
        self.scale = llvm.splat(b, scale, FLOATS)
        if fast:
            high = b.fdiv(FLOAT(1.0), scale)
            low = b.fmul(llvm.fma(b, b.fneg(scale), high, FLOAT(1.0)), high)
            self.high, self.low = llvm.splat(b, high, FLOATS), llvm.splat(b, low, FLOATS)
            self.limits = tuple(llvm.splat(b, b.fmul(scale, FLOAT(float(v))), FLOATS) for v in (-zero, 255 - zero))

    def write(self, source: Any, to: Any, least: Any, poison: Any) -> tuple[Any, Any]:
        """Store 64 codes. ``least``: the least x so far; ``poison``: zero until a NaN or an infinity makes it NaN."""
        b = self.b
        parts: list[Any] = []
        for i in range(0, LANES, FLOATS):
            address = b.bitcast(b.gep(source, [COUNT(i)]), self.vector.as_pointer())
            x = b.load(address, align=4)
            if not self.signed:
                least = b.select(b.fcmp_ordered("<", x, least), x, least)
            poison = llvm.fma(b, x, self.zero, poison) if self.fast else b.fadd(poison, b.fmul(x, self.zero))
            rounded = b.fadd(self.quotient(x), self.round)
            parts.append(b.bitcast(rounded, ir.VectorType(ir.IntType(32), FLOATS)))
        while len(parts) > 1:
            both = range(2 * parts[0].type.count)
            parts = [llvm.shuffle(b, a, both, c) for a, c in zip(parts[::2], parts[1::2], strict=True)]
        codes: Any = b.trunc(parts[0], ir.VectorType(BYTE, LANES))
        b.store(codes, b.bitcast(to, codes.type.as_pointer()), align=1)
        return least, poison

    def quotient(self, x: Any) -> Any:
        """RN(x / scale) in the codes' range; clipped before multiplying, so that nothing overflows."""
        if not self.fast:
            return self._clip(self.b.fdiv(x, self.scale), self.bottom, self.top)
        b, x = self.b, self._clip(x, *(self.limits if self.signed else (self.zero, self.limits[1])))
        q = llvm.fma(b, x, self.high, b.fmul(x, self.low))
        return llvm.fma(b, llvm.fma(b, b.fneg(q), self.scale, x), self.high, q)

    def _clip(self, x: Any, bottom: Any, top: Any) -> Any:
        b = self.b
        x = b.select(b.fcmp_ordered(">", x, bottom), x, bottom)
        return b.select(b.fcmp_ordered("<", x, top), x, top)

    def faults(self, least: Any, poison: Any) -> Any:
        """The fault bits, from what `write` gathered."""
        b, lanes = self.b, ir.IntType(FLOATS)
        negative = b.bitcast(b.fcmp_ordered("<", least, self.zero), lanes)
        invalid = b.bitcast(b.fcmp_unordered("uno", poison, poison), lanes)
        result = SIGNATURE.return_type(0)
        for found, bit in ((negative, NEGATIVE), (invalid, NOT_FINITE)):
            result = b.select(b.icmp_unsigned("!=", found, lanes(0)), b.or_(result, result.type(bit)), result)
        return result
