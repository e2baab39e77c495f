"""The fused multiply-add unit with a narrow accumulator (FMAq) in gates, generated from the config that is emulated.

A float accumulator that equals the emulation has one bit more than its format's: `Float.lba` has no code for zero, so a
flag tells it. The paper's 12 bits, M7E4, are 13 (`recoup.formats.FloatFields`).

Legend: x, w operands; p the product; s the sum of a chunk; y the sum of the chunks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.fields import choice
from recoup.formats import Float, FloatFields, Int, code_bits, decode, encode
from recoup.gates import arithmetic
from recoup.gates.module import Expected, Inputs, Module, Port, amaranth
from recoup.lba.config import LBA
from recoup.lba.reference import exact_sum, quantize

__all__ = ["adder", "build", "multiplier"]

hdl = amaranth("hdl")

Outer = Literal["shared", "own"]
Operand = Float | Int
RUN = (5, 1, 4, 6)  # terms of the chunks of a run for verification
UNUSED = "; not looked at in a cycle of the outer addition"


def build(
    config: LBA,
    *,
    operands: Operand | tuple[Operand, Operand] | None = None,
    outer: Outer | None = None,
) -> Module:
    """A multiply-accumulate unit that equals `recoup.lba.matmul`, one term a cycle.

        s <= Q_acc(Q_prod(x w) + (0 if first else s)),   y <= Q_outer(s + (0 if start else y))  after every chunk

    Operands are codes of ``operands`` as `recoup.formats.encode` gives them, without NaN and infinities. A factor that
    a layer's operand quantiser takes out of a tensor is a power of two of its product's exponent; it is not built in.

    Args:
        config: the unit. Its chunk length is the schedule's business: the gates do not count.
        operands: the format of x and w, or of each; by default ``config.operands``.
        outer: how chunk sums are added up: by the same adder in a cycle of its own (``shared``), or by a second one
            (``own``) while the next chunk begins. By default shared, and own where ``promotion`` is another format.

    Raises:
        RecoupError: a config that no hardware can have: stochastic rounding (its random bits are a hash of output and
            step), ``underflow=False`` (an exponent without bound), no format for the operands; or ``shared`` for a
            promotion format, whose adder is another one.
    """
    unit = Unit.of(config, operands, outer)
    ports = [*unit.operand_ports(), Port("first", "in", 1, "the chunk's sum starts from zero with this product")]
    if unit.outer == "shared":
        ports[-1] = Port("first", "in", 1, "the sum starts from zero: the chunk's, or in an outer cycle the output's")
    if unit.outer is not None:
        ports.append(Port("outer", "in", 1, "the chunk's sum is added to the output"))
    if unit.outer == "own":
        ports.append(Port("start", "in", 1, "with outer: the output starts from zero"))
    ports.append(_port("y", "out", unit.result, f"the sum, {_told(unit.result)}"))
    return Module(
        name="fmaq",
        title=_title(config, unit),
        ports=tuple(ports),
        elaborate=unit.elaborate,
        expected=unit.expected,
        latency=1,
        steps=len(unit.schedule()["first"]) + 1,
        control=unit.control,
        protocol=unit.protocol(),
        baselines=lambda: _baselines(unit),
        facts={
            "accumulator": _told(config.accumulator),
            "accumulator bits": code_bits(config.accumulator),
            "operands": " x ".join(_told(form) for form in (unit.x, unit.w)),
            "outer adder": unit.outer or "none",
        },
    )


def _checked(config: LBA, operands: Any) -> tuple[Operand, Operand]:
    """The operands' formats; an error for what no hardware can have."""
    for name in ("product", "accumulator", "promotion"):
        form = getattr(config, name)
        if isinstance(form, Float) and form.rounding == "stochastic":
            raise RecoupError(
                f"silicon: {config!r}: {name} rounds stochastically, from random bits that are a hash of output and "
                "step, which no unit has; use rounding='zero' or 'nearest'"
            )
    if not config.underflow:
        raise RecoupError(
            f"silicon: {config!r}: underflow=False leaves the exponent without bound, which is a stage of training and "
            "no hardware; use underflow=True"
        )
    given = config.operands if operands is None else operands
    if given is None:
        raise RecoupError(
            f"silicon: {config!r}: operands=None are float32, whose multiplier nobody means by a narrow accumulator; "
            "say what x and w are: operands=Float.lba(3, 4, bias=3), or an Int"
        )
    pair = given if isinstance(given, tuple) else (given, given)
    if len(pair) != 2 or not all(isinstance(form, Float | Int) for form in pair):
        raise RecoupError(f"silicon: operands={given!r}: operands must be a Float or an Int, or a pair of them")
    for form in pair:
        if isinstance(form, Float) and form.mantissa > 23:
            raise RecoupError(f"silicon: operands={form!r}: operands have at most 23 bits of mantissa, as float32 has")
        if isinstance(form, Int) and form.bits > 24:
            raise RecoupError(f"silicon: operands={form!r}: integer operands have at most 24 bits")
    return pair[0], pair[1]


