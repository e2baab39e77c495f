"""Fine-grained gradients: the forward pass again, with an indicator of every step kept, then the products backwards.

The indicators of a tile are words of one bit a lane: first those of all steps in order, then, walking back from the
last step, who still reaches the output. Gradients use the operands as they are, in float32.

Words are 16 bits for every number of lanes, so that scratch has one size. The way back goes from the last step to the
first because a recursive indicator is the product of all later ones: carried along, it is one operation a term. A
gradient's terms are added in the order of the tile's registers, whatever the thread.

Legend: as in emit.py; place: one of the rows x vectors registers of a tile.
"""

from functools import cache
from typing import Any

from llvmlite import ir

from recoup.kernels.llvm import I1, I16, I32, I64, F, P, Target, loop
from recoup.kernels.rounding import EXCEPTIONS_MASKED, internal, rounding
from recoup.kernels.signature import Definition, Kernel, Signature
from recoup.lba.emit import (
    CONSTANTS,
    RANDOM,
    SIZES,
    SOURCE,
    chunk_counter,
    chunk_end,
    operand,
    output_index,
    packing,
    panel_columns,
    term_counter,
)
from recoup.lba.emit_code import OUTER, PRODUCT, SUM, Code, Form, Shape
from recoup.lba.emit_random import draws, random_base

GRADIENTS, SCRATCH = {"g": P, "g_stride": I64, "grad_a": P, "grad_b": P}, {"panel": P, "panel_raw": P, "words": P}
GRADIENT = Signature.of(
    first=I64, last=I64, tiles=I64, **SIZES, a=P, a_raw=P, **SOURCE, **GRADIENTS, **CONSTANTS, **SCRATCH, **RANDOM
)
FORWARD = Signature.of(**SIZES, a=P, a_stride=I64, panel=P, words=P, **CONSTANTS, **RANDOM)
BACKWARD = Signature.of(**SIZES, a_raw=P, panel_raw=P, words=P, **GRADIENTS)
EVERY_LANE = I16(-1)


@cache
def build(form: Form, shape: Shape, target: Target, overflow: bool, recursive: bool) -> Kernel:
    """Compile the gradient kernel: column panels ``first .. last``, all row tiles.

    It adds to ``grad_a`` [tiles * rows, K] and ``grad_b`` [panels, K, columns]. ``a`` and ``a_raw`` are contiguous
    [tiles * rows, K], scaled and not; ``g`` is zero where it is padding. ``words`` is scratch for (2 K + chunks) *
    places words.
    """
    module = ir.Module("lba_gradient")
    plain = _Plain()
    pack, pack_raw = packing(module, form, shape), packing(module, plain, shape, "pack_raw")
    forward = _forward(module, form, shape, target, overflow)
    backward = _backward(module, shape, target, overflow, recursive)
    gradient = GRADIENT.define(module, "gradient")
    b, code = gradient.b, Code(gradient, shape, False, target)
    with loop(b, gradient["first"], gradient["last"]) as panels:
        column = b.mul(panels.index, I64(shape.columns))
        columns = panel_columns(code, column)
        with rounding(b, plain.control, target):  # the caller's word may flush
            pack_raw.call(gradient, **columns, b_scale=F(1.0), b_least=I32(0), panel=gradient["panel_raw"])
        with rounding(b, form.control, target):
            pack.call(gradient, **columns)
        grad_b = code.at(gradient["grad_b"], b.mul(column, gradient["K"]))
        with loop(b, I64(0), gradient["tiles"]) as tiles:
            row = b.mul(tiles.index, I64(shape.rows))
            start = b.mul(row, gradient["K"])
            with rounding(b, form.control, target):
                a, index = code.at(gradient["a"], start), output_index(code, row, column)
                forward.call(gradient, a=a, a_stride=gradient["K"], index=index)
            with rounding(b, plain.control, target):
                g = code.at(gradient["g"], b.add(b.mul(row, gradient["g_stride"]), column))
                a_raw, grad_a = (code.at(gradient[name], start) for name in ("a_raw", "grad_a"))
                backward.call(gradient, a_raw=a_raw, g=g, grad_a=grad_a, grad_b=grad_b)
    b.ret_void()
    return Kernel(module, "gradient", GRADIENT, target)


class _Plain:
    """The default floating point environment, float32 lanes: what gradients and their operands need."""

    wide = False
    control = EXCEPTIONS_MASKED


def _word(code: Code, base: Any, step: Any, place: int) -> Any:
    """The address of a step's indicators at one place of the tile."""
    return code.at(base, code.b.add(code.b.mul(step, I64(len(code.shape.places))), I64(place)), I16)


def _keep(code: Code, flags: Any, pointer: Any) -> None:
    word = code.word(flags)
    code.b.store(word if code.lanes == 16 else code.b.zext(word, I16), pointer)


def _regions(code: Code) -> tuple[Any, Any, Any]:
    """Where the words lie: of the steps, of the products, of the outer steps."""
    size = code.b.mul(code.v["K"], I64(len(code.shape.places)))
    own = code.at(code.v["words"], size, I16)
    return code.v["words"], own, code.at(own, size, I16)


