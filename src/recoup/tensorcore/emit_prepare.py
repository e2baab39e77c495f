"""What the tensor core's kernels want to know of an operand, as LLVM vector IR: value, exponent, lowest set bit.

In the same pass it shows whether a value belongs to the operand's format, and whether it is finite.
"""

from functools import cache, reduce
from typing import Any

from llvmlite import ir

from recoup.kernels.llvm import I32, I64, D, F, P, Target, loop
from recoup.kernels.signature import Definition, Kernel, Signature
from recoup.kernels.vector import Vector
from recoup.tensorcore.emit_form import VECTORS, ZERO, Form

LANES = 16
FRACTION, BIAS, FIELD = 23, 127, 255
NOT_IN_FORMAT, NOT_FINITE = 1, 2  # what `prepare_rows` and `prepare_columns` find

FORMAT = {"mantissa": I32, "min_exponent": I32, "largest": F, "exponent_base": I32, "lowest_base": I32}
ROWS = Signature.of(n=I64, x=P, values=P, exponents=P, lowest=P, signs=P, faults=P, **FORMAT)
COLUMNS = Signature.of(
    K=I64, tiles=I64, x=P, stride=I64, values=P, exponents=P, lowest=P, faults=P, **FORMAT
)  # fmt: skip


@cache
def prepare_rows(form: Form, target: Target) -> Kernel:
    """Of ``n`` numbers, a multiple of 16, in the same order: values; what exponents lack to ``exponent_base``, and
    lowest bits above ``lowest_base``, as often as 32 bits hold them; and signs, as bytes from columns' lowest bits for
    positive values to those for negative ones."""
    module = ir.Module("rows")
    d = ROWS.define(module, "rows")
    b, v = d.b, Vector(d.b, LANES)
    with loop(b, I64(0), d["n"], LANES, [v.constant(0, v.integers)]) as turn:
        x = v.load(d["x"], turn.index)
        zero, exponent, lowest, faults = _looked_at(v, d, x)
        _put_value(v, form, d, x, turn.index)
        missing = b.sub(v.everywhere(d["exponent_base"]), exponent)
        if form.short:  # a difference that never wins
            missing = b.select(zero, v.constant(255, v.integers), missing)
        v.store(_repeated(v, form, missing), d["exponents"], turn.index)
        lowest = b.select(zero, v.constant(form.never, v.integers), lowest)
        v.store(_repeated(v, form, lowest), d["lowest"], turn.index)
        negative = b.ashr(v.bits(x), v.constant(31, v.integers))
        apart = form.columns * form.integer.width // 8
        v.store(b.and_(negative, v.constant(apart, v.integers)), d["signs"], turn.index)
        turn.carry(b.or_(turn.values[0], faults))
    _report(v, d, turn.values[0])
    b.ret_void()
    return Kernel(module, "rows", ROWS, target)


def _repeated(v: Vector, form: Form, x: Any) -> Any:
    """The low bits of every lane, as often as it holds them."""
    mask, often = (0xFF, 0x01010101) if form.short else (0xFFFF, 0x00010001)
    return v.b.mul(v.b.and_(x, v.constant(mask, v.integers)), v.constant(often, v.integers))


@cache
def prepare_columns(form: Form, target: Target) -> Kernel:
    """Of [K, tiles * columns] numbers, ``stride`` from row to row: values, exponents above -``exponent_base`` and the
    two arrays of lowest bits, tile by tile, in the order that `emit` says."""
    module = ir.Module("columns")
    d = COLUMNS.define(module, "columns")
    b, v = d.b, Vector(d.b, form.lanes)
    with loop(b, I64(0), d["tiles"], 1, [v.constant(0, v.integers)]) as tile:
        with loop(b, I64(0), d["K"], 1, tile.values) as term:
            source = b.add(b.mul(term.index, d["stride"]), b.mul(tile.index, I64(form.columns)))
            place = b.mul(b.add(b.mul(tile.index, d["K"]), term.index), I64(form.columns))
            faults = _column(v, d, form, source, place)
            term.carry(reduce(b.or_, faults, term.values[0]))
        tile.carry(*term.values)
    _report(v, d, tile.values[0])
    b.ret_void()
    return Kernel(module, "columns", COLUMNS, target)


def _column(v: Vector, d: Definition, form: Form, source: Any, place: Any) -> list[Any]:
    """A tile's columns of one k, from ``source`` to ``place``: their faults."""
    b, never = v.b, v.constant(form.never, v.integers)
    exponents, positives, negatives, faults = [], [], [], []
    for i in range(VECTORS):
        first = I64(i * form.lanes)
        x = v.load(d["x"], b.add(source, first))
        zero, exponent, lowest, found = _looked_at(v, d, x)
        _put_value(v, form, d, x, b.add(place, first))
        kept = b.add(exponent, v.everywhere(d["exponent_base"]))
        exponents.append(b.select(zero, v.constant(0, v.integers), kept) if form.short else kept)
        lowest = b.select(zero, never, lowest)
        positive = b.icmp_signed(">=", v.bits(x), v.constant(0, v.integers))
        positives.append(b.select(positive, never, lowest))
        negatives.append(b.select(positive, lowest, never))
        faults.append(found)
    twice = b.mul(place, I64(2))
    _put_together(v, form, exponents, d["exponents"], place)
    _put_together(v, form, positives, d["lowest"], twice)
    _put_together(v, form, negatives, d["lowest"], b.add(twice, I64(form.columns)))
    return faults


def _put_together(v: Vector, form: Form, vectors: list[Any], array: Any, place: Any) -> None:
    """Store the vectors' lanes side by side, in the size of exponents: see `emit`."""
    b, width, kind = v.b, form.integer.width, v.of(form.packed)
    found = None
    for i, x in enumerate(vectors):
        kept = b.and_(x, v.constant((1 << width) - 1, v.integers))
        kept = kept if form.short else b.zext(kept, kind)
        kept = b.shl(kept, ir.Constant(kind, [width * i] * v.lanes))
        found = kept if found is None else b.or_(found, kept)
    b.store(found, v.at(array, place, form.integer), align=1)


def _looked_at(v: Vector, d: Definition, x: Any) -> tuple[Any, Any, Any, Any]:
    """Whether it is zero, the exponent as the unit sees it, that of the lowest set bit above ``lowest_base``, and what
    is wrong, in int32 lanes."""
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
    exponent = b.select(zero, number(ZERO), v.larger(highest, smallest))
    foreign = b.or_(
        b.icmp_signed("<", lowest, b.sub(smallest, mantissa)), b.icmp_signed(">", b.sub(highest, lowest), mantissa)
    )
    foreign = b.or_(foreign, b.fcmp_ordered(">", v.floats(bits), v.everywhere(largest)))
    finite = b.icmp_signed("<", field, number(FIELD))
    foreign = b.and_(b.and_(foreign, finite), b.not_(zero))
    faults = b.or_(b.select(foreign, number(NOT_IN_FORMAT), number(0)), b.select(finite, number(0), number(NOT_FINITE)))
    return zero, exponent, b.sub(lowest, v.everywhere(d["lowest_base"])), faults


def _put_value(v: Vector, form: Form, d: Definition, x: Any, index: Any) -> None:
    """Store values, in the floats of the kernel."""
    v.store(v.b.fpext(x, v.of(D)) if form.wide else x, d["values"], index)


def _report(v: Vector, d: Definition, faults: Any) -> None:
    v.put(v.reduced(faults, v.b.or_), d["faults"], I64(0))
