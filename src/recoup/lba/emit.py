"""The narrow accumulator's matrix product as LLVM vector IR: packing, loops, one tile of sums in registers.

What a step computes is written by the forms (`emit_narrow`, `emit_wide`); everything here is common to them. The sums
of a tile of ``rows`` by ``vectors`` x ``lanes`` outputs stay in registers while k runs, in the same order for every
tiling, so results depend on nothing but the operands.

Legend: M rows, N columns, K terms; a tile covers ``rows`` rows and one panel, ``vectors * lanes`` columns.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from llvmlite import ir

from recoup.kernels.llvm import Native, Target, fma, loop, splat

I1, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
VOID = ir.VoidType()
CONSTANTS = 32  # floats and integers a form may take


@dataclass(frozen=True, slots=True)
class Shape:
    """How a kernel uses the registers."""

    lanes: int
    rows: int
    vectors: int

    @property
    def columns(self) -> int:
        """Columns of a panel."""
        return self.lanes * self.vectors


class Form(Protocol):
    """One way to compute a step; frozen and hashable, so that kernels are built once."""

    @property
    def wide(self) -> bool:
        """Float64 lanes, operands at their own scale; else float32 lanes."""
        ...

    @property
    def control(self) -> int:
        """The floating point control word (MXCSR) it needs."""
        ...

    @property
    def random(self) -> bool:
        """Whether steps draw random bits."""
        ...

    def term(self, code: "Code", x: Any, w: Any, s: Any, draw: Any) -> "Step":
        """One more term."""
        ...

    def add(self, code: "Code", s: Any, y: Any, draw: Any) -> "Step":
        """A chunk's sum joins the outer sum."""
        ...

    def inside(self, code: "Code", value: Any, place: int) -> Any:
        """Lanes where a product, sum or outer sum (`PRODUCT`, `SUM`, `OUTER`) has not left its format's range."""
        ...


PRODUCT, SUM, OUTER = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Step:
    """What a step made: the new sum, and product and sum as they were before their limits (None: there is none)."""

    result: Any
    product: Any
    total: Any


class Code:
    """Vector arithmetic being written: element type, lanes, the form's constants."""

    def __init__(self, builder: ir.IRBuilder, wide: bool, lanes: int, target: Target) -> None:
        self.b, self.lanes, self.wide, self.target = builder, lanes, wide, target
        self.scalar = ir.DoubleType() if wide else ir.FloatType()
        self.integer = I64 if wide else I32
        self.vector = ir.VectorType(self.scalar, lanes)
        self.integers = ir.VectorType(self.integer, lanes)
        self.float_constants: list[Any] = []
        self.integer_constants: list[Any] = []
        self.zero = ir.Constant(self.vector, None)

    def load_constants(self, floats: Any, integers: Any) -> None:
        """Broadcast every constant; LLVM drops those a form does not use."""
        for i in range(CONSTANTS):
            for pointer, kept in ((floats, self.float_constants), (integers, self.integer_constants)):
                kept.append(splat(self.b, self.b.load(self.b.gep(pointer, [I64(i)])), self.lanes))

    def constant(self, value: float) -> Any:
        return ir.Constant(self.vector, [self.scalar(value)] * self.lanes)

    def bits_constant(self, value: int) -> Any:
        return ir.Constant(self.integers, [self.integer(value)] * self.lanes)

    def bits(self, x: Any) -> Any:
        return self.b.bitcast(x, self.integers)

    def floats(self, x: Any) -> Any:
        return self.b.bitcast(x, self.vector)

    def masked(self, x: Any, mask: Any) -> Any:
        """The bits of x that mask has."""
        return self.floats(self.b.and_(self.bits(x), mask))

    def magnitude(self, x: Any) -> Any:
        """|x| as bits: comparing them as integers compares magnitudes."""
        return self.b.and_(self.bits(x), self.bits_constant((1 << (63 if self.wide else 31)) - 1))

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return fma(self.b, x, y, z)

    def limit(self, x: Any, top: Any) -> Any:
        """x with its magnitude limited to top."""
        if not self.wide and self.lanes == 16 and "avx512dq" in self.target.features:
            types = [self.vector, self.vector, I32, self.vector, I16, I32]
            name = "llvm.x86.avx512.mask.range.ps.512"
            ranged = self.b.module.globals.get(name) or ir.Function(
                self.b.module, ir.FunctionType(self.vector, types), name
            )
            smaller_magnitude, mode = I32(2), I32(4)
            return self.b.call(ranged, [x, top, smaller_magnitude, x, I16(-1), mode])
        return self.maximum(self.minimum(x, top), self.b.fneg(top))

    def minimum(self, x: Any, y: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered("<", x, y), x, y)

    def maximum(self, x: Any, y: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)


