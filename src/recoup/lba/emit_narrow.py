"""Truncating steps in float32 lanes, the fast form: at most six vector operations a term.

Exact because the processor rounds toward zero: a product truncated to 24 bits and then, by a mask, to fewer is the
truncated exact product. Where multiply-add is one instruction, operands come scaled by powers of two so that the
smallest normal of the product is 2^-126, and flush-to-zero does the underflow; the accumulator has a scale of its
own, and the ratio between the two is a factor of the multiply-add, which costs nothing. Elsewhere (`Narrow.compare`)
all is at its own scale and the underflow is a comparison: a multiplication of its own by the ratio would be flushed
before the sum.

The order is that of the unit, and of the fewest operations: multiply, mask, limit, multiply-add, mask, limit. A mask
before a limit, because the largest value has no bit that the mask drops, so that a number is at least the largest
exactly where its truncation is (`Narrow.inside` relies on the same). The limits, which only large operands need, are
left out where the plan can prove so.
"""

from dataclasses import dataclass
from typing import Any

from recoup.kernels.rounding import EXCEPTIONS_MASKED, FLUSH, FLUSH_RESULTS, TOWARD_ZERO
from recoup.lba.emit_code import PRODUCT, Code, Step

# Places in the constants. Floats: the sum's scale over the product's, and the largest values at these scales. Integers:
# the bits that float32 keeps of a format's significand (with sign and exponent), and its smallest normal as bits.
RATIO, PRODUCT_TOP, SUM_TOP = 0, 1, 2
PRODUCT_MASK, SUM_MASK, PRODUCT_LOW, SUM_LOW = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class Narrow:
    """Which operations the steps need.

    Attributes:
        fused: no Q_prod.
        limit_product, limit_sum: whether products, and sums within a chunk, may reach their largest value.
        compare: underflow by comparison, without multiply-add and at the operands' own scale.
        underflow: whether there is any; without ``compare`` it costs nothing.
    """

    fused: bool
    limit_product: bool
    limit_sum: bool
    compare: bool
    underflow: bool

    wide = False
    random = False

    @property
    def control(self) -> int:
        """Toward zero; by comparison, operands below float32's normal numbers still count."""
        return EXCEPTIONS_MASKED | TOWARD_ZERO | (FLUSH_RESULTS if self.compare else FLUSH)

    def term(self, code: Code, x: Any, w: Any, s: Any, draw: Any) -> Step:
        """s = Q_acc(Q_prod(x w) + s)."""
        b, floats, integers = code.b, code.float_constants, code.integer_constants
        if self.fused:
            total = self._cut_sum(code, code.fma(x, w, s))
            return Step(self._limited(code, total), None, total)
        low = integers[PRODUCT_LOW] if self.compare and self.underflow else None
        product = _cut(code, b.fmul(x, w), integers[PRODUCT_MASK], low)
        p = code.limit(product, floats[PRODUCT_TOP]) if self.limit_product else product
        total = self._cut_sum(code, b.fadd(p, s) if self.compare else code.fma(p, floats[RATIO], s))
        return Step(self._limited(code, total), product, total)

    def add(self, code: Code, s: Any, y: Any, draw: Any) -> Step:
        """y = Q_acc(s + y); always limited: a bound of chunks says nothing of the outer sum, which is rare."""
        total = self._cut_sum(code, code.b.fadd(s, y))
        return Step(code.limit(total, code.float_constants[SUM_TOP]), None, total)

    def inside(self, code: Code, value: Any, place: int) -> Any:
        """|value| < the largest value: what is cut reaches it exactly where the precise number does."""
        top = code.float_constants[PRODUCT_TOP if place == PRODUCT else SUM_TOP]
        return code.b.icmp_signed("<", code.magnitude(value), code.bits(top))

    def _cut_sum(self, code: Code, total: Any) -> Any:
        low = code.integer_constants[SUM_LOW] if self.compare and self.underflow else None
        return _cut(code, total, code.integer_constants[SUM_MASK], low)

    def _limited(self, code: Code, total: Any) -> Any:
        return code.limit(total, code.float_constants[SUM_TOP]) if self.limit_sum else total


def _cut(code: Code, x: Any, mask: Any, low: Any) -> Any:
    """x without its low bits; zero below ``low``."""
    cut = code.masked(x, mask)
    if low is None:
        return cut
    # A choice of the masked number, not a mask of the choice: AVX-512 then does both in one operation.
    return code.b.select(code.b.icmp_signed(">=", code.magnitude(x), low), cut, code.zero)