@dataclass(frozen=True, slots=True)
class Unit:
    """The unit of a config with its operands.

    Attributes:
        config: the config.
        x, w: formats of the operands.
        outer: how chunk sums are added up; None: there is one chunk.
    """

    config: LBA
    x: Operand
    w: Operand
    outer: Outer | None

    @classmethod
    def of(cls, config: LBA, operands: Any, outer: Any) -> "Unit":
        """The unit; errors as in `build`."""
        x, w = _checked(config, operands)
        if outer is not None:
            choice("silicon", "outer", outer, get_args(Outer))
        promoted = config.outer != config.accumulator
        if outer == "shared" and promoted:
            raise RecoupError(
                f"silicon: {config!r}: outer='shared' adds chunk sums up with the accumulator's own adder, but "
                "promotion is another format; use outer='own'"
            )
        if config.chunk is None and not promoted:
            return cls(config, x, w, None)
        return cls(config, x, w, outer or ("own" if promoted else "shared"))

    @property
    def result(self) -> Float | Int:
        """The format of y."""
        return self.config.accumulator if self.outer is None else self.config.outer

    def operand_ports(self) -> list[Port]:
        """The ports of x and w."""
        note = UNUSED if self.outer == "shared" else ""
        return [
            _port(name, "in", form, f"{what}, {_told(form)}{note}")
            for name, what, form in (("x", "activation", self.x), ("w", "weight", self.w))
        ]

    # What it is made of --------------------------------------------------------------------------------------------

    def elaborate(self, m: Any, port: Any) -> None:
        """Gates and registers."""
        config, inner = self.config, self.config.accumulator
        p = _product(m, port.x, port.w, self.x, self.w, config)
        s = hdl.Signal(code_bits(inner), name="accumulator", reset_less=True)
        kept = s & ~port.first.replicate(len(s))
        if self.outer is None:
            m.d.sync += s.eq(_sum(m, p, _unpacked(m, kept, inner, config, "sum"), inner, config, "add"))
            m.d.comb += port.y.eq(s)
            return
        y = hdl.Signal(code_bits(config.outer), name="output", reset_less=True)
        m.d.comb += port.y.eq(y)
        if self.outer == "own":
            before = _unpacked(m, y & ~port.start.replicate(len(y)), config.outer, config, "output")
            total = _sum(m, _unpacked(m, s, inner, config, "chunk"), before, config.outer, config, "outer")
            with m.If(port.outer):
                m.d.sync += y.eq(total)
            m.d.sync += s.eq(_sum(m, p, _unpacked(m, kept, inner, config, "sum"), inner, config, "add"))
            return
        base = hdl.Mux(port.outer, y, s) & ~port.first.replicate(len(s))
        base = arithmetic.named(m, "base", base)
        chunk = _unpacked(m, s, inner, config, "chunk")
        term = _either(m, port.outer, chunk, p, "term")
        total = _sum(m, term, _unpacked(m, base, inner, config, "sum"), inner, config, "add")
        with m.If(port.outer):
            m.d.sync += y.eq(total)
        with m.Else():
            m.d.sync += s.eq(total)

    # What it computes ----------------------------------------------------------------------------------------------

    def expected(self, inputs: Inputs) -> Mapping[str, Expected]:
        """The steps of `recoup.lba.reference` for every lane."""
        config = self.config
        x, w = (_values(inputs[name], form) for name, form in (("x", self.x), ("w", self.w)))
        steps, lanes = x.shape
        control = {name: np.asarray(inputs[name]).reshape(steps, -1) != 0 for name in self.schedule()}
        s = y = torch.full((lanes,), torch.nan, dtype=torch.float64)
        at, rows, zero = [], [], torch.zeros(lanes, dtype=torch.float64)
        for step in range(steps):
            shown = s if self.outer is None else y
            if not bool(shown.isnan().any()):
                at.append(step)
                rows.append(_codes(shown, self.result, config))
            first, outer, start = (_lanes(control.get(name), step, lanes) for name in ("first", "outer", "start"))
            if self.outer == "shared":
                start = first
            before = s
            if not (self.outer == "shared" and bool(outer.all())):
                p = x[step] * w[step]
                p = p if config.product is None else quantize(p, config.product, config, zero)
                s = quantize(exact_sum(p, torch.where(first, zero, s)), config.accumulator, config, zero)
                s = torch.where(outer, before, s) if self.outer == "shared" else s
            if self.outer is not None and bool(outer.any()):
                total = quantize(exact_sum(before, torch.where(start, zero, y)), config.outer, config, zero)
                y = torch.where(outer, total, y)
        return {"y": Expected(at, np.stack(rows) if rows else np.empty((0, lanes), np.uint64))}

    def schedule(self) -> dict[str, list[int]]:
        """The control of a run for verification: chunks of several lengths, an output of several chunks, another."""
        if self.outer is None:
            return {"first": [int(not i) for terms in (sum(RUN), RUN[0]) for i in range(terms)]}
        first, outer, start = [], [], []
        for number, terms in enumerate((*RUN, RUN[0])):
            new = number in (0, len(RUN))
            if self.outer == "shared":
                first += [1] + [0] * (terms - 1) + [int(new)]
                outer += [0] * terms + [1]
            else:
                first += [1] + [0] * (terms - 1)
                outer += [0] * (terms - 1) + [0]
                start += [0] * terms
        if self.outer == "shared":
            return {"first": first, "outer": outer}
        ends = np.cumsum((*RUN, RUN[0])).tolist()  # the step after a chunk's last term
        outer = [int(step in ends) for step in range(ends[-1] + 1)]
        start = [int(step in (ends[0], ends[len(RUN)])) for step in range(ends[-1] + 1)]
        return {"first": [*first, 1], "outer": outer, "start": start}

    def control(self, steps: int) -> Inputs:
        """The schedule, as long as a run; zeros follow."""
        return {
            name: np.array((values + [0] * steps)[:steps], np.uint64) for name, values in self.schedule().items()
        }

    def protocol(self) -> dict[str, Any]:
        """For the JSON beside the Verilog."""
        chunk = self.config.chunk
        if self.outer is None:
            return {
                "order": "one term a cycle, in increasing k",
                "first": "1 with the first term of a sum",
                "result": "y shows the sum one clock edge after its last term",
            }
        shared = self.outer == "shared"
        outer = "after a chunk's last term one cycle with outer = 1, whose operands are not looked at"
        own = "outer = 1 in the cycle after a chunk's last term, in which the next chunk may begin"
        return {
            "order": f"one term a cycle, in increasing k, in chunks of {chunk or 'all'} terms; the last may be shorter",
            "first": "1 with a chunk's first term" + ("; in an outer cycle, 1 for an output's first chunk" * shared),
            "outer": outer if shared else own,
            **({} if shared else {"start": "with outer, 1 for an output's first chunk"}),
            "result": "y shows the output one clock edge after the outer cycle of its last chunk",
        }


