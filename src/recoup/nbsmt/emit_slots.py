"""The values of slots side by side, inside images with borders, as LLVM vector IR: what registers that saturate read.

An operand of `recoup.nbsmt.operand` holds its groups one after another, and of each thread after thread or slot after
slot. A slot adds the products of all of them, so those of a slot are dealt together: bytes as they are, in quads, or
values as words, times a power of two. Borders are the caller's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llvmlite import ir

from recoup.kernels import llvm
from recoup.kernels.llvm import I1, I8, I16, I32, I64, P, Target, loop
from recoup.kernels.signature import Definition, Kernel, Signature
from recoup.kernels.vector import Vector

UNITS = 16
"""Of a stream in a vector."""

DEAL = Signature.of(
    first=I64, last=I64, height=I64, width=I64,
    x=P, x_pixel=I64, x_part=I64, stream=I64,
    to=P, to_image=I64, to_row=I64, to_pixel=I64, to_part=I64,
    parts=I64, units=I64, zero=I32, shift=I32,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Form:
    """How the values of a pixel are dealt.

    Attributes:
        streams: so many lie interleaved in the result; 0: any number of parts, which take turns unit by unit.
        size: bytes of a unit, which stay together; 1 of words.
        words: whether bytes become words, ``(byte - zero) << shift``.
    """

    streams: int
    size: int
    words: bool = False


@lru_cache(64)
def deal(form: Form, target: Target) -> Kernel:
    """Rows ``first .. last`` of all images, of ``height`` rows of ``width`` pixels each. Steps and sizes are in bytes.

    A pixel has ``parts`` parts, ``x_part`` and ``to_part`` apart, of ``units`` units a stream. Streams lie ``stream``
    apart in ``x`` and take turns in ``to``; where there are none, a part's units lie ``stream`` apart in ``to``. Row h
    of image n is written from ``to + n to_image + h to_row`` on.
    """
    return Kernel(deal_module(form, target), "deal", DEAL, target)


def deal_module(form: Form, target: Target) -> ir.Module:
    """Code of `deal`."""
    module = ir.Module("nbsmt")
    d = DEAL.define(module, "deal")
    b, at = d.b, Vector(d.b, UNITS).at
    with loop(b, d["first"], d["last"]) as row:
        image, line = b.udiv(row.index, d["height"]), b.urem(row.index, d["height"])
        to_row = at(d["to"], b.add(b.mul(image, d["to_image"]), b.mul(line, d["to_row"])), I8)
        with loop(b, I64(0), d["width"]) as column:
            pixel = b.add(b.mul(row.index, d["width"]), column.index)
            x, to = at(d["x"], b.mul(pixel, d["x_pixel"]), I8), at(to_row, b.mul(column.index, d["to_pixel"]), I8)
            part = _interleaved if form.streams else _turned if "avx512bw" in target.features else _apart
            with loop(b, I64(0), d["parts"], UNITS if part is _turned else 1) as turn:
                places = at(x, b.mul(turn.index, d["x_part"]), I8), at(to, b.mul(turn.index, d["to_part"]), I8)
                part(d, form, *places, b.sub(d["parts"], turn.index))
    b.ret_void()
    return module


def _apart(d: Definition, form: Form, x: Any, to: Any, _: Any) -> None:
    """A part's units, one by one."""
    b, v = d.b, Vector(d.b, UNITS)
    with loop(b, I64(0), d["units"]) as unit:
        value = _values(d, form, v.get(x, unit.index, ir.IntType(8 * form.size)))
        v.put(value, v.at(to, b.mul(unit.index, d["stream"]), I8), I64(0))


def _turned(d: Definition, form: Form, x: Any, to: Any, parts: Any) -> None:
    """`UNITS` parts at a time, or the ``parts`` that are left: squares of bytes, transposed."""
    b, v = d.b, Vector(d.b, UNITS)
    kind = v.of(ir.IntType(8 * form.size))
    some = v.inside(I64(0), parts)
    with loop(b, I64(0), d["units"], UNITS) as turn:
        left = b.sub(d["units"], turn.index)
        inside, rows = v.inside(I64(0), left), []
        for i in range(UNITS):
            row = b.select(b.icmp_signed("<", I64(i), parts), I64(i), I64(0))
            rows.append(v.load(v.at(x, b.mul(row, d["x_part"]), I8), turn.index, inside, kind))
        for i, column in enumerate(v.transposed(rows)):
            with b.if_then(b.icmp_signed("<", I64(i), left)):
                place = b.mul(b.add(turn.index, I64(i)), d["stream"])
                v.store(_values(d, form, column), v.at(to, place, I8), I64(0), some)


def _interleaved(d: Definition, form: Form, x: Any, to: Any, _: Any) -> None:
    """A part's streams, `UNITS` of each at a time."""
    b, v, wide = d.b, Vector(d.b, UNITS), Vector(d.b, UNITS * form.streams)
    kind = v.of(ir.IntType(8 * form.size))
    whole = b.and_(d["units"], I64(-UNITS))
    left = b.sub(d["units"], whole)

    def dealt(place: Any, read: Callable[[Any], Any], inside: Any = None) -> None:
        parts = [
            read(v.at(b.gep(x, [b.mul(d["stream"], I64(i))], source_etype=I8), place, kind.element))
            for i in range(form.streams)
        ]
        while len(parts) > 1:
            # Each step interleaves the first half with the second, so that in the end all take turns in their order.
            half, size = len(parts) // 2, parts[0].type.count
            order = [lane for i in range(size) for lane in (i, size + i)]
            parts = [llvm.shuffle(b, parts[i], order, parts[half + i]) for i in range(half)]
        wide.store(_values(d, form, parts[0]), to, b.mul(place, I64(form.streams)), inside)

    with loop(b, I64(0), whole, UNITS) as turn:
        dealt(turn.index, lambda address: b.load(address, typ=kind, align=1))
    with b.if_then(b.icmp_signed(">", left, I64(0))):
        few, all_few = (_first(b, left, times) for times in (1, form.streams))
        dealt(whole, lambda address: v.load(address, I64(0), few, kind), all_few)


def _first(b: ir.IRBuilder, count: Any, times: int) -> Any:
    """The first ``count * times`` of ``UNITS * times`` lanes, which are not all."""
    word = ir.IntType(UNITS * times)
    bits: Any = b.mul(count, I64(times))
    bits = bits if word.width == I64.width else b.trunc(bits, word)
    return b.bitcast(b.sub(b.shl(word(1), bits), word(1)), ir.VectorType(I1, word.width))


def _values(d: Definition, form: Form, byte: Any) -> Any:
    """Bytes, one or a vector, as words where they are to be."""
    if not form.words:
        return byte
    b = d.b
    zero, shift = (b.trunc(d[name], I16) for name in ("zero", "shift"))
    if not isinstance(byte.type, ir.VectorType):
        return b.shl(b.sub(b.zext(byte, I16), zero), shift)
    lanes = byte.type.count
    wide = b.zext(byte, ir.VectorType(I16, lanes))
    return b.shl(b.sub(wide, llvm.splat(b, zero, lanes)), llvm.splat(b, shift, lanes))
