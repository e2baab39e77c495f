"""A tile's values in LLVM IR: to a format, and to blocks of channels that share an exponent, both toward zero.

Truncation to a format without subnormals is a mask, and zero below the smallest normal. In a block all significands
have the format's bits, so an element becomes ``trunc(x / quantum) quantum``; elements above the shared exponent are
multiples of the quantum already. Nothing here saturates: kernels note a magnitude beyond the format's largest (NaN and
infinities among them), and the caller then computes it all by the general passes.

Legend: W channels of a block, rows ``stride`` apart, n places of each.
"""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from recoup.kernels.llvm import I32, I64, D
from recoup.kernels.vector import Vector

LANES = 16  # float32 of an AVX-512 register; LLVM cuts them to smaller ones
VI, VD = ir.VectorType(I32, LANES), ir.VectorType(D, LANES)
SIGN, INFINITY = -(1 << 31), 0x7F800000
FRACTION, BIAS = 23, 127
UNROLLED = 8  # channels of a block whose loop is written out


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a kernel is built for; every format truncates and has no subnormals.

    Attributes:
        mantissa: the format's; None: no format.
        low, top: its smallest normal and largest value, as float32 bits.
        block: channels of a block; 0: no blocks.
        outlier: whether a lone largest element keeps its exponent.
        plain: whether sums of inputs need no errors: see `fused.build.plain`.
        single: whether float32 toward zero gives gamma xhat + beta its bits: see `fused.build.single`.
        bias: what the sum of products starts from, so that its errors are multiples of one number; 0: TwoSum.
        stream: whether results go past the caches, where rows are whole vectors at multiples of 64 bytes.
    """

    mantissa: int | None
    low: int
    top: int
    block: int
    outlier: bool
    plain: bool = False
    single: bool = False
    bias: float = 0.0
    stream: bool = False


class Tile(Vector):
    """A tile being written.

    Args:
        b: the builder, at the entry of the kernel.
        recipe: the format and the blocks.
        scratch: two rows of ``pitch`` for the blocks' powers of two: the reciprocals of quanta, and quanta.
    """

    def __init__(self, b: ir.IRBuilder, recipe: Recipe, scratch: Any, pitch: Any) -> None:
        super().__init__(b, LANES)
        self.recipe = recipe
        self.reciprocals, self.quanta = scratch, self.at(scratch, pitch)
        self._peak = b.alloca(VI)
        b.store(ir.Constant(VI, None), self._peak)

    def note(self, bits: Any) -> None:
        """Remember the largest magnitude in every lane."""
        self.b.store(self.larger(self.b.load(self._peak, typ=VI), bits), self._peak)

    def report(self, pointer: Any) -> None:
        """Write the largest magnitude noted, as int32 bits."""
        self.b.store(self.reduced(self.b.load(self._peak, typ=VI), self.larger), pointer)

    def write(self, x: Any, row: Any, index: Any, inside: Any) -> None:
        """Store a result: past the caches where the recipe says so and the vector is whole."""
        if self.recipe.stream and inside is None:
            self.stream(x, row, index)
        else:
            self.store(x, row, index, inside)

    def quantized(self, x: Any, index: Any) -> Any:
        """B(F(x)) of a vector at a place."""
        return self.shared(self.formatted(x), index)

    def exponent(self, x: Any) -> Any:
        """The bits of the exponent."""
        return self.b.and_(self.bits(x), self.constant(INFINITY, VI))

    def formatted(self, x: Any) -> Any:
        """F(x); zeros keep their sign."""
        if self.recipe.mantissa is None:
            return x
        b, e = self.b, self.exponent(x)
        if not self.recipe.block:  # of a block, `find_scales` has noted the largest
            self.note(e)
        mask = self.constant(-1 << (FRACTION - self.recipe.mantissa), VI)
        kept = b.select(b.icmp_signed(">=", e, self.constant(self.recipe.low, VI)), mask, self.constant(SIGN, VI))
        return self.floats(b.and_(self.bits(x), kept))

    def narrowed(self, v: Any) -> Any:
        """F(v) of float64 lanes: cut to the format's mantissa first, so that float32 has nothing to round but what it
        flushes or turns into infinity."""
        if self.recipe.mantissa is None:
            return self.narrow(v)
        wide = ir.VectorType(I64, LANES)
        bits = self.b.and_(self.b.bitcast(v, wide), self.constant(-1 << (52 - self.recipe.mantissa), wide))
        return self.flushed(self.narrow(self.b.bitcast(bits, VD)))

    def flushed(self, x: Any) -> Any:
        """Zero, of x's sign, where x is below the smallest normal."""
        sign = self.floats(self.b.and_(self.bits(x), self.constant(SIGN, VI)))
        low = self.constant(self.recipe.low, VI)
        return self.b.select(self.b.icmp_signed("<", self.magnitude(x), low), sign, x)

    def affine(self, gamma: Any, x: Any, beta: Any) -> Any:
        """F(gamma x + beta) of float32 lanes; gamma and beta float64. gamma x is exact in float64, whose lanes take
        twice the registers."""
        if not self.recipe.single:
            return self.narrowed(self.multiply_add(gamma, self.wide(x), beta))
        sum_ = self.fma_toward_zero(self.narrow(gamma), x, self.narrow(beta))
        mask = self.constant(-1 << (FRACTION - (self.recipe.mantissa or 0)), VI)
        return self.flushed(self.floats(self.b.and_(self.bits(sum_), mask)))

    def shared(self, x: Any, index: Any) -> Any:
        """B(x) of values of the format."""
        if not self.recipe.block:
            return x
        reciprocal, quantum = self.load(self.reciprocals, index), self.load(self.quanta, index)
        return self.b.fmul(self.whole(self.b.fmul(x, reciprocal)), quantum)

    def find_scales(self, rows: Any, stride: Any, width: Any, n: Any) -> None:
        """Write the powers of two that `shared` multiplies a tile's places by, and note its exponents.

        The loop over the channels of a full block is written out, so that their exponents stay in registers.
        """
        block = self.recipe.block
        if not 0 < block <= UNROLLED:
            self._scales(rows, stride, width, n, 0)
            return
        with self.b.if_else(self.b.icmp_signed("==", width, I64(block))) as (full, ragged):
            with full:
                self._scales(rows, stride, width, n, block)
            with ragged:
                self._scales(rows, stride, width, n, 0)

    def _scales(self, rows: Any, stride: Any, width: Any, n: Any, unrolled: int) -> None:
        b, zero = self.b, ir.Constant(VI, None)
        depth, bias = (self.recipe.mantissa or 0) << FRACTION, 2 * BIAS << FRACTION

        def seen(w: Any, index: Any, inside: Any, largest: Any, second: Any) -> tuple[Any, Any]:
            e = self.exponent(self.load(self.at(rows, b.mul(w, stride)), index, inside))
            return self.larger(largest, e), self.larger(second, self.smaller(largest, e))

        def at(index: Any, inside: Any) -> list[Any]:
            largest, second = zero, zero
            for w in range(unrolled):
                largest, second = seen(I64(w), index, inside, largest, second)
            if not unrolled:
                with self.counted(I64(0), width, 1, (zero, zero)) as turn:
                    turn.carry(*seen(turn.index, index, inside, *turn.values))
                largest, second = turn.values
            self.note(largest)
            # A block of zeros counts as the smallest normal's exponent, so that its reciprocal is finite.
            e = self.larger(second if self.recipe.outlier else largest, self.constant(self.recipe.low, VI))
            self.store(self.floats(b.sub(self.constant(bias + depth, VI), e)), self.reciprocals, index)
            self.store(self.floats(b.sub(e, self.constant(depth, VI))), self.quanta, index)
            return []

        self.along(n, at)