@dataclass(frozen=True, slots=True)
class Arguments:
    """Names and types of a kernel's arguments, in order."""

    @staticmethod
    def types(wide: bool) -> dict[str, tuple[Any, Any]]:
        """name -> (LLVM type, ctypes type)."""
        scalar = ir.DoubleType() if wide else ir.FloatType()
        integer = I64 if wide else I32
        size, address = (I64, ctypes.c_int64), ctypes.c_void_p
        return {
            "first": size,
            "last": size,
            "tiles": size,
            "K": size,
            "chunk": size,
            "a": (ir.FloatType().as_pointer(), address),
            "a_stride": size,
            "b": (ir.FloatType().as_pointer(), address),
            "b_terms": (I64.as_pointer(), address),
            "b_columns": (I64.as_pointer(), address),
            "b_straight": (ir.IntType(8).as_pointer(), address),
            "b_scale": (ir.FloatType(), ctypes.c_float),
            "b_least": (I32, ctypes.c_int32),
            "c": (scalar.as_pointer(), address),
            "c_stride": size,
            "floats": (scalar.as_pointer(), address),
            "integers": (integer.as_pointer(), address),
            "panel": (scalar.as_pointer(), address),
            "seed_base": size,
            "index": size,
            "index_row": size,
            "index_column": size,
        }


@cache
def build(form: Form, shape: Shape, target: Target) -> Native:
    """Compile a form's kernel: columns panels ``first .. last`` of C = A B, all row tiles.

    ``a`` float32 [tiles * rows, K], row stride ``a_stride``; element (k, n) of B is ``b[b_terms[k] + b_columns[n]]``,
    where ``b_straight`` says, per vector of columns, that these lie side by side, and is taken times ``b_scale``, or as
    zero where its magnitude's bits are below ``b_least``; ``c`` [tiles * rows, panels * columns]. ``panel`` is scratch
    for K * columns elements.
    """
    types = Arguments.types(form.wide)
    module = ir.Module("lba")
    tile = _tile(module, form, shape, target)
    pack = packing(module, form, shape)
    made = ir.Function(module, ir.FunctionType(VOID, [llvm for llvm, _ in types.values()]), "panels")
    b = ir.IRBuilder(made.append_basic_block("entry"))
    v = dict(zip(types, made.args, strict=True))
    saved = enter(b, form.control, target)
    with loop(b, v["first"], v["last"]) as panels:
        column = b.mul(panels.index, I64(shape.columns))
        b.call(
            pack, [v["K"], v["b"], v["b_terms"], *spots(b, v, column, shape), v["b_scale"], v["b_least"], v["panel"]]
        )
        with loop(b, I64(0), v["tiles"]) as tiles:
            row = b.mul(tiles.index, I64(shape.rows))
            a = b.gep(v["a"], [b.mul(row, v["a_stride"])])
            c = b.gep(v["c"], [b.add(b.mul(row, v["c_stride"]), column)])
            spot = b.add(b.mul(row, v["index_row"]), b.mul(column, v["index_column"]))
            index = b.add(v["index"], spot)
            rest = [v[n] for n in ("floats", "integers", "panel", "seed_base")]
            b.call(
                tile,
                [
                    v["K"],
                    v["chunk"],
                    a,
                    v["a_stride"],
                    c,
                    v["c_stride"],
                    *rest,
                    index,
                    v["index_row"],
                    v["index_column"],
                ],
            )
    leave(b, saved, target)
    b.ret_void()
    return Native(module, "panels", None, [c for _, c in types.values()], target)


def spots(b: ir.IRBuilder, v: dict[str, Any], column: Any, shape: Shape) -> list[Any]:
    vector = b.udiv(column, I64(shape.lanes))
    return [b.gep(v["b_columns"], [column]), b.gep(v["b_straight"], [vector])]


def enter(b: ir.IRBuilder, control: int, target: Target) -> Any:
    """Set the whole control word; the caller's is kept."""
    word = b.alloca(I32, 2)
    if _is_x86(target):
        pointer = b.bitcast(word, ir.IntType(8).as_pointer())
        b.call(_control(b, "st"), [pointer])
        mine = b.gep(word, [I64(1)])
        b.store(I32(control), mine)
        b.call(_control(b, "ld"), [b.bitcast(mine, ir.IntType(8).as_pointer())])
    else:
        b.store(b.call(_rounding(b, "get"), []), word)
        b.call(_rounding(b, "set"), [I32(0 if control & TOWARD_ZERO else 1)])
    return word


