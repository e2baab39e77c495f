"""What the tensor core's kernels want to know of an operand, as LLVM vector IR: value, exponent, lowest set bit.

In the same pass it shows whether a value belongs to the operand's format, and whether it is finite.
"""

from functools import cache, reduce
from typing import Any

from llvmlite import ir

from recoup.kernels.llvm import I32, I64, D, F, P, Target, loop, shuffle
from recoup.kernels.signature import Definition, Kernel, Signature
from recoup.kernels.vector import Vector
from recoup.tensorcore.emit_form import VECTORS, ZERO, Form

LANES = 16
FRACTION, BIAS, FIELD = 23, 127, 255
SIGN = 128  # of a folded byte
NOT_IN_FORMAT, NOT_FINITE = 1, 2  # what `prepare_rows` and `prepare_columns` find

FORMAT = {"mantissa": I32, "min_exponent": I32, "largest": F, "exponent_base": I32, "lowest_base": I32, "nothing": I32}
SCALES = {"scales": P, "scales_stride": I64, "block": I64}
ROWS = Signature.of(
    M=I64, K=I64, blocks=I64, x=P, stride=I64, values=P, exponents=P, lowest=P, signs=P, faults=P, **FORMAT, **SCALES
)  # fmt: skip
COLUMNS = Signature.of(
    K=I64, tiles=I64, x=P, stride=I64, values=P, exponents=P, lowest=P, faults=P, **FORMAT, **SCALES
)  # fmt: skip


@cache
def prepare_rows(form: Form, target: Target, scaled: bool = False) -> Kernel:
    """Of [M, K] numbers, ``stride`` from row to row, in the order that `emit` says: values; what exponents lack to
    ``exponent_base``, and lowest bits above ``lowest_base``, as often as 32 bits hold them; and signs, as bytes from
    columns' lowest bits for positive values to those for negative ones. The last block repeats the last row; beyond it
    up to `LANES` k more are written.

    ``nothing``: what a zero's exponent lacks, in bytes.

    ``scaled``: the numbers have been multiplied by powers of two, of which every ``block`` of k, a multiple of 16,
    shares one; their exponents, int32, are ``scales``.
    """
    module = ir.Module("rows")
    d = ROWS.define(module, "rows")
    b, v = d.b, Vector(d.b, LANES)
    none = [v.constant(0, v.integers)]
    with loop(b, I64(0), d["blocks"], 1, none) as block:
        with loop(b, I64(0), d["K"], LANES, block.values) as term:
            place = b.mul(b.add(b.mul(block.index, d["K"]), term.index), I64(form.rows))
            faults = _block(v, d, form, (block.index, term.index, place), scaled)
            term.carry(reduce(b.or_, faults, term.values[0]))
        block.carry(*term.values)
    _report(v, d, block.values[0])
    b.ret_void()
    return Kernel(module, "rows", ROWS, target)


def _block(v: Vector, d: Definition, form: Form, at: tuple[Any, Any, Any], scaled: bool) -> list[Any]:
    """A block's rows, 16 k of each, from k on to ``place``: their faults."""
    b, (block, k, place) = v.b, at
    inside, made, faults = v.inside(k, d["K"]), [], []
    for i in range(form.rows):
        wanted = b.add(b.mul(block, I64(form.rows)), I64(i))
        row = b.select(b.icmp_signed("<", wanted, d["M"]), wanted, b.sub(d["M"], I64(1)))
        x = v.load(d["x"], b.add(b.mul(row, d["stride"]), k), inside)
        scale = None
        if scaled:
            own = b.add(b.mul(row, d["scales_stride"]), b.sdiv(k, d["block"]))
            scale = v.everywhere(v.get(d["scales"], own, I32))
        zero, exponent, lowest, found = _looked_at(v, d, x, scale)
        missing = b.sub(v.everywhere(d["exponent_base"]), exponent)
        if form.short:  # a difference that never wins
            missing = b.select(zero, v.everywhere(d["nothing"]), missing)
        negative = b.ashr(v.bits(x), v.constant(31, v.integers))
        if form.folded:
            lowest = b.or_(lowest, b.and_(negative, v.constant(SIGN, v.integers)))
        lowest = b.select(zero, v.constant(form.never, v.integers), lowest)
        apart = form.columns * form.integer.width // 8
        sign = b.and_(negative, v.constant(apart, v.integers))
        own = (_value(v, form, x), _repeated(v, form, missing), _repeated(v, form, lowest))
        made.append(own if form.folded else (*own, sign))
        faults.append(b.select(inside, found, v.constant(0, v.integers)))
    names = ("values", "exponents", "lowest") if form.folded else ("values", "exponents", "lowest", "signs")
    for name, vectors in zip(names, zip(*made, strict=True), strict=True):
        for i, x in enumerate(_side_by_side(v, list(vectors))):
            v.store(x, d[name], b.add(place, I64(i * v.lanes)))
    return faults


