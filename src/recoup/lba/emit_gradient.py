"""Fine-grained gradients: the forward pass again, with an indicator of every step kept, then the products backwards.

The indicators of a tile are words of one bit a lane: first those of all steps in order, then, walking back from the
last step, who still reaches the output. Gradients use the operands as they are, in float32.

Legend: as in emit.py; place: one of the rows x vectors registers of a tile.
"""

import ctypes
from functools import cache
from typing import Any

from llvmlite import ir

from recoup.kernels.llvm import Native, Target, loop, splat
from recoup.lba.emit import (
    EXCEPTIONS_MASKED,
    I16,
    I32,
    I64,
    OUTER,
    PRODUCT,
    SUM,
    VOID,
    Code,
    Form,
    Shape,
    draws,
    enter,
    internal,
    leave,
    packing,
    random_base,
    spots,
)

FLOATS, WORDS = ir.FloatType().as_pointer(), I16.as_pointer()


def kinds(form: Form) -> dict[str, tuple[Any, Any]]:
    """The kernel's arguments: name -> (LLVM type, ctypes type)."""
    scalar = ir.DoubleType() if form.wide else ir.FloatType()
    size, address = (I64, ctypes.c_int64), ctypes.c_void_p
    floats = (FLOATS, address)
    return {
        **dict.fromkeys(("first", "last", "tiles", "K", "chunk"), size),
        "a": floats,
        "a_raw": floats,
        "b": floats,
        "b_terms": (I64.as_pointer(), address),
        "b_columns": (I64.as_pointer(), address),
        "b_straight": (ir.IntType(8).as_pointer(), address),
        "b_scale": (ir.FloatType(), ctypes.c_float),
        "b_least": (I32, ctypes.c_int32),
        "g": floats,
        "g_stride": size,
        "grad_a": floats,
        "grad_b": floats,
        "floats": (scalar.as_pointer(), address),
        "integers": ((I64 if form.wide else I32).as_pointer(), address),
        "panel": (scalar.as_pointer(), address),
        "panel_raw": floats,
        "words": (WORDS, address),
        **dict.fromkeys(("seed_base", "index", "index_row", "index_column"), size),
    }


@cache
def build(form: Form, shape: Shape, target: Target, overflow: bool, recursive: bool) -> Native:
    """Compile the gradient kernel: column panels ``first .. last``, all row tiles.

    It adds to ``grad_a`` [tiles * rows, K] and ``grad_b`` [panels, K, columns]. ``a`` and ``a_raw`` are contiguous
    [tiles * rows, K], scaled and not; ``g`` is zero where it is padding. ``words`` is scratch for (2 K + chunks) *
    places words.
    """
    types = kinds(form)
    module = ir.Module("lba_gradient")
    plain = _Plain()
    pack, pack_raw = packing(module, form, shape), packing(module, plain, shape, "pack_raw")
    forward = _forward(module, form, shape, target, overflow)
    backward = _backward(module, shape, target, overflow, recursive)
    made = ir.Function(module, ir.FunctionType(VOID, [llvm for llvm, _ in types.values()]), "gradient")
    b = ir.IRBuilder(made.append_basic_block("entry"))
    v = dict(zip(types, made.args, strict=True))
    with loop(b, v["first"], v["last"]) as panels:
        column = b.mul(panels.index, I64(shape.columns))
        layout = [v["K"], v["b"], v["b_terms"], *spots(b, v, column, shape)]
        saved = enter(b, plain.control, target)  # the caller's word may flush
        b.call(pack_raw, [*layout, ir.FloatType()(1.0), I32(0), v["panel_raw"]])
        leave(b, saved, target)
        saved = enter(b, form.control, target)
        b.call(pack, [*layout, v["b_scale"], v["b_least"], v["panel"]])
        leave(b, saved, target)
        grad_b = b.gep(v["grad_b"], [b.mul(column, v["K"])])
        with loop(b, I64(0), v["tiles"]) as tiles:
            row = b.mul(tiles.index, I64(shape.rows))
            offset = b.mul(row, v["K"])
            spot = b.add(b.mul(row, v["index_row"]), b.mul(column, v["index_column"]))
            random = [v["seed_base"], b.add(v["index"], spot), v["index_row"], v["index_column"]]
            saved = enter(b, form.control, target)
            arguments = [v["K"], v["chunk"], b.gep(v["a"], [offset]), v["K"], v["panel"], v["words"]]
            b.call(forward, [*arguments, v["floats"], v["integers"], *random])
            leave(b, saved, target)
            saved = enter(b, plain.control, target)
            g = b.gep(v["g"], [b.add(b.mul(row, v["g_stride"]), column)])
            pieces = [b.gep(v["a_raw"], [offset]), v["panel_raw"], v["words"], g, v["g_stride"]]
            b.call(backward, [v["K"], v["chunk"], *pieces, b.gep(v["grad_a"], [offset]), grad_b])
            leave(b, saved, target)
    b.ret_void()
    return Native(module, "gradient", None, [c for _, c in types.values()], target)