def leave(b: ir.IRBuilder, saved: Any, target: Target) -> None:
    if _is_x86(target):
        b.call(_control(b, "ld"), [b.bitcast(saved, ir.IntType(8).as_pointer())])
    else:
        b.call(_rounding(b, "set"), [b.load(saved)])


EXCEPTIONS_MASKED, TOWARD_ZERO, FLUSH_RESULTS, FLUSH = 0x1F80, 0x6000, 0x8000, 0x8040  # of MXCSR; FLUSH: operands too


def _is_x86(target: Target) -> bool:
    return target.machine in ("x86_64", "i686")


def _control(b: ir.IRBuilder, which: str) -> Any:
    return _declared(b, f"llvm.x86.sse.{which}mxcsr", VOID, [ir.IntType(8).as_pointer()])


def _rounding(b: ir.IRBuilder, which: str) -> Any:
    return _declared(b, f"llvm.{which}.rounding", I32 if which == "get" else VOID, [] if which == "get" else [I32])


def _declared(b: ir.IRBuilder, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    return b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(result, list(arguments)), name)


def internal(module: ir.Module, name: str, arguments: dict[str, Any]) -> tuple[Any, ir.IRBuilder, dict[str, Any]]:
    """A function of its own that is not inlined, so that no arithmetic moves across a change of the control word."""
    made = ir.Function(module, ir.FunctionType(VOID, list(arguments.values())), name)
    made.linkage = "internal"
    made.attributes.add("noinline")
    return made, ir.IRBuilder(made.append_basic_block("entry")), dict(zip(arguments, made.args, strict=True))


def packing(module: ir.Module, form: Any, shape: Shape, name: str = "pack") -> Any:
    """Columns of B side by side: panel[k][column], in the kernel's element type."""
    scalar = ir.DoubleType() if form.wide else ir.FloatType()
    source = ir.FloatType().as_pointer()
    made, b, v = internal(
        module,
        name,
        {
            "K": I64,
            "b": source,
            "terms": I64.as_pointer(),
            "columns": I64.as_pointer(),
            "straight": ir.IntType(8).as_pointer(),
            "scale": ir.FloatType(),
            "least": I32,
            "panel": scalar.as_pointer(),
        },
    )
    packed = ir.VectorType(ir.FloatType(), shape.lanes)
    scale, least = splat(b, v["scale"], shape.lanes), splat(b, v["least"], shape.lanes)

    def scaled(x: Any) -> Any:
        size = b.and_(b.bitcast(x, least.type), ir.Constant(least.type, [I32(0x7FFFFFFF)] * shape.lanes))
        return b.fmul(b.select(b.icmp_signed(">=", size, least), x, ir.Constant(packed, None)), scale)

    offsets = ir.VectorType(I64, shape.lanes)
    for vector in range(shape.vectors):
        place = b.gep(v["columns"], [I64(vector * shape.lanes)])
        offset = b.load(b.bitcast(place, offsets.as_pointer()), align=8)
        offset_first = b.load(place)
        straight = b.icmp_unsigned("!=", b.load(b.gep(v["straight"], [I64(vector)])), ir.IntType(8)(0))
        with b.if_else(straight) as (then, otherwise):
            for block, gathered in ((then, False), (otherwise, True)):
                with block, loop(b, I64(0), v["K"]) as terms:
                    term = b.load(b.gep(v["terms"], [terms.index]))
                    if gathered:
                        value: Any = ir.Constant(packed, ir.Undefined)
                        for lane in range(shape.lanes):
                            at = b.add(term, b.extract_element(offset, I32(lane)))
                            value = b.insert_element(value, b.load(b.gep(v["b"], [at])), I32(lane))
                    else:
                        near = b.gep(v["b"], [b.add(term, offset_first)])
                        value = b.load(b.bitcast(near, packed.as_pointer()), align=4)
                    value = b.fpext(value, ir.VectorType(scalar, shape.lanes)) if form.wide else scaled(value)
                    to = b.add(b.mul(terms.index, I64(shape.columns)), I64(vector * shape.lanes))
                    b.store(value, b.bitcast(b.gep(v["panel"], [to]), value.type.as_pointer()), align=4)
    b.ret_void()
    return made