def multiplier(x: Operand, w: Operand, product: Float) -> Module:
    """Q_prod(x w) alone, without registers: what one product of the unit is."""
    unit = LBA(product=product, accumulator=product, chunk=None)

    def elaborate(m: Any, port: Any) -> None:
        found = _product(m, port.x, port.w, x, w, unit)
        m.d.comb += port.p.eq(arithmetic.pack(found, _layout(product)))

    def expected(inputs: Inputs) -> Mapping[str, Expected]:
        exact = _values(inputs["x"], x) * _values(inputs["w"], w)
        return _combinational("p", quantize(exact, product, unit, torch.zeros_like(exact)), product, unit)

    ports = (_port("x", "in", x, _told(x)), _port("w", "in", w, _told(w)), _port("p", "out", product, _told(product)))
    return Module(
        name="product", title=f"product, {_told(product)}", ports=ports, elaborate=elaborate, expected=expected,
        clocked=False,
    )  # fmt: skip


def adder(a: Float, b: Float, total: Float) -> Module:
    """Q(a + b) alone, without registers: what one addition of the unit is."""
    unit = LBA(product=a, accumulator=total, chunk=None)

    def elaborate(m: Any, port: Any) -> None:
        numbers = (_unpacked(m, code, form, unit, name) for code, form, name in ((port.a, a, "a"), (port.b, b, "b")))
        m.d.comb += port.s.eq(_sum(m, *numbers, total, unit, "add"))

    def expected(inputs: Inputs) -> Mapping[str, Expected]:
        exact = exact_sum(_values(inputs["a"], a), _values(inputs["b"], b))
        return _combinational("s", quantize(exact, total, unit, torch.zeros_like(exact)), total, unit)

    ports = (_port("a", "in", a, _told(a)), _port("b", "in", b, _told(b)), _port("s", "out", total, _told(total)))
    return Module(
        name="adder", title=f"adder, {_told(total)}", ports=ports, elaborate=elaborate, expected=expected, clocked=False
    )


