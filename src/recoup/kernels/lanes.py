"""Sixteen float32 lanes in LLVM IR, for LightNorm's emitted passes: loads of a row's end, halves, exact sums.

LLVM cuts sixteen lanes to the registers of the machine. Addresses are opaque pointers and indices of elements.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from recoup.kernels.llvm import loop, shuffle, splat

LANES, FOUND = 16, 64
TOWARD_ZERO = 11  # and no exceptions
I1, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
F, D, P = ir.FloatType(), ir.DoubleType(), ir.PointerType()
VF, VI, VD, VB = (ir.VectorType(kind, LANES) for kind in (F, I32, D, I1))

Pair = tuple[Any, Any]


class Lanes:
    """Vector arithmetic being written.

    Attributes:
        b: the builder.
    """

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def constant(self, value: float, kind: Any = VF) -> Any:
        """The same number in every lane."""
        return ir.Constant(kind, [kind.element(value)] * LANES)

    def everywhere(self, value: Any) -> Any:
        """A scalar in every lane."""
        return splat(self.b, value, LANES)

    def at(self, pointer: Any, index: Any, kind: Any = F) -> Any:
        """The address of an element."""
        return self.b.gep(pointer, [index], source_etype=kind)

    def get(self, pointer: Any, index: Any, kind: Any) -> Any:
        """A scalar."""
        return self.b.load(self.at(pointer, index, kind), typ=kind)

    def put(self, value: Any, pointer: Any, index: Any) -> None:
        """Store a scalar."""
        self.b.store(value, self.at(pointer, index, value.type))

    def load(self, pointer: Any, index: Any, inside: Any = None, kind: Any = VF) -> Any:
        """Sixteen elements, zero where ``inside`` (None: everywhere) does not hold."""
        address = self.at(pointer, index, kind.element)
        if inside is None:
            return self.b.load(address, typ=kind, align=8 if kind is VD else 4)
        function = self._declared("llvm.masked.load.v16f32.p0", VF, [P, I32, VB, VF])
        return self.b.call(function, [address, I32(4), inside, ir.Constant(VF, None)])

    def store(self, value: Any, pointer: Any, index: Any, inside: Any = None) -> None:
        """Store sixteen elements, or those inside."""
        address = self.at(pointer, index, value.type.element)
        if inside is None:
            self.b.store(value, address, align=8 if isinstance(value.type.element, ir.DoubleType) else 4)
            return
        function = self._declared("llvm.masked.store.v16f32.p0", ir.VoidType(), [VF, P, I32, VB])
        self.b.call(function, [value, address, I32(4), inside])

    def stream(self, value: Any, pointer: Any, index: Any) -> None:
        """Store sixteen elements past the caches, at a multiple of 64 bytes."""
        made = self.b.store(value, self.at(pointer, index, value.type.element), align=64)
        made.set_metadata("nontemporal", self.b.module.add_metadata([I32(1)]))

    def _declared(self, name: str, result: Any, arguments: Sequence[Any]) -> Any:
        found = self.b.module.globals.get(name)
        return found or ir.Function(self.b.module, ir.FunctionType(result, arguments), name)

    def bits(self, x: Any) -> Any:
        """Floats as integers."""
        return self.b.bitcast(x, VI)

    def floats(self, x: Any) -> Any:
        """Integers as floats."""
        return self.b.bitcast(x, VF)

    def larger(self, x: Any, y: Any) -> Any:
        """The larger integer, or float where neither is NaN."""
        floats = isinstance(x.type.element, ir.FloatType)
        return self.b.select(self.b.fcmp_ordered(">", x, y) if floats else self.b.icmp_signed(">", x, y), x, y)

    def smaller(self, x: Any, y: Any) -> Any:
        """The smaller."""
        floats = isinstance(x.type.element, ir.FloatType)
        return self.b.select(self.b.fcmp_ordered("<", x, y) if floats else self.b.icmp_signed("<", x, y), x, y)

    def whole(self, x: Any) -> Any:
        """Float32 toward zero to an integer."""
        return self.b.call(self._declared("llvm.trunc.v16f32", VF, [VF]), [x])

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """x y + z in float64, where x y is exact: the same as two operations, which LLVM may then make one."""
        b: Any = self.b  # llvmlite's stubs lack the flags
        return b.fadd(b.fmul(x, y, flags=("contract",)), z, flags=("contract",))

    def fma_toward_zero(self, x: Any, y: Any, z: Any) -> Any:
        """x y + z in float32, rounded once, toward zero: on processors with AVX-512."""
        function = self._declared("llvm.x86.avx512.vfmadd.ps.512", VF, [VF, VF, VF, I32])
        return self.b.call(function, [x, y, z, I32(TOWARD_ZERO)])

    def wide(self, x: Any) -> Any:
        """Float64 lanes."""
        return self.b.fpext(x, VD)

    def narrow(self, x: Any) -> Any:
        """Float32 lanes, to nearest."""
        return self.b.fptrunc(x, VF)

    def any(self, holds: Any) -> Any:
        """Whether a condition holds in any lane."""
        return self.b.icmp_unsigned("!=", self.b.bitcast(holds, I16), I16(0))

    def reduced(self, x: Any, operation: Callable[[Any, Any], Any]) -> Any:
        """All lanes as one scalar."""
        while x.type.count > 1:
            x = operation(*self._halves(x))
        return self.b.extract_element(x, I32(0))

    def _halves(self, x: Any) -> Pair:
        half = x.type.count // 2
        return shuffle(self.b, x, range(half)), shuffle(self.b, x, range(half, 2 * half))

    def two_sum(self, s: Any, v: Any) -> Pair:
        """s + v and what rounding took from it, exactly (Knuth)."""
        b = self.b
        t = b.fadd(s, v)
        z = b.fsub(t, s)
        return t, b.fadd(b.fsub(s, b.fsub(t, z)), b.fsub(v, z))

    def joined(self, s: Any, e: Any) -> Pair:
        """Pairs in lanes as one pair."""
        while s.type.count > 1:
            (s, other), (e, more) = self._halves(s), self._halves(e)
            s, error = self.two_sum(s, other)
            e = self.b.fadd(self.b.fadd(e, more), error)
        return self.b.extract_element(s, I32(0)), self.b.extract_element(e, I32(0))

    @contextmanager
    def counted(self, start: Any, stop: Any, step: Any = 1, carried: Sequence[Any] = ()) -> Iterator[Any]:
        """A loop."""
        with loop(self.b, start, stop, step, carried) as turn:
            yield turn

    def along(self, n: Any, body: Callable[..., Sequence[Any]], carried: Sequence[Any] = ()) -> list[Any]:
        """``carried = body(index, inside, *carried)`` for all vectors of a row of n; inside is None but in the last."""
        whole = self.b.and_(n, I64(-LANES))
        with loop(self.b, I64(0), whole, LANES, carried) as turn:
            turn.carry(*body(turn.index, None, *turn.values))
        with loop(self.b, whole, n, LANES, turn.values) as rest:
            rest.carry(*body(rest.index, self.inside(rest.index, n), *rest.values))
        return rest.values

    def inside(self, index: Any, n: Any) -> Any:
        """The lanes before n of a vector at an index."""
        left, steps = self.b.trunc(self.b.sub(n, index), I32), ir.Constant(VI, list(range(LANES)))
        return self.b.icmp_signed("<", steps, self.everywhere(left))

    def lane(self, position: Any) -> Any:
        """The lane at a position, if it is one."""
        wide = ir.VectorType(I64, LANES)
        return self.b.icmp_signed("==", ir.Constant(wide, list(range(LANES))), self.everywhere(position))

    def find(self, row: Any, value: Any) -> Any:
        """The first index in a row where a value is, which must be there; it reads up to `FOUND` elements at a time.

        Four vectors at once: in short rows the loop then always ends at its first turn, which processors foresee.
        """
        b, wanted = self.b, self.everywhere(value)
        before, body, after = b.block, b.append_basic_block("search"), b.append_basic_block("found")
        b.branch(body)
        b.position_at_end(body)
        index, mask = b.phi(I64), I64(0)
        index.add_incoming(I64(0), before)
        for i in range(0, FOUND, LANES):
            holds = b.fcmp_ordered("==", self.load(row, b.add(index, I64(i))), wanted)
            mask = b.or_(mask, b.shl(b.zext(b.bitcast(holds, I16), I64), I64(i)))
        index.add_incoming(b.add(index, I64(FOUND)), body)
        b.cbranch(b.icmp_unsigned("!=", mask, I64(0)), after, body)
        b.position_at_end(after)
        count = self._declared("llvm.cttz.i64", I64, [I64, I1])
        return b.add(index, b.call(count, [mask, I1(1)]))