def _tile(module: ir.Module, form: Form, shape: Shape, target: Target) -> Any:
    """All sums of one tile."""
    scalar = ir.DoubleType() if form.wide else ir.FloatType()
    integer = I64 if form.wide else I32
    made, b, v = internal(
        module,
        "tile",
        {
            "K": I64,
            "chunk": I64,
            "a": ir.FloatType().as_pointer(),
            "a_stride": I64,
            "c": scalar.as_pointer(),
            "c_stride": I64,
            "floats": scalar.as_pointer(),
            "integers": integer.as_pointer(),
            "panel": scalar.as_pointer(),
            "seed_base": I64,
            "index": I64,
            "index_row": I64,
            "index_column": I64,
        },
    )
    code = Code(b, form.wide, shape.lanes, target)
    code.load_constants(v["floats"], v["integers"])
    places = [(row, vector) for row in range(shape.rows) for vector in range(shape.vectors)]
    rows = [b.gep(v["a"], [b.mul(I64(row), v["a_stride"])]) for row in range(shape.rows)]
    bases = [random_base(code, v, shape, *place) for place in places] if form.random else []
    zeros = [code.zero] * len(places)
    with loop(b, I64(0), v["K"], v["chunk"], [*zeros, I64(0)]) as chunks:
        *outer, number = chunks.values
        end = b.add(chunks.index, v["chunk"])
        stop = b.select(b.icmp_signed("<", end, v["K"]), end, v["K"])
        with loop(b, chunks.index, stop, 1, zeros) as terms:
            at = b.gep(v["panel"], [b.mul(terms.index, I64(shape.columns))])
            ws = []
            for vector in range(shape.vectors):
                near = b.bitcast(b.gep(at, [I64(vector * shape.lanes)]), code.vector.as_pointer())
                ws.append(b.load(near, align=4))
            xs = []
            for row in rows:
                x = b.load(b.gep(row, [terms.index]))
                xs.append(splat(b, b.fpext(x, scalar) if form.wide else x, shape.lanes))
            counter = b.trunc(b.mul(terms.index, I64(2)), I32)
            sums = [
                form.term(code, xs[row], ws[vector], s, draws(code, bases, i, counter)).result
                for i, ((row, vector), s) in enumerate(zip(places, terms.values, strict=True))
            ]
            terms.carry(*sums)
        counter = b.trunc(b.add(b.mul(v["K"], I64(2)), number), I32)
        added = [
            form.add(code, s, y, draws(code, bases, i, counter)).result
            for i, (s, y) in enumerate(zip(terms.values, outer, strict=True))
        ]
        chunks.carry(*added, b.add(number, I64(1)))
    for (row, vector), y in zip(places, chunks.values[:-1], strict=True):
        at = b.add(b.mul(I64(row), v["c_stride"]), I64(vector * shape.lanes))
        b.store(y, b.bitcast(b.gep(v["c"], [at]), code.vector.as_pointer()), align=4)
    b.ret_void()
    return made


def random_base(code: Code, v: dict[str, Any], shape: Shape, row: int, vector: int) -> Any:
    """`reference.random_base` of the outputs at one place of the tile, as 32-bit lanes."""
    b, wide = code.b, ir.VectorType(I64, code.lanes)
    start = b.add(v["index"], b.mul(I64(row), v["index_row"]))
    lanes = ir.Constant(wide, [I64(vector * shape.lanes + lane) for lane in range(code.lanes)])
    index = b.add(splat(b, start, code.lanes), b.mul(lanes, splat(b, v["index_column"], code.lanes)))
    narrow = ir.VectorType(I32, code.lanes)
    high = b.trunc(b.lshr(index, ir.Constant(wide, [I64(32)] * code.lanes)), narrow)
    seed = splat(b, b.trunc(v["seed_base"], I32), code.lanes)
    return _mix(b, b.xor(b.trunc(index, narrow), _mix(b, b.xor(high, seed))))


def draws(code: Code, bases: list[Any], place: int, counter: Any) -> Any:
    """A function that gives 24 random bits per lane for the counter's rounding or, with 1, the next; None if unused."""
    if not bases:
        return None

    def draw(offset: int) -> Any:
        b = code.b
        spread = b.mul(b.add(counter, I32(offset)), I32(0x9E3779B9))
        mixed = _mix(b, b.add(bases[place], splat(b, spread, code.lanes)))
        return b.lshr(mixed, ir.Constant(mixed.type, [I32(8)] * code.lanes))

    return draw


def _mix(b: ir.IRBuilder, x: Any) -> Any:
    """`reference.mix` on 32-bit lanes."""

    def constant(value: int) -> Any:
        return ir.Constant(x.type, [I32(value)] * x.type.count)

    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = b.mul(b.xor(x, b.lshr(x, constant(shift))), constant(factor))
    return b.xor(x, b.lshr(x, constant(16)))