# Gates ---------------------------------------------------------------------------------------------------------------


def _layout(form: Float) -> arithmetic.Layout:
    return arithmetic.Layout.of(FloatFields(form))


def _operand(m: Any, code: Any, form: Operand, name: str) -> arithmetic.Number:
    if isinstance(form, Int):
        return arithmetic.unpack_integer(m, code, form.signed, name)
    return arithmetic.unpack(m, code, _layout(form), name)


def _product(m: Any, x: Any, w: Any, x_form: Operand, w_form: Operand, config: LBA) -> arithmetic.Number:
    """Q_prod(x w), or the exact product, with its leading bit on top where a float adder takes it."""
    p = arithmetic.multiply(m, _operand(m, x, x_form, "x"), _operand(m, w, w_form, "w"), "product")
    if config.product is not None:
        return arithmetic.quantise(m, p, _layout(config.product), "rounded")
    return p if isinstance(config.accumulator, Int) else arithmetic.normalised(m, p, "exact")


def _unpacked(m: Any, code: Any, form: Float | Int, config: LBA, name: str) -> Any:
    """A register's content: a `Number`, or of an `Int` its code."""
    del config
    return code if isinstance(form, Int) else arithmetic.unpack(m, code, _layout(form), name)


def _sum(m: Any, term: Any, before: Any, form: Float | Int, config: LBA, name: str) -> Any:
    """The code of Q(term + before)."""
    if isinstance(form, Int):
        unit = round(log2(config.scale))
        if not isinstance(term, arithmetic.Number):  # a chunk's sum
            term = _of_integer(m, term, unit, name)
        return arithmetic.add_integer(m, term, before, unit, form.overflow == "wrap", name)
    layout = _layout(form)
    if not isinstance(term, arithmetic.Number):
        term = _of_integer(m, term, round(log2(config.scale)), name)
    pair = [
        arithmetic.normalised(m, n, f"{name}_{i}") if n.leading and n.base > layout.low else n
        for i, n in enumerate((term, before))
    ]
    total = arithmetic.add(m, *pair, layout.fraction + 1, layout.nearest, name)
    return arithmetic.pack(arithmetic.quantise(m, total, layout, f"{name}_total"), layout)


def _of_integer(m: Any, code: Any, unit: int, name: str) -> arithmetic.Number:
    """A fixed-point sum as a number."""
    n = arithmetic.unpack_integer(m, code, True, f"{name}_chunk")
    return arithmetic.Number(n.sign, n.exponent, n.significand, unit, 0, n.leading)


def _either(m: Any, chosen: Any, one: Any, other: arithmetic.Number, name: str) -> arithmetic.Number:
    """One of two numbers: a chunk's sum, or a product."""
    if not isinstance(one, arithmetic.Number):
        unit = min(other.low, 0)
        one = _of_integer(m, one, unit, name)
    return arithmetic.either(m, chosen, one, other, name)


# Words and values ----------------------------------------------------------------------------------------------------