def _forward(module: ir.Module, form: Form, shape: Shape, target: Target, overflow: bool) -> Definition:
    """Keep an indicator of every step of one tile: it did not overflow, or it changed the sum."""
    forward = internal(module, "forward", FORWARD)
    b, v, code = forward.b, forward.arguments, Code(forward, shape, form.wide, target)
    code.load_constants()
    passed, own, outer_words = _regions(code)
    bases = [random_base(code, *place) for place in shape.places] if form.random else []
    zeros = [code.zero] * len(shape.places)
    with loop(b, I64(0), v["K"], v["chunk"], [*zeros, I64(0)]) as chunks:
        *outer, number = chunks.values
        with loop(b, chunks.index, chunk_end(code, chunks.index), 1, zeros) as terms:
            counter = term_counter(code, terms.index)
            following = []
            for i, ((row, vector), s) in enumerate(zip(shape.places, terms.values, strict=True)):
                x = operand(code, v["a"], b.add(b.mul(I64(row), v["a_stride"]), terms.index))
                w = code.load(v["panel"], b.add(b.mul(terms.index, I64(shape.columns)), I64(vector * shape.lanes)))
                step = form.term(code, x, w, s, draws(code, bases, i, counter))
                passes = form.inside(code, step.total, SUM) if overflow else b.fcmp_unordered("!=", step.result, s)
                _keep(code, passes, _word(code, passed, terms.index, i))
                if overflow and step.product is not None:
                    _keep(code, form.inside(code, step.product, PRODUCT), _word(code, own, terms.index, i))
                elif overflow:
                    b.store(EVERY_LANE, _word(code, own, terms.index, i))
                following.append(step.result)
            terms.carry(*following)
        counter = chunk_counter(code, number)
        added = []
        for i, (s, y) in enumerate(zip(terms.values, outer, strict=True)):
            step = form.add(code, s, y, draws(code, bases, i, counter))
            passes = form.inside(code, step.total, OUTER) if overflow else b.fcmp_unordered("!=", step.result, y)
            _keep(code, passes, _word(code, outer_words, number, i))
            added.append(step.result)
        chunks.carry(*added, b.add(number, I64(1)))
    b.ret_void()
    return forward


def _backward(module: ir.Module, shape: Shape, target: Target, overflow: bool, recursive: bool) -> Definition:
    """Walk back over the steps of one tile: what still reaches the output adds to both gradients."""
    backward = internal(module, "backward", BACKWARD)
    b, v, code = backward.b, backward.arguments, Code(backward, shape, False, target)
    passed, own, outer_words = _regions(code)
    g = [
        code.load(v["g"], b.add(b.mul(I64(row), v["g_stride"]), I64(vector * shape.lanes)))
        for row, vector in shape.places
    ]
    places = range(len(g))
    last = b.sdiv(b.sub(v["K"], I64(1)), v["chunk"])
    with loop(b, I64(0), b.add(last, I64(1)), 1, [EVERY_LANE for _ in places]) as chunks:
        number = b.sub(last, chunks.index)
        start = b.mul(number, v["chunk"])
        stop = chunk_end(code, start)
        reach = [b.load(_word(code, outer_words, number, i), typ=I16) for i in places]
        if recursive:
            reach = [b.and_(word, later) for word, later in zip(reach, chunks.values, strict=True)]
        with loop(b, I64(0), b.sub(stop, start), 1, reach) as terms:
            k = b.sub(b.sub(stop, I64(1)), terms.index)
            before = terms.values if recursive else reach
            live = [b.and_(b.load(_word(code, passed, k, i), typ=I16), w) for i, w in enumerate(before)]
            reaches = [
                b.and_(w, b.load(_word(code, own, k, i), typ=I16)) if overflow else w for i, w in enumerate(live)
            ]
            _spread(code, k, [_selected(code, w, x) for w, x in zip(reaches, g, strict=True)])
            terms.carry(*(live if recursive else reach))
        chunks.carry(*reach)
    b.ret_void()
    return backward


def _spread(code: Code, k: Any, g: list[Any]) -> None:
    """Add a term's products: grad_b[k] += sum over rows of a g, grad_a[row, k] += sum over columns of b g."""
    b, v, vectors = code.b, code.v, code.shape.vectors
    places = [b.add(b.mul(k, I64(code.shape.columns)), I64(n * code.lanes)) for n in range(vectors)]
    ws = [code.load(v["panel_raw"], place) for place in places]
    sums = [code.load(v["grad_b"], place) for place in places]
    for row in range(code.shape.rows):
        at = b.add(b.mul(I64(row), v["K"]), k)
        x, parts = operand(code, v["a_raw"], at), g[row * vectors : (row + 1) * vectors]
        sums = [_multiply_add(code, x, part, total) for part, total in zip(parts, sums, strict=True)]
        across = b.fmul(parts[0], ws[0])
        for part, w in zip(parts[1:], ws[1:], strict=True):
            across = _multiply_add(code, part, w, across)
        code.put(b.fadd(code.get(v["grad_a"], at, F), code.reduced(across, b.fadd)), v["grad_a"], at)
    for total, place in zip(sums, places, strict=True):
        code.store(total, v["grad_b"], place)


def _selected(code: Code, word: Any, x: Any) -> Any:
    """The lanes whose bit is set, zero elsewhere."""
    b = code.b
    bits = word if code.lanes == 16 else b.trunc(word, ir.IntType(code.lanes))
    return b.select(b.bitcast(bits, code.of(I1)), x, code.zero)


def _multiply_add(code: Code, x: Any, y: Any, z: Any) -> Any:
    """x y + z, rounded once where the processor does that in one instruction."""
    return code.fma(x, y, z) if code.target.fma else code.b.fadd(code.b.fmul(x, y), z)
