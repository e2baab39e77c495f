"""Vectors in LLVM IR, of as many lanes as a kernel likes: loads of a row's end, comparisons, halves, exact sums.

LLVM cuts the lanes to the registers of the machine. Addresses are opaque pointers, and indices count elements.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from recoup.kernels import llvm
from recoup.kernels.llvm import I1, I32, I64, D, F, P, declared, loop, shuffle

FOUND = 64  # elements that `Vector.find` reads at a time: the bits of its mask
TOWARD_ZERO, UPWARD = 11, 10  # of AVX-512's embedded rounding, without exceptions

Pair = tuple[Any, Any]


class Vector:
    """Vector arithmetic being written.

    Args:
        builder: where.
        lanes: of every vector, a power of two.
        double: whether the kernel's own numbers are float64 and int64, else float32 and int32; vectors of other types
            are welcome everywhere.

    Attributes:
        b: the builder.
        double, scalar, integer: types of the kernel's own numbers.
        vector, integers: types of vectors of them.
        zero: of type ``vector``.
    """

    def __init__(self, builder: ir.IRBuilder, lanes: int, double: bool = False) -> None:
        self.b, self.lanes, self.double = builder, lanes, double
        self.scalar, self.integer = (D, I64) if double else (F, I32)
        self.vector, self.integers = self.of(self.scalar), self.of(self.integer)
        self.zero = ir.Constant(self.vector, None)

    def of(self, element: ir.Type) -> ir.VectorType:
        """The type of a vector of elements."""
        return ir.VectorType(element, self.lanes)

    def constant(self, value: float, kind: Any = None) -> Any:
        """The same number in every lane of a vector of a type; None: of the kernel's own floats."""
        kind = kind or self.vector
        return ir.Constant(kind, [kind.element(value)] * self.lanes)

    def everywhere(self, value: Any) -> Any:
        """A scalar in every lane."""
        return llvm.splat(self.b, value, self.lanes)

    def at(self, pointer: Any, index: Any, kind: Any = F) -> Any:
        """The address of an element."""
        return self.b.gep(pointer, [index], source_etype=kind)

    def get(self, pointer: Any, index: Any, kind: Any) -> Any:
        """A scalar."""
        return self.b.load(self.at(pointer, index, kind), typ=kind)

    def put(self, value: Any, pointer: Any, index: Any) -> None:
        """Store a scalar."""
        self.b.store(value, self.at(pointer, index, value.type))

    def load(self, pointer: Any, index: Any, inside: Any = None, kind: Any = None) -> Any:
        """A vector of elements, zero where ``inside`` (None: everywhere) does not hold."""
        kind = kind or self.vector
        address, align = self.at(pointer, index, kind.element), _bytes(kind.element)
        if inside is None:
            return self.b.load(address, typ=kind, align=align)
        name, holds = f"llvm.masked.load.{_suffix(kind)}.p0", self.of(I1)
        return self.b.call(
            declared(self.b, name, kind, [P, I32, holds, kind]), [address, I32(align), inside, ir.Constant(kind, None)]
        )

    def store(self, value: Any, pointer: Any, index: Any, inside: Any = None) -> None:
        """Store a vector's elements, or those inside."""
        kind = value.type
        address, align = self.at(pointer, index, kind.element), _bytes(kind.element)
        if inside is None:
            self.b.store(value, address, align=align)
            return
        name, holds = f"llvm.masked.store.{_suffix(kind)}.p0", self.of(I1)
        function = declared(self.b, name, ir.VoidType(), [kind, P, I32, holds])
        self.b.call(function, [value, address, I32(align), inside])

    def stream(self, value: Any, pointer: Any, index: Any) -> None:
        """Store a vector's elements past the caches, at a multiple of the vector's size."""
        size = _bytes(value.type.element) * self.lanes
        made = self.b.store(value, self.at(pointer, index, value.type.element), align=size)
        made.set_metadata("nontemporal", self.b.module.add_metadata([I32(1)]))

    def prefetch(self, pointer: Any, index: Any, kind: Any = F) -> None:
        """Ask for the line of an element, to be read soon; it need not be there."""
        ask = declared(self.b, "llvm.prefetch.p0", ir.VoidType(), [P, I32, I32, I32])
        self.b.call(ask, [self.at(pointer, index, kind), I32(0), I32(3), I32(1)])  # to read, in all caches, data

    def bits(self, x: Any) -> Any:
        """Floats as integers of their size."""
        return self.b.bitcast(x, self.of(I64 if isinstance(x.type.element, ir.DoubleType) else I32))

    def floats(self, x: Any) -> Any:
        """Integers as floats of their size."""
        return self.b.bitcast(x, self.of(D if x.type.element.width == 64 else F))

    def masked(self, x: Any, mask: Any) -> Any:
        """Those of a float's bits that a mask has."""
        return self.floats(self.b.and_(self.bits(x), mask))

    def magnitude(self, x: Any) -> Any:
        """|x| as bits: comparing them as integers compares magnitudes, with NaN above all."""
        bits = self.bits(x)
        return self.b.and_(bits, self.constant((1 << (bits.type.element.width - 1)) - 1, bits.type))

    def larger(self, x: Any, y: Any) -> Any:
        """The larger integer, or float where neither is NaN."""
        return self._chosen(">", x, y)

    def smaller(self, x: Any, y: Any) -> Any:
        """The smaller."""
        return self._chosen("<", x, y)

    def _chosen(self, order: str, x: Any, y: Any) -> Any:
        # A comparison and a choice, which become one minimum or maximum: LLVM's own take care of NaN with more.
        integers = isinstance(x.type.element, ir.IntType)
        holds = self.b.icmp_signed(order, x, y) if integers else self.b.fcmp_ordered(order, x, y)
        return self.b.select(holds, x, y)

    def whole(self, x: Any) -> Any:
        """Float32 toward zero to an integer."""
        return self.b.call(declared(self.b, f"llvm.trunc.{_suffix(x.type)}", x.type, [x.type]), [x])

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """x y + z in float32, rounded once; slow where `llvm.Target.fma` is false."""
        return llvm.fma(self.b, x, y, z)

    def multiply_add(self, x: Any, y: Any, z: Any) -> Any:
        """x y + z where x y is exact: one operation or two give the same bits, and LLVM takes what is there."""
        b: Any = self.b  # llvmlite's stubs lack the flags
        return b.fadd(b.fmul(x, y, flags=("contract",)), z, flags=("contract",))

    def fma_toward_zero(self, x: Any, y: Any, z: Any) -> Any:
        """x y + z in float32, rounded once, toward zero: 16 lanes, on processors with AVX-512."""
        kind = x.type
        function = declared(self.b, "llvm.x86.avx512.vfmadd.ps.512", kind, [kind, kind, kind, I32])
        return self.b.call(function, [x, y, z, I32(TOWARD_ZERO)])

    def add_upward(self, x: Any, y: Any) -> Any:
        """x + y, rounded up: 64 bytes of floats, on processors with AVX-512."""
        kind = x.type
        name = f"llvm.x86.avx512.add.{'pd' if isinstance(kind.element, ir.DoubleType) else 'ps'}.512"
        return self.b.call(declared(self.b, name, kind, [kind, kind, I32]), [x, y, I32(UPWARD)])

    def wide(self, x: Any) -> Any:
        """Float64 lanes."""
        return self.b.fpext(x, self.of(D))

    def narrow(self, x: Any) -> Any:
        """Float32 lanes, in the rounding mode there is."""
        return self.b.fptrunc(x, self.of(F))

    def word(self, holds: Any) -> Any:
        """A condition of the lanes as an integer of one bit a lane."""
        return self.b.bitcast(holds, ir.IntType(self.lanes))

    def any(self, holds: Any) -> Any:
        """Whether a condition holds in any lane."""
        word = self.word(holds)
        return self.b.icmp_unsigned("!=", word, word.type(0))

    def reduced(self, x: Any, operation: Callable[[Any, Any], Any]) -> Any:
        """All lanes as one scalar, by halves."""
        while x.type.count > 1:
            x = operation(*self._halves(x))
        return self.b.extract_element(x, I32(0))

    def _halves(self, x: Any) -> Pair:
        half = x.type.count // 2
        return shuffle(self.b, x, range(half)), shuffle(self.b, x, range(half, 2 * half))

    def transposed(self, rows: Sequence[Any]) -> list[Any]:
        """As many vectors as they have lanes, so that lane i of vector j is lane j of vector i; in log2 steps."""
        turned, lanes, apart = list(rows), range(self.lanes), 1
        while apart < self.lanes:
            for i in (i for i in lanes if not i & apart):
                low, high = turned[i], turned[i + apart]
                first = [self.lanes + lane - apart if lane & apart else lane for lane in lanes]
                second = [self.lanes + lane if lane & apart else lane + apart for lane in lanes]
                turned[i] = shuffle(self.b, low, first, high)
                turned[i + apart] = shuffle(self.b, low, second, high)
            apart *= 2
        return turned

    def two_sum(self, s: Any, v: Any) -> Pair:
        """s + v and what rounding took from it, exactly (Knuth)."""
        b = self.b
        t = b.fadd(s, v)
        z = b.fsub(t, s)
        return t, b.fadd(b.fsub(s, b.fsub(t, z)), b.fsub(v, z))

    def joined(self, s: Any, e: Any) -> Pair:
        """Sums in lanes, with their errors, as one sum and its error."""
        while s.type.count > 1:
            (s, other), (e, more) = self._halves(s), self._halves(e)
            s, error = self.two_sum(s, other)
            e = self.b.fadd(self.b.fadd(e, more), error)
        return self.b.extract_element(s, I32(0)), self.b.extract_element(e, I32(0))

    @contextmanager
    def counted(self, start: Any, stop: Any, step: Any = 1, carried: Sequence[Any] = ()) -> Iterator[llvm.Loop]:
        """A loop."""
        with loop(self.b, start, stop, step, carried) as turn:
            yield turn

    def along(self, n: Any, body: Callable[..., Sequence[Any]], carried: Sequence[Any] = ()) -> list[Any]:
        """``carried = body(index, inside, *carried)`` for all vectors of a row of n; inside is None but in the last."""
        whole = self.b.and_(n, I64(-self.lanes))
        with loop(self.b, I64(0), whole, self.lanes, carried) as turn:
            turn.carry(*body(turn.index, None, *turn.values))
        with loop(self.b, whole, n, self.lanes, turn.values) as rest:
            rest.carry(*body(rest.index, self.inside(rest.index, n), *rest.values))
        return rest.values

    def inside(self, index: Any, n: Any) -> Any:
        """The lanes before n of a vector at an index."""
        left = self.b.trunc(self.b.sub(n, index), I32)
        return self.b.icmp_signed("<", self.numbers(I32), self.everywhere(left))

    def lane(self, position: Any) -> Any:
        """The lane at a position, if it is one."""
        return self.b.icmp_signed("==", self.numbers(I64), self.everywhere(position))

    def numbers(self, kind: ir.IntType, first: int = 0) -> Any:
        """The lanes' numbers, from ``first`` on."""
        return ir.Constant(self.of(kind), list(range(first, first + self.lanes)))

    def find(self, row: Any, value: Any) -> Any:
        """The first index in a row where a value is, which must be there; it reads up to `FOUND` elements at a time.

        Several vectors at once: in short rows the loop then always ends at its first turn, which processors foresee.
        """
        b, wanted = self.b, self.everywhere(value)
        before, body, after = b.block, b.append_basic_block("search"), b.append_basic_block("found")
        b.branch(body)
        b.position_at_end(body)
        index, mask = b.phi(I64), I64(0)
        index.add_incoming(I64(0), before)
        for i in range(0, FOUND, self.lanes):
            holds = b.fcmp_ordered("==", self.load(row, b.add(index, I64(i))), wanted)
            mask = b.or_(mask, b.shl(b.zext(self.word(holds), I64), I64(i)))
        index.add_incoming(b.add(index, I64(FOUND)), body)
        b.cbranch(b.icmp_unsigned("!=", mask, I64(0)), after, body)
        b.position_at_end(after)
        count = declared(b, "llvm.cttz.i64", I64, [I64, I1])
        return b.add(index, b.call(count, [mask, I1(1)]))


def _bytes(element: Any) -> int:
    if isinstance(element, ir.IntType):
        return element.width // 8
    return 8 if isinstance(element, ir.DoubleType) else 4


def _suffix(kind: Any) -> str:
    """A vector type in an intrinsic's name."""
    letter = "i" if isinstance(kind.element, ir.IntType) else "f"
    return f"v{kind.count}{letter}{8 * _bytes(kind.element)}"
