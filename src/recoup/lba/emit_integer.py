"""Saturating steps on whole numbers in float32 lanes: accumulators of at most 24 bits whose products fit them.

Product and sum are whole numbers of at most 2^24, so float32 arithmetic is exact in any rounding mode. 24 bits, because
a product within the accumulator's range added to a sum within it is still such a number: 2^23 + 2^23.
"""

from dataclasses import dataclass
from typing import Any

from recoup.kernels.rounding import EXCEPTIONS_MASKED
from recoup.lba.emit_code import Code, Step

TOP, BOTTOM = 0, 1  # places in the float constants
MAX_BITS = 24


@dataclass(frozen=True, slots=True)
class Whole:
    """One form for every width: the ends of the range are constants."""

    wide = False
    random = False
    control = EXCEPTIONS_MASKED

    def term(self, code: Code, x: Any, w: Any, s: Any, draw: Any) -> Step:
        """s = saturate(x w + s)."""
        return self._limited(code, code.multiply_add(x, w, s))

    def add(self, code: Code, s: Any, y: Any, draw: Any) -> Step:
        """y = saturate(s + y)."""
        return self._limited(code, code.b.fadd(s, y))

    def inside(self, code: Code, value: Any, place: int) -> Any:
        """Within the ends."""
        below = code.b.fcmp_ordered("<=", value, code.float_constants[TOP])
        return code.b.and_(below, code.b.fcmp_ordered(">=", value, code.float_constants[BOTTOM]))

    def _limited(self, code: Code, total: Any) -> Step:
        top, bottom = code.float_constants[TOP], code.float_constants[BOTTOM]
        return Step(code.larger(code.smaller(total, top), bottom), None, total)
