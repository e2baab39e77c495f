"""The tensor core's adder in Python integers: what the kernels must equal, bit for bit.

A finite number is ``sign significand 2^exponent`` with integers; nothing is rounded but where the unit rounds.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.formats import Float, quantize
from recoup.tensorcore.config import TensorCore

__all__ = ["dot", "foreign", "matmul", "step"]

ZERO_EXPONENT = -126  # of a zero, in every format
# Of the accumulator: bits of its fraction, exponent of its smallest normal number, exponent from which it is infinite.
ACCUMULATORS = {"float32": (23, -126, 128), "e8m13": (13, -126, 128), "float16": (10, -14, 16)}

Parts = tuple[int, int, int]
"""s, f, e: the number s 2^-f 2^e, with e the exponent as the unit sees it."""


def parts(x: float, mantissa: int, min_exponent: int) -> Parts:
    """A value of a format with so many fraction bits and such a smallest normal exponent."""
    if x == 0:
        return 0, mantissa, ZERO_EXPONENT
    exponent = max(math.frexp(x)[1] - 1, min_exponent)
    return int(math.ldexp(x, mantissa - exponent)), mantissa, exponent


def truncated(significand: int, shift: int) -> int:
    """significand 2^shift toward zero."""
    magnitude = abs(significand) << shift if shift >= 0 else abs(significand) >> -shift
    return -magnitude if significand < 0 else magnitude


def step(c: float, a: Sequence[float], b: Sequence[float], config: TensorCore) -> float:
    """One step: c and a group of products (``config.group`` of them at most) -> the next accumulator.

    NaN operands, 0 x inf and inf - inf give NaN; else an infinite operand, product or c gives that infinity.
    """
    special = [x * y for x, y in zip(a, b, strict=True) if not (math.isfinite(x) and math.isfinite(y))]
    if special or not math.isfinite(c):
        return sum(special, start=c)
    first, second = config.formats
    n = config.fraction
    terms = []
    for x, y in zip(a, b, strict=True):
        s, f, e = parts(x, first.mantissa, first.min_exponent)
        t, g, h = parts(y, second.mantissa, second.min_exponent)
        terms.append((s * t, f + g, e + h))
    fraction, smallest, _ = ACCUMULATORS["float32" if config.output == "e8m13" else config.output]
    terms.append(parts(c, fraction, smallest))
    top = max(e for _, _, e in terms)
    # s 2^(e - f) in units of q = 2^(top - n)
    total = sum(truncated(s, e - f - (top - n)) for s, f, e in terms)
    return output(total, top - n, config.output)


def output(total: int, exponent: int, name: str) -> float:
    """total 2^exponent in the accumulator's format: toward zero, for float16 to nearest even."""
    if total == 0:
        return 0.0
    fraction, smallest, infinite = ACCUMULATORS[name]
    magnitude, sign = abs(total), -1 if total < 0 else 1
    unit = max(magnitude.bit_length() - 1 + exponent, smallest) - fraction  # the exponent of the last place
    shift = exponent - unit
    kept = truncated(magnitude, shift)
    if name == "float16" and shift < 0:
        rest, half = magnitude - (kept << -shift), 1 << (-shift - 1)
        kept += rest > half or (rest == half and kept & 1)
    if kept.bit_length() - 1 + unit >= infinite and kept:
        return sign * math.inf
    return sign * math.ldexp(kept, unit) if kept else 0.0


def matmul(a: Tensor, b: Tensor, config: TensorCore) -> Tensor:
    """a [M, K] b [K, N], both float32 with values of the operand formats -> float32 [M, N]. It is slow."""
    for x, form, name in zip((a, b), config.formats, "ab", strict=True):
        if (value := foreign(x, form)) is not None:
            raise RecoupError(f"tensorcore.matmul: {name} holds {value!r}, which {form!r} does not have")
    rows, columns = a.double().tolist(), b.double().mT.tolist()
    sums = [dot(row, column, config) for row in rows for column in columns]
    return torch.tensor(sums, dtype=torch.float32).view(a.shape[0], b.shape[1])


def dot(row: Sequence[float], column: Sequence[float], config: TensorCore) -> float:
    """One output: the chain of steps from +0, or such chains of ``config.promotion`` terms added in float32."""
    if config.promotion is None:
        return _chain(row, column, config)
    result = torch.zeros((), dtype=torch.float32)
    for k in range(0, len(row), config.promotion):
        terms = slice(k, k + config.promotion)
        result = result + torch.tensor(_chain(row[terms], column[terms], config), dtype=torch.float32)
    return float(result)


def _chain(row: Sequence[float], column: Sequence[float], config: TensorCore) -> float:
    c, group = 0.0, config.group
    for k in range(0, len(row), group):
        c = step(c, row[k : k + group], column[k : k + group], config)
    return c


def foreign(x: Tensor, form: Float) -> float | None:
    """A finite element that is no value of a format, if there is one."""
    x = x.detach()
    if torch.equal(quantize(x, form), x):  # nearly always, and selecting elements is slow
        return None
    finite = x[x.isfinite()]
    wrong = finite[quantize(finite, form) != finite]
    return wrong[0].item() if len(wrong) else None