def _port(name: str, direction: Any, form: Operand, meaning: str) -> Port:
    """A port of codes of a format, with patterns on both sides of its thresholds."""
    bits = code_bits(form)
    if isinstance(form, Int):
        return Port(name, direction, bits, meaning, signed=form.signed)
    fields = FloatFields(form)
    one = fields.largest - fields.top_rank if fields.flag is None else 1 << fields.flag
    smallest, sign = (one if fields.flag is not None else 1 << fields.fraction), 1 << fields.sign
    low = {smallest, smallest + 1, fields.largest, fields.largest - 1} | ({1} if form.subnormals else set())
    edges = tuple(sorted({0} | low | {code | sign for code in low}))

    def legal(codes: np.ndarray) -> np.ndarray:
        return _legal(codes, fields)

    return Port(name, direction, bits, meaning, edges=edges, legal=legal, narrow=max(bits // 2, 1))


def _legal(codes: np.ndarray, fields: FloatFields) -> np.ndarray:
    """A code of a finite value of any pattern: zeros are +0, and what is above the largest value becomes zero."""
    codes = np.asarray(codes, np.uint64)
    magnitude = codes & np.uint64(fields.ones)
    sign = codes & np.uint64(1 << fields.sign)
    rank = magnitude.astype(np.int64)
    if fields.flag is not None:
        present = codes >> np.uint64(fields.flag) & np.uint64(1) != 0
        flag = np.uint64(1 << fields.flag)
        good = present & (rank + (1 << fields.fraction) <= fields.top_rank)
        return np.where(good, magnitude | sign | flag, np.uint64(0))
    smallest = 1 if fields.format.subnormals else 1 << fields.fraction
    return np.where((rank >= smallest) & (rank <= fields.top_rank), magnitude | sign, np.uint64(0))


def _values(codes: np.ndarray, form: Operand) -> Tensor:
    """float64 values of patterns."""
    return decode(torch.from_numpy(np.ascontiguousarray(codes).astype(np.int64)), form)


def _codes(values: Tensor, form: Float | Int, config: LBA) -> np.ndarray:
    """Patterns of values; zeros have no sign."""
    if isinstance(form, Int):
        values = values / config.scale
    return encode(values + 0.0, form).numpy().astype(np.uint64)


def _combinational(name: str, values: Tensor, form: Float, config: LBA) -> Mapping[str, Expected]:
    codes = _codes(values.flatten(), form, config).reshape(values.shape)
    return {name: Expected(range(len(codes)), codes)}


def _lanes(control: np.ndarray | None, step: int, lanes: int) -> Tensor:
    """A control port's bits in one step, per lane."""
    if control is None:
        return torch.zeros(lanes, dtype=torch.bool)
    return torch.from_numpy(np.broadcast_to(control[step], (lanes,)).copy())


def _told(form: Float | Int) -> str:
    """A format in words, with the flag where it has one."""
    if isinstance(form, Int):
        return f"{'int' if form.signed else 'uint'}{form.bits}"
    fields = FloatFields(form)
    flag = " with its non-zero flag" if fields.flag is not None else ""
    return f"M{fields.fraction}E{fields.exponent}, {fields.bits} bits{flag}"


def _title(config: LBA, unit: Unit) -> str:
    total = config.accumulator
    parts = [_told(total)]
    parts += ["wraps" if total.overflow == "wrap" else "saturates"] if isinstance(total, Int) else []
    parts += ["nearest"] if isinstance(total, Float) and total.rounding == "nearest" else []
    parts += ["fused"] if config.product is None else []
    if unit.outer is not None:
        parts.append(f"chunk {config.chunk}, {unit.outer} outer adder")
    return ", ".join(parts)


def _baselines(unit: Unit) -> dict[str, Module]:
    """Accumulators as others build them, with the same operands and without chunks; products exact."""
    single, half = (Float.ieee(*widths, subnormals=False) for widths in ((8, 23), (5, 10)))
    lowest = sum(0 if isinstance(form, Int) else form.min_exponent - form.mantissa for form in (unit.x, unit.w))
    configs = {
        "fp32, nearest": LBA(product=None, accumulator=single, chunk=None),
        "fp32, toward zero": LBA(product=None, accumulator=single.replace(rounding="zero"), chunk=None),
        "fp16, nearest": LBA(product=None, accumulator=half, chunk=None),
        "fp16, toward zero": LBA(product=None, accumulator=half.replace(rounding="zero"), chunk=None),
        "int32, saturates": LBA(product=None, accumulator=Int(32), chunk=None, scale=2.0**lowest),
        "int32, wraps": LBA(product=None, accumulator=Int(32, overflow="wrap"), chunk=None, scale=2.0**lowest),
        "m10e5, no chunks": LBA.m10e5(chunk=None),
    }
    return {title: build(config, operands=(unit.x, unit.w)) for title, config in configs.items()}
