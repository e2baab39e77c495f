"""What the tensor core's kernels want to know of an operand, as LLVM vector IR: value, exponent, lowest set bit.

In the same pass it shows whether a value belongs to the operand's format, and whether it is finite.
"""

from functools import cache, reduce
from typing import Any

from llvmlite import ir

from recoup.kernels.llvm import I8, I64, D, Target, loop
from recoup.kernels.signature import Definition, Kernel
from recoup.kernels.vector import Vector
from recoup.tensorcore.emit import COLUMNS, NOT_FINITE, NOT_IN_FORMAT, ROWS, Form

LANES = 16
FRACTION, BIAS, FIELD = 23, 127, 255


@cache
def prepare_rows(form: Form, target: Target) -> Kernel:
    """Of ``n`` numbers, a multiple of 16: values, exponents, lowest bits and signs, in the same order."""
    module = ir.Module("rows")
    d = ROWS.define(module, "rows")
    b, v = d.b, Vector(d.b, LANES)
    with loop(b, I64(0), d["n"], LANES, [v.constant(0, v.integers)]) as turn:
        x = v.load(d["x"], turn.index)
        exponent, lowest, faults = _looked_at(v, d, form, x)
        _put(v, form, d, x, exponent, turn.index)
        negative = b.icmp_signed("<", v.bits(x), v.constant(0, v.integers))
        v.store(b.trunc(lowest, v.of(form.integer)), d["lowest"], turn.index)
        v.store(b.zext(negative, v.of(I8)), d["signs"], turn.index)
        turn.carry(b.or_(turn.values[0], faults))
    _report(v, d, turn.values[0])
    b.ret_void()
    return Kernel(module, "rows", ROWS, target)


@cache
def prepare_columns(form: Form, target: Target) -> Kernel:
    """Of [K, tiles * columns] numbers, ``stride`` from row to row: values, exponents and the two arrays of lowest bits,
    tile by tile."""
    module = ir.Module("columns")
    d = COLUMNS.define(module, "columns")
    b, v = d.b, Vector(d.b, min(LANES, form.columns))
    with loop(b, I64(0), d["tiles"], 1, [v.constant(0, v.integers)]) as tile:
        with loop(b, I64(0), d["K"], 1, tile.values) as term:
            source = b.add(b.mul(term.index, d["stride"]), b.mul(tile.index, I64(form.columns)))
            place = b.mul(b.add(b.mul(tile.index, d["K"]), term.index), I64(form.columns))
            found = [_column_vector(v, d, form, (source, place), first) for first in range(0, form.columns, v.lanes)]
            term.carry(reduce(b.or_, found, term.values[0]))
        tile.carry(*term.values)
    _report(v, d, tile.values[0])
    b.ret_void()
    return Kernel(module, "columns", COLUMNS, target)


def _column_vector(v: Vector, d: Definition, form: Form, at: tuple[Any, Any], first: int) -> Any:
    """One vector of a tile's columns, from ``at`` a source to a place: its faults."""
    b, (source, place) = v.b, at
    x = v.load(d["x"], b.add(source, I64(first)))
    exponent, lowest, faults = _looked_at(v, d, form, x)
    _put(v, form, d, x, exponent, b.add(place, I64(first)))
    positive = b.icmp_signed(">=", v.bits(x), v.constant(0, v.integers))
    twice = b.add(b.mul(place, I64(2)), I64(first))
    for offset, never in ((0, positive), (form.columns, b.not_(positive))):
        kept = b.select(never, v.constant(form.never, v.integers), lowest)
        v.store(b.trunc(kept, v.of(form.integer)), d["lowest"], b.add(twice, I64(offset)))
    return faults


def _looked_at(v: Vector, d: Definition, form: Form, x: Any) -> tuple[Any, Any, Any]:
    """Exponent as the unit sees it, exponent of the lowest set bit, and what is wrong, in int32 lanes."""
    b = v.b

    def number(value: int) -> Any:
        return v.constant(value, v.integers)

    bits = v.magnitude(x)
    field = b.lshr(bits, number(FRACTION))
    normal = b.icmp_signed(">", field, number(0))
    scale = v.larger(field, number(1))  # float32's own subnormals have the smallest normal exponent
    fraction = b.and_(bits, number((1 << FRACTION) - 1))
    significand = b.or_(fraction, b.select(normal, number(1 << FRACTION), number(0)))
    bit = b.and_(significand, b.sub(number(0), significand))
    trailing = b.sub(b.lshr(v.bits(b.sitofp(bit, v.vector)), number(FRACTION)), number(BIAS))
    top = b.sub(b.lshr(v.bits(b.sitofp(significand, v.vector)), number(FRACTION)), number(BIAS))
    lowest = b.add(b.sub(scale, number(BIAS + FRACTION)), trailing)
    highest = b.add(b.sub(scale, number(BIAS + FRACTION)), top)
    mantissa, smallest, largest = v.everywhere(d["mantissa"]), v.everywhere(d["min_exponent"]), d["largest"]
    zero = b.icmp_signed("==", bits, number(0))
    exponent = b.select(zero, number(form.zero), v.larger(highest, smallest))
    foreign = b.or_(
        b.icmp_signed("<", lowest, b.sub(smallest, mantissa)), b.icmp_signed(">", b.sub(highest, lowest), mantissa)
    )
    foreign = b.or_(foreign, b.fcmp_ordered(">", v.floats(bits), v.everywhere(largest)))
    finite = b.icmp_signed("<", field, number(FIELD))
    foreign = b.and_(b.and_(foreign, finite), b.not_(zero))
    faults = b.or_(b.select(foreign, number(NOT_IN_FORMAT), number(0)), b.select(finite, number(0), number(NOT_FINITE)))
    return exponent, b.select(zero, number(form.never), lowest), faults


def _put(v: Vector, form: Form, d: Definition, x: Any, exponent: Any, index: Any) -> None:
    """Store values, in the floats of the kernel, and exponents."""
    v.store(v.b.fpext(x, v.of(D)) if form.wide else x, d["values"], index)
    v.store(v.b.trunc(exponent, v.of(form.integer)), d["exponents"], index)


def _report(v: Vector, d: Definition, faults: Any) -> None:
    v.put(v.reduced(faults, v.b.or_), d["faults"], I64(0))
