"""Groups whose weights are mostly zero, as LLVM vector IR: only the quads that hold a weight are multiplied.

Four threads need up to ten groups for weights with a partner that is zero, and few weights have one. A vector holds a
quad, four bytes of the operand, of 16 output pixels; each output channel has a list of its quads at the kernel's taps
(`recoup.nbsmt.lists`), and one instruction multiplies four bytes by four bytes and adds all to the sum.

A plane is a quad at all places of an image with its padding. With strides, places lie phase by phase, so that those of
neighbouring outputs are neighbours; a tap is a distance between places. Codes become planes, and planes of codes those
of the groups: a channel's partners are in other planes at the same place, or in its own quad, so that no byte moves.
Where two groups take the same weights, as w and its reduced form, a quad holds two channels of both.

Legend: C channels, Q = C / 4 quads of a group; V vectors of 16 places, a tile; O output channels. Distances and sizes
are in bytes unless said otherwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llvmlite import ir

from recoup.kernels import llvm
from recoup.kernels.llvm import I8, I32, I64, P, Target, loop
from recoup.kernels.signature import Definition, Kernel, Signature
from recoup.kernels.vector import Vector
from recoup.nbsmt.combine import Recipe, group_values

LANES, QUAD, VECTOR = 16, 4, 64
"""Lanes of a vector, bytes of each, and of all."""

STEP = 8
"""Bytes of a step: an offset and four weights."""

CODES = Signature.of(x=P, zeros=P, sources=P, places=I64, quads=I64, codes=P)
PLANES = Signature.of(codes=P, places=I64, quads=I64, planes=P)
WALK = Signature.of(outputs=I64, steps=P, ends=P, planes=P, sums=P)
ADD = Signature.of(outputs=I64, sums=P, to=P, out=P)
IMAGES = Signature.of(
    first=I64, last=I64, x=P, image=I64, zeros=P, sources=P, places=I64, quads=I64,
    tiles=I64, outputs=I64, steps=P, ends=P, to=P, out=P, out_image=I64, codes=P, planes=P, sums=P,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Form:
    """What a kernel is specialised for.

    Attributes:
        recipe: of the groups; ``width`` is C where that is below 64.
        paired: whether a group shares its quads with the next one.
        vectors: V.
    """

    recipe: Recipe
    paired: tuple[bool, ...]
    vectors: int


@lru_cache(64)
def images(form: Form, target: Target) -> Kernel:
    """Add the groups' sums to the outputs of images ``first .. last``, tile by tile of 16 V places.

    Args:
        x: codes of an image, uint8, pixel by pixel, with 64 bytes behind; ``image`` apart.
        zeros: C + 64 bytes of 0: a place of the padding.
        sources: int64 [places]: where a place's codes lie in ``x``, or -1 for ``zeros``.
        places: how many there are, a multiple of 16.
        quads: Q.
        outputs: O.
        steps: int32 [steps, 2]: from a tile's first place in the first plane to a step's quads, and four weights.
        ends: int64 [O + 1]: where the steps of an output channel begin, and where the last one's end.
        to: int64 [tiles 16 V]: where the output of a place lies in ``out``, or -1: there is none.
        out: float32, whole numbers, O side by side; of an image, ``out_image`` apart.
        codes, planes, sums: memory: [Q rounded up to 16, places] and [groups Q, places] quads, and int32 [O rounded up
            to 16, 16 V], 0 beyond O.
    """
    return Kernel(images_module(form), "images", IMAGES, target)


def images_module(form: Form) -> ir.Module:
    """Code of `images`."""
    module = ir.Module("nbsmt")
    codes, planes = _codes(module, form), _planes(module, form)
    walk, add = _walk(module, form.vectors), _add(module, form.vectors)
    d = IMAGES.define(module, "images")
    b, at = d.b, Vector(d.b, LANES).at
    wide = I64(form.vectors * LANES)
    with loop(b, d["first"], d["last"]) as image:
        codes.call(d, x=at(d["x"], b.mul(image.index, d["image"]), I8))
        planes.call(d)
        out = at(d["out"], b.mul(image.index, d["out_image"]), I8)
        with loop(b, I64(0), d["tiles"]) as tile:
            place = b.mul(tile.index, wide)
            walk.call(d, planes=at(d["planes"], place, I32))
            add.call(d, to=at(d["to"], place, I64), out=out)
    b.ret_void()
    return module


def _codes(module: ir.Module, form: Form) -> Definition:
    """Codes pixel by pixel to planes, 16 places and up to 16 quads at a time."""
    d = CODES.define(module, "codes_of")
    b, v = d.b, Vector(d.b, LANES)
    kept = min(form.recipe.width // QUAD, LANES) or LANES
    with loop(b, I64(0), d["places"], LANES) as place:
        pixels = []
        for p in range(LANES):
            source = v.get(d["sources"], b.add(place.index, I64(p)), I64)
            there = b.icmp_signed(">=", source, I64(0))
            pixels.append(b.select(there, v.at(d["x"], source, I8), d["zeros"]))
        with loop(b, I64(0), d["quads"], LANES) as first:
            rows = [v.load(pixel, first.index, kind=v.integers) for pixel in pixels]
            for i, quad in enumerate(v.transposed(rows)[:kept]):
                plane = b.mul(b.add(first.index, I64(i)), d["places"])
                v.store(quad, d["codes"], b.add(plane, place.index))
    b.ret_void()
    return d


def _planes(module: ir.Module, form: Form) -> Definition:
    """Planes of codes to those of the groups."""
    d = PLANES.define(module, "planes_of")
    b, v = d.b, Vector(d.b, LANES)
    kind, threads = ir.VectorType(I8, VECTOR), form.recipe.config.threads
    apart = b.sdiv(d["quads"], I64(threads))
    with loop(b, I64(0), d["quads"]) as quad, loop(b, I64(0), d["places"], LANES) as place:

        def codes(of: Any) -> Any:
            return b.load(v.at(d["codes"], b.add(b.mul(of, d["places"]), place.index), I32), typ=kind, align=1)

        own = codes(quad.index)

        def partner(offset: int) -> Any:
            if form.recipe.config.pairing == "adjacent":
                order = [c - c % threads + (c + offset) % threads for c in range(VECTOR)]
                return llvm.shuffle(b, own, order)
            of = b.add(quad.index, b.mul(apart, I64(offset)))
            beyond = b.icmp_signed(">=", of, d["quads"])
            return codes(b.select(beyond, b.sub(of, d["quads"]), of))

        groups = group_values(b, form.recipe, own, partner)
        for number, plane, value in _laid(b, form, groups, quad.index):
            at = b.mul(b.add(b.mul(I64(number), d["quads"]), plane), d["places"])
            b.store(value, v.at(d["planes"], b.add(at, place.index), I32), align=1)
    b.ret_void()
    return d


def _laid(b: ir.IRBuilder, form: Form, groups: list[Any], quad: Any) -> Iterator[tuple[int, Any, Any]]:
    """The vectors of a quad's groups: the group whose planes they are among, the plane among these, and the vector."""
    for g, value in enumerate(groups):
        if g and form.paired[g - 1]:
            continue  # with the one before
        if not form.paired[g]:
            yield g, quad, value
            continue
        for half in range(2):
            order = [c - c % QUAD + 2 * half + c % QUAD // 2 + VECTOR * (c % 2) for c in range(VECTOR)]
            plane = b.add(b.mul(quad, I64(2)), I64(half))
            yield g, plane, llvm.shuffle(b, value, order, groups[g + 1])


def _walk(module: ir.Module, vectors: int) -> Definition:
    """The sums of a tile: int32 [O, V, 16]."""
    d = WALK.define(module, "walk")
    b, v = d.b, Vector(d.b, LANES)
    zero = ir.Constant(v.integers, None)
    with loop(b, I64(0), d["outputs"]) as output:
        first, last = (v.get(d["ends"], place, I64) for place in (output.index, b.add(output.index, I64(1))))
        with loop(b, first, last, 1, [zero] * vectors, unroll=False) as step:
            at = v.at(d["steps"], b.mul(step.index, I64(STEP)), I8)
            quads = v.at(d["planes"], b.sext(v.get(at, I64(0), I32), I64), I8)
            weights = v.everywhere(v.get(at, I64(1), I32))
            step.carry(*(_added(b, s, v, quads, i, weights) for i, s in enumerate(step.values)))
        row = b.mul(output.index, I64(vectors * LANES))
        for i, s in enumerate(step.values):
            v.store(s, d["sums"], b.add(row, I64(LANES * i)))
    b.ret_void()
    return d


def _added(b: ir.IRBuilder, total: Any, v: Vector, quads: Any, vector: int, weights: Any) -> Any:
    """A sum plus four products of every lane."""
    kind = v.integers
    x = v.load(quads, I64(LANES * vector), kind=kind)
    function = llvm.declared(b, "llvm.x86.avx512.vpdpbusd.512", kind, [kind, kind, kind])
    return b.call(function, [total, x, weights])


def _add(module: ir.Module, vectors: int) -> Definition:
    """A tile's sums to the outputs that are there, 16 output channels at a time; the last may be fewer."""
    d = ADD.define(module, "add")
    b, v = d.b, Vector(d.b, LANES)
    with loop(b, I64(0), d["outputs"], LANES) as channel:
        inside = v.inside(channel.index, d["outputs"])
        with loop(b, I64(0), I64(vectors * LANES), LANES) as place:
            rows = []
            for i in range(LANES):
                row = b.mul(b.add(channel.index, I64(i)), I64(vectors * LANES))
                rows.append(v.load(d["sums"], b.add(row, place.index), kind=v.integers))
            for p, total in enumerate(v.transposed(rows)):
                to = v.get(d["to"], b.add(place.index, I64(p)), I64)
                with b.if_then(b.icmp_signed(">=", to, I64(0))):
                    out = v.at(d["out"], to, I8)
                    before = v.load(out, channel.index, inside)
                    v.store(b.fadd(before, b.sitofp(total, v.vector)), out, channel.index, inside)
    b.ret_void()
    return d