def _side_by_side(v: Vector, vectors: list[Any]) -> list[Any]:
    """Lane 0 of every vector, then lane 1 of every one, and so on, as many vectors again."""
    count, made = len(vectors), []
    for first in range(0, count * v.lanes, v.lanes):
        wanted = range(first, first + v.lanes)
        # Of two vectors at a time, which is one operation where processors have any such choice.
        found = shuffle(v.b, vectors[0], [i // count for i in wanted])
        for row, x in enumerate(vectors[1:], 1):
            lanes = [v.lanes + i // count if i % count == row else i - first for i in wanted]
            found = shuffle(v.b, found, lanes, x)
        made.append(found)
    return made


def _repeated(v: Vector, form: Form, x: Any) -> Any:
    """The low bits of every lane, as often as it holds them."""
    mask, often = (0xFF, 0x01010101) if form.short else (0xFFFF, 0x00010001)
    return v.b.mul(v.b.and_(x, v.constant(mask, v.integers)), v.constant(often, v.integers))


@cache
def prepare_columns(form: Form, target: Target, scaled: bool = False) -> Kernel:
    """Of [K, tiles * columns] numbers, ``stride`` from row to row: values, exponents above -``exponent_base`` and the
    two arrays of lowest bits, tile by tile, in the order that `emit` says; ``scaled`` as in `prepare_rows`."""
    module = ir.Module("columns")
    d = COLUMNS.define(module, "columns")
    b, v = d.b, Vector(d.b, form.lanes)
    with loop(b, I64(0), d["tiles"], 1, [v.constant(0, v.integers)]) as tile:
        with loop(b, I64(0), d["K"], 1, tile.values) as term:
            source = b.add(b.mul(term.index, d["stride"]), b.mul(tile.index, I64(form.columns)))
            place = b.mul(b.add(b.mul(tile.index, d["K"]), term.index), I64(form.columns))
            scales = None
            if scaled:
                row = b.mul(b.sdiv(term.index, d["block"]), d["scales_stride"])
                scales = b.add(row, b.mul(tile.index, I64(form.columns)))
            faults = _column(v, d, form, (source, place, scales))
            term.carry(reduce(b.or_, faults, term.values[0]))
        tile.carry(*term.values)
    _report(v, d, tile.values[0])
    b.ret_void()
    return Kernel(module, "columns", COLUMNS, target)


def _column(v: Vector, d: Definition, form: Form, at: tuple[Any, Any, Any]) -> list[Any]:
    """A tile's columns of one k, from ``source`` to ``place``, with scales from a third place: their faults."""
    b, never, (source, place, scales) = v.b, v.constant(form.never, v.integers), at
    exponents, positives, negatives, faults = [], [], [], []
    for i in range(VECTORS):
        first = I64(i * form.lanes)
        x = v.load(d["x"], b.add(source, first))
        scale = None if scales is None else v.load(d["scales"], b.add(scales, first), kind=v.integers)
        zero, exponent, lowest, found = _looked_at(v, d, x, scale)
        v.store(_value(v, form, x), d["values"], b.add(place, first))
        kept = b.add(exponent, v.everywhere(d["exponent_base"]))
        exponents.append(b.select(zero, v.everywhere(d["nothing"]), kept) if form.short else kept)
        positive = b.icmp_signed(">=", v.bits(x), v.constant(0, v.integers))
        faults.append(found)
        if form.folded:
            lowest = b.or_(lowest, b.select(positive, v.constant(0, v.integers), v.constant(SIGN, v.integers)))
            positives.append(b.select(zero, v.constant(form.never | SIGN, v.integers), lowest))
            continue
        lowest = b.select(zero, never, lowest)
        positives.append(b.select(positive, never, lowest))
        negatives.append(b.select(positive, lowest, never))
    twice = b.mul(place, I64(form.copies))
    _put_together(v, form, exponents, d["exponents"], place)
    _put_together(v, form, positives, d["lowest"], twice)
    if not form.folded:
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


def _looked_at(v: Vector, d: Definition, x: Any, power: Any = None) -> tuple[Any, Any, Any, Any]:
    """Whether it is zero, the exponent as the unit sees it, that of the lowest set bit above ``lowest_base``, and what
    is wrong, in int32 lanes; ``power``: the exponents of the powers of two that x has been multiplied by."""
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
    mantissa, smallest, largest = (v.everywhere(d[name]) for name in ("mantissa", "min_exponent", "largest"))
    nothing = number(ZERO)
    if power is not None:
        smallest, nothing = b.add(smallest, power), b.add(nothing, power)
        largest = b.fmul(largest, v.floats(b.shl(b.add(power, number(BIAS)), number(FRACTION))))
    zero = b.icmp_signed("==", bits, number(0))
    exponent = b.select(zero, nothing, v.larger(highest, smallest))
    foreign = b.or_(
        b.icmp_signed("<", lowest, b.sub(smallest, mantissa)), b.icmp_signed(">", b.sub(highest, lowest), mantissa)
    )
    foreign = b.or_(foreign, b.fcmp_ordered(">", v.floats(bits), largest))
    finite = b.icmp_signed("<", field, number(FIELD))
    foreign = b.and_(b.and_(foreign, finite), b.not_(zero))
    faults = b.or_(b.select(foreign, number(NOT_IN_FORMAT), number(0)), b.select(finite, number(0), number(NOT_FINITE)))
    return zero, exponent, b.sub(lowest, v.everywhere(d["lowest_base"])), faults


def _value(v: Vector, form: Form, x: Any) -> Any:
    """In the floats of the kernel."""
    return v.b.fpext(x, v.of(D)) if form.wide else x


def _report(v: Vector, d: Definition, faults: Any) -> None:
    v.put(v.reduced(faults, v.b.or_), d["faults"], I64(0))