class _Plain:
    """The default floating point environment, float32 lanes: what gradients and their operands need."""

    wide = False
    control = EXCEPTIONS_MASKED


def _places(shape: Shape) -> list[tuple[int, int]]:
    return [(row, vector) for row in range(shape.rows) for vector in range(shape.vectors)]


def _word(b: ir.IRBuilder, base: Any, step: Any, shape: Shape, place: int) -> Any:
    count = shape.rows * shape.vectors
    return b.gep(base, [b.add(b.mul(step, I64(count)), I64(place))])


def _keep(code: Code, flags: Any, pointer: Any) -> None:
    b = code.b
    word = b.bitcast(flags, ir.IntType(code.lanes))
    b.store(word if code.lanes == 16 else b.zext(word, I16), pointer)


def _regions(b: ir.IRBuilder, words: Any, K: Any, shape: Shape) -> tuple[Any, Any, Any]:
    """Where the words lie: of the steps, of the products, of the outer steps."""
    size = b.mul(K, I64(shape.rows * shape.vectors))
    own = b.gep(words, [size])
    return words, own, b.gep(own, [size])


def _forward(module: ir.Module, form: Form, shape: Shape, target: Target, overflow: bool) -> Any:
    """Keep an indicator of every step of one tile: it did not overflow, or it changed the sum."""
    scalar = ir.DoubleType() if form.wide else ir.FloatType()
    arguments = {"K": I64, "chunk": I64, "a": FLOATS, "a_stride": I64, "panel": scalar.as_pointer(), "words": WORDS}
    arguments |= {"floats": scalar.as_pointer(), "integers": (I64 if form.wide else I32).as_pointer()}
    arguments |= dict.fromkeys(("seed_base", "index", "index_row", "index_column"), I64)
    made, b, v = internal(module, "forward", arguments)
    code = Code(b, form.wide, shape.lanes, target)
    code.load_constants(v["floats"], v["integers"])
    places = _places(shape)
    passed, own, outer_words = _regions(b, v["words"], v["K"], shape)
    bases = [random_base(code, v, shape, *place) for place in places] if form.random else []
    zeros = [code.zero] * len(places)
    with loop(b, I64(0), v["K"], v["chunk"], [*zeros, I64(0)]) as chunks:
        *outer, number = chunks.values
        end = b.add(chunks.index, v["chunk"])
        stop = b.select(b.icmp_signed("<", end, v["K"]), end, v["K"])
        with loop(b, chunks.index, stop, 1, zeros) as terms:
            counter = b.trunc(b.mul(terms.index, I64(2)), I32)
            following = []
            for i, ((row, vector), s) in enumerate(zip(places, terms.values, strict=True)):
                x = b.load(b.gep(v["a"], [b.add(b.mul(I64(row), v["a_stride"]), terms.index)]))
                x = splat(b, b.fpext(x, scalar) if form.wide else x, shape.lanes)
                at = b.add(b.mul(terms.index, I64(shape.columns)), I64(vector * shape.lanes))
                w = b.load(b.bitcast(b.gep(v["panel"], [at]), code.vector.as_pointer()), align=4)
                step = form.term(code, x, w, s, draws(code, bases, i, counter))
                passes = form.inside(code, step.total, SUM) if overflow else b.fcmp_unordered("!=", step.result, s)
                _keep(code, passes, _word(b, passed, terms.index, shape, i))
                if overflow and step.product is not None:
                    _keep(code, form.inside(code, step.product, PRODUCT), _word(b, own, terms.index, shape, i))
                elif overflow:
                    b.store(I16(-1), _word(b, own, terms.index, shape, i))
                following.append(step.result)
            terms.carry(*following)
        counter = b.trunc(b.add(b.mul(v["K"], I64(2)), number), I32)
        added = []
        for i, (s, y) in enumerate(zip(terms.values, outer, strict=True)):
            step = form.add(code, s, y, draws(code, bases, i, counter))
            passes = form.inside(code, step.total, OUTER) if overflow else b.fcmp_unordered("!=", step.result, y)
            _keep(code, passes, _word(b, outer_words, number, shape, i))
            added.append(step.result)
        chunks.carry(*added, b.add(number, I64(1)))
    b.ret_void()
    return made


