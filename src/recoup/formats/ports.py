"""A format's codes at the ports of a module: which patterns occur, what they are worth, how they are called.

Zeros at ports have sign 0: no result of a unit depends on the sign of a zero.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from recoup.formats.codes import code_bits, decode, encode
from recoup.formats.float_codes import FloatFields
from recoup.formats.spec import Float, Int
from recoup.gates.layout import Layout
from recoup.gates.module import Port

__all__ = ["codes", "layout", "least", "legal", "port", "told", "values"]


def layout(form: Float) -> Layout:
    """A format as gates know it."""
    return Layout.of(FloatFields(form))


def port(name: str, direction: Any, form: Float | Int, meaning: str) -> Port:
    """A port of codes of a format, with patterns on both sides of its thresholds."""
    bits = code_bits(form)
    if isinstance(form, Int):
        return Port(name, direction, bits, meaning, signed=form.signed)
    fields = FloatFields(form)
    flag = 0 if fields.flag is None else 1 << fields.flag
    M, top = fields.fraction, fields.top_rank >> fields.fraction
    first = 0 if flag else 1  # fields count from 0 with a flag, ranks from 1
    binades = {first, first + 1, (top + first) // 2, top - 1 if flag else top}
    fractions = {0, 1, (1 << M) - 1} if M else {0}
    magnitudes = {(binade << M) | fraction | flag for binade in binades for fraction in fractions}
    magnitudes |= {fields.largest, 1 if form.subnormals else fields.largest}
    edges = tuple(sorted({0} | magnitudes | {code | 1 << fields.sign for code in magnitudes}))

    def occurring(patterns: np.ndarray) -> np.ndarray:
        return legal(patterns, fields)

    return Port(name, direction, bits, meaning, edges=edges, legal=occurring, complete=True, narrow=min(M + 2, bits))


def legal(patterns: np.ndarray, fields: FloatFields) -> np.ndarray:
    """A code of a finite value of any pattern; zero has no sign.

    Patterns that are no codes become small values of either sign, which cancel often: see `recoup.silicon.vectors`.
    """
    patterns = np.asarray(patterns, np.uint64)
    M, sign = fields.fraction, np.uint64(1 << fields.sign)
    magnitude, negative = patterns & np.uint64(fields.ones), patterns & sign
    flag = np.uint64(0 if fields.flag is None else 1 << fields.flag)
    rank = magnitude + np.uint64(1 << M if flag else 0)
    smallest = np.uint64(1 if fields.format.subnormals else 1 << M)
    good = (rank >= smallest) & (rank <= np.uint64(fields.top_rank)) & (patterns & flag == flag)
    first = np.uint64(0 if flag else 1)
    fraction, field = patterns & np.uint64((1 << M) - 1), first + (patterns >> np.uint64(max(M - 1, 0)) & np.uint64(1))
    field = np.minimum(field, np.uint64(fields.top_rank >> M) - np.uint64(1 if flag else 0))
    small = np.minimum((field << np.uint64(M)) | fraction, np.uint64(fields.largest & fields.ones)) | flag
    small |= np.where(patterns >> np.uint64(M) & np.uint64(1) == 1, sign, np.uint64(0))
    zero = patterns & np.uint64((2 << M) - 1) == 0
    return np.where(good, magnitude | negative | flag, np.where(zero, np.uint64(0), small))


def least(form: Float | Int) -> float:
    """The smallest value above zero."""
    return 1.0 if isinstance(form, Int) else form.smallest_subnormal


def values(patterns: np.ndarray, form: Float | Int) -> Tensor:
    """float64 values of patterns."""
    return decode(torch.from_numpy(np.ascontiguousarray(patterns).astype(np.int64)), form)


def codes(found: Tensor, form: Float | Int, unit: float = 1.0) -> np.ndarray:
    """Patterns of values; zeros have no sign, and an `Int` counts in units."""
    if isinstance(form, Int):
        found = found / unit
    return encode(found + 0.0, form).numpy().astype(np.uint64)


def told(form: Float | Int) -> str:
    """A format in words, with the flag where it has one."""
    if isinstance(form, Int):
        return f"{'int' if form.signed else 'uint'}{form.bits}"
    fields = FloatFields(form)
    flag = " with its non-zero flag" if fields.flag is not None else ""
    return f"M{fields.fraction}E{fields.exponent}, {fields.bits} bits{flag}"
