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
AHEAD = 8  # k that columns are asked for before they are read: their rows lie too far apart for processors to foresee
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
    ``exponent_base``, and lowest bits above ``lowest_base``, see `Form.repeated`; and signs, as bytes from
    columns' lowest bits for positive values to those for negative ones. The last block repeats the last row; beyond it
    up to `LANES` k more are written.

    ``nothing``: what a zero's exponent lacks, in bytes.

    ``scaled``: the numbers have been multiplied by powers of two, of which every ``block`` of k, a multiple of 16,
    shares one; their exponents, int32, are ``scales``.
    """
    module = ir.Module("rows")
    d = ROWS.define(module, "rows")
    b, v = d.b, Vector(d.b, LANES)
    none = [v.constant(0, v.integers)] * 2
    with loop(b, I64(0), d["blocks"], 1, none) as block:
        with loop(b, I64(0), d["K"], LANES, block.values) as term:
            place = b.mul(b.add(b.mul(block.index, d["K"]), term.index), I64(form.rows))
            faults = _block(v, d, form, (block.index, term.index, place), scaled)
            term.carry(*_together(v, faults, term.values))
        block.carry(*term.values)
    _report(v, d, block.values)
    b.ret_void()
    return Kernel(module, "rows", ROWS, target)


def _block(v: Vector, d: Definition, form: Form, at: tuple[Any, Any, Any], scaled: bool) -> list[list[Any]]:
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
        faults.append(found)  # beyond the row's end there are zeros
    names = ("values", "exponents", "lowest") if form.folded else ("values", "exponents", "lowest", "signs")
    for name, vectors in zip(names, zip(*made, strict=True), strict=True):
        for i, x in enumerate(_side_by_side(v, list(vectors))):
            whole = form.repeated or name in ("values", "signs")
            v.store(x if whole else b.trunc(x, v.of(form.kept)), d[name], b.add(place, I64(i * v.lanes)))
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
    """The low bits of every lane, as often as it holds them where rows keep them so."""
    if not form.repeated:
        return x
    mask, often = (0xFF, 0x01010101) if form.short else (0xFFFF, 0x00010001)
    return v.b.mul(v.b.and_(x, v.constant(mask, v.integers)), v.constant(often, v.integers))


@cache
def prepare_columns(form: Form, target: Target, scaled: bool = False) -> Kernel:
    """Of [K, tiles * columns] numbers, ``stride`` from row to row: values, exponents above -``exponent_base`` and the
    two arrays of lowest bits, tile by tile, in the order that `emit` says; ``scaled`` as in `prepare_rows`."""
    module = ir.Module("columns")
    d = COLUMNS.define(module, "columns")
    b, v = d.b, Vector(d.b, form.lanes)
    with loop(b, I64(0), d["tiles"], 1, [v.constant(0, v.integers)] * 2) as tile:
        with loop(b, I64(0), d["K"], 1, tile.values) as term:
            source = b.add(b.mul(term.index, d["stride"]), b.mul(tile.index, I64(form.columns)))
            place = b.mul(b.add(b.mul(tile.index, d["K"]), term.index), I64(form.columns))
            scales = None
            if scaled:
                row = b.mul(b.sdiv(term.index, d["block"]), d["scales_stride"])
                scales = b.add(row, b.mul(tile.index, I64(form.columns)))
            faults = _column(v, d, form, (source, place, scales))
            term.carry(*_together(v, faults, term.values))
        tile.carry(*term.values)
    _report(v, d, tile.values)
    b.ret_void()
    return Kernel(module, "columns", COLUMNS, target)


def _column(v: Vector, d: Definition, form: Form, at: tuple[Any, Any, Any]) -> list[list[Any]]:
    """A tile's columns of one k, from ``source`` to ``place``, with scales from a third place: their faults."""
    b, never, (source, place, scales) = v.b, v.constant(form.never, v.integers), at
    exponents, positives, negatives, faults = [], [], [], []
    for i in range(VECTORS):
        first = I64(i * form.lanes)
        x = v.load(d["x"], b.add(source, first))
        v.prefetch(d["x"], b.add(b.add(source, first), b.mul(d["stride"], I64(AHEAD))))
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


def _looked_at(v: Vector, d: Definition, x: Any, power: Any = None) -> tuple[Any, Any, Any, list[Any]]:
    """Whether it is zero, the exponent as the unit sees it, that of the lowest set bit above ``lowest_base``, in int32
    lanes, and of every fault lanes that are negative where it has it; ``power``: the exponents of the powers of two
    that x has been multiplied by."""
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
    lowest = b.add(scale, b.sub(_exponent(v, bit), number(BIAS + FRACTION)))
    mantissa, smallest, largest = (v.everywhere(d[name]) for name in ("mantissa", "min_exponent", "largest"))
    # Without powers of two no format's smallest exponent is below that of float32's subnormals.
    highest, nothing = b.sub(scale, number(BIAS)), number(ZERO)
    if power is not None:
        highest = b.add(scale, b.sub(_exponent(v, significand), number(BIAS + FRACTION)))
        smallest, nothing = b.add(smallest, power), b.add(nothing, power)
        largest = b.fmul(largest, v.floats(b.shl(b.add(power, number(BIAS)), number(FRACTION))))
    zero = b.icmp_signed("==", bits, number(0))
    exponent = v.larger(highest, smallest)
    infinite = b.sub(number((FIELD << FRACTION) - 1), bits)
    foreign = b.or_(b.sub(lowest, b.sub(exponent, mantissa)), b.sub(v.bits(largest), bits))
    foreign = b.select(zero, number(0), b.and_(foreign, b.not_(infinite)))
    return zero, b.select(zero, nothing, exponent), b.sub(lowest, v.everywhere(d["lowest_base"])), [foreign, infinite]


def _exponent(v: Vector, x: Any) -> Any:
    """Of positive integers that a float32 holds, and -127 of zero."""
    b = v.b
    return b.sub(b.lshr(v.bits(b.sitofp(x, v.vector)), v.constant(FRACTION, v.integers)), v.constant(BIAS, v.integers))


def _value(v: Vector, form: Form, x: Any) -> Any:
    """In the floats of the kernel."""
    return v.b.fpext(x, v.of(D)) if form.wide else x


def _together(v: Vector, faults: list[list[Any]], before: list[Any]) -> list[Any]:
    """Lanes that are negative where any were."""
    return [reduce(v.b.or_, found, kept) for found, kept in zip(zip(*faults, strict=True), before, strict=True)]


def _report(v: Vector, d: Definition, faults: list[Any]) -> None:
    b = v.b
    found = [b.lshr(v.reduced(x, b.or_), I32(31)) for x in faults]
    codes = [b.mul(x, I32(code)) for x, code in zip(found, (NOT_IN_FORMAT, NOT_FINITE), strict=True)]
    v.put(reduce(b.or_, codes), d["faults"], I64(0))