def _backward(module: ir.Module, shape: Shape, target: Target, overflow: bool, recursive: bool) -> Any:
    """Walk back over the steps of one tile: what still reaches the output adds to both gradients."""
    arguments = {"K": I64, "chunk": I64, "a": FLOATS, "panel": FLOATS, "words": WORDS, "g": FLOATS, "g_stride": I64}
    made, b, v = internal(module, "backward", {**arguments, "grad_a": FLOATS, "grad_b": FLOATS})
    code = Code(b, False, shape.lanes, target)
    places = _places(shape)
    passed, own, outer_words = _regions(b, v["words"], v["K"], shape)
    g = []
    for row, vector in places:
        at = b.add(b.mul(I64(row), v["g_stride"]), I64(vector * shape.lanes))
        g.append(_vector(code, b.gep(v["g"], [at])))
    all_live = [I16(-1)] * len(places)
    last = b.sdiv(b.sub(v["K"], I64(1)), v["chunk"])
    with loop(b, I64(0), b.add(last, I64(1)), 1, all_live) as chunks:
        number = b.sub(last, chunks.index)
        start = b.mul(number, v["chunk"])
        end = b.add(start, v["chunk"])
        stop = b.select(b.icmp_signed("<", end, v["K"]), end, v["K"])
        reach = [b.load(_word(b, outer_words, number, shape, i)) for i in range(len(places))]
        if recursive:
            reach = [b.and_(word, later) for word, later in zip(reach, chunks.values, strict=True)]
        with loop(b, I64(0), b.sub(stop, start), 1, reach) as terms:
            k = b.sub(b.sub(stop, I64(1)), terms.index)
            before = terms.values if recursive else reach
            live = [b.and_(b.load(_word(b, passed, k, shape, i)), w) for i, w in enumerate(before)]
            reaches = [b.and_(w, b.load(_word(b, own, k, shape, i))) for i, w in enumerate(live)] if overflow else live
            _spread(code, v, shape, k, [_selected(code, w, x) for w, x in zip(reaches, g, strict=True)])
            terms.carry(*(live if recursive else reach))
        chunks.carry(*reach)
    b.ret_void()
    return made


def _spread(code: Code, v: dict[str, Any], shape: Shape, k: Any, g: list[Any]) -> None:
    """Add a term's products: grad_b[k] += sum over rows of a g, grad_a[row, k] += sum over columns of b g."""
    b = code.b
    at = b.mul(k, I64(shape.columns))
    ws = [_vector(code, b.gep(v["panel"], [b.add(at, I64(n * shape.lanes))])) for n in range(shape.vectors)]
    targets = [b.gep(v["grad_b"], [b.add(at, I64(n * shape.lanes))]) for n in range(shape.vectors)]
    sums = [_vector(code, pointer) for pointer in targets]
    for row in range(shape.rows):
        spot = b.add(b.mul(I64(row), v["K"]), k)
        x = splat(b, b.load(b.gep(v["a"], [spot])), shape.lanes)
        mine = g[row * shape.vectors : (row + 1) * shape.vectors]
        sums = [_multiply_add(code, x, part, total) for part, total in zip(mine, sums, strict=True)]
        across = b.fmul(mine[0], ws[0])
        for part, w in zip(mine[1:], ws[1:], strict=True):
            across = _multiply_add(code, part, w, across)
        pointer = b.gep(v["grad_a"], [spot])
        b.store(b.fadd(b.load(pointer), _summed(code, across)), pointer)
    for total, pointer in zip(sums, targets, strict=True):
        b.store(total, b.bitcast(pointer, code.vector.as_pointer()), align=4)


def _vector(code: Code, pointer: Any) -> Any:
    return code.b.load(code.b.bitcast(pointer, code.vector.as_pointer()), align=4)


def _selected(code: Code, word: Any, x: Any) -> Any:
    b = code.b
    bits = word if code.lanes == 16 else b.trunc(word, ir.IntType(code.lanes))
    return b.select(b.bitcast(bits, ir.VectorType(ir.IntType(1), code.lanes)), x, code.zero)


def _multiply_add(code: Code, x: Any, y: Any, z: Any) -> Any:
    return code.fma(x, y, z) if code.target.fma else code.b.fadd(code.b.fmul(x, y), z)


def _summed(code: Code, x: Any) -> Any:
    """The lanes' sum, by halves."""
    b, lanes = code.b, code.lanes
    while lanes > 1:
        lanes //= 2
        undefined = ir.Constant(x.type, ir.Undefined)
        low = b.shuffle_vector(x, undefined, ir.Constant(ir.VectorType(I32, lanes), list(range(lanes))))
        high = b.shuffle_vector(x, undefined, ir.Constant(ir.VectorType(I32, lanes), list(range(lanes, 2 * lanes))))
        x = b.fadd(low, high)
    return b.extract_element(x, I32(0))
