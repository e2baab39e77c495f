"""The fused multiply-add unit with a narrow accumulator (FMAq) in gates, generated from the config that is emulated.

A float accumulator that equals the emulation has one bit more than its format's: `Float.lba` has no code for zero, so a
flag tells it. The paper's 12 bits, M7E4, are 13 (`recoup.formats.FloatFields`).

Legend: x, w operands; p the product; s the sum of a chunk; y the sum of the chunks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log2
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.fields import choice
from recoup.formats import Float, Int, code_bits, ports
from recoup.gates import arithmetic, flagged
from recoup.gates import typical as draw
from recoup.gates.module import Expected, Inputs, Module, Port, amaranth
from recoup.lba.config import LBA
from recoup.lba.reference import added, quantize
from recoup.lba.rtl_gates import Operand, either, of_integer, product, sum_code, unpacked
from recoup.lba.rtl_schedule import output

__all__ = ["build"]

hdl = amaranth("hdl")

Outer = Literal["shared", "own"]
RUN, LONGEST = (1, 2), 24  # terms of the chunks of a run for verification, after one that may saturate; its most
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
    pins = [*unit.operand_ports(), Port("first", "in", 1, "the chunk's sum starts from zero with this product")]
    if unit.outer == "shared":
        pins[-1] = Port("first", "in", 1, "the sum starts from zero: the chunk's, or in an outer cycle the output's")
    if unit.outer is not None:
        pins.append(Port("outer", "in", 1, "the chunk's sum is added to the output"))
    if unit.outer == "own":
        pins.append(Port("start", "in", 1, "with outer: the output starts from zero"))
    pins.append(ports.port("y", "out", unit.result, f"the sum, {ports.told(unit.result)}"))
    return Module(
        name="fmaq",
        title=_title(config, unit),
        ports=tuple(pins),
        elaborate=unit.elaborate,
        expected=unit.expected,
        latency=1,
        steps=max(len(schedule["first"]) for schedule in unit.schedules()) + 1,
        control=unit.control,
        presets=unit.sums(),
        held=unit.sums(),
        protocol=unit.protocol(),
        baselines=lambda: _baselines(unit),
        facts={
            "accumulator": ports.told(config.accumulator),
            "accumulator bits": code_bits(config.accumulator),
            "operands": " x ".join(ports.told(form) for form in (unit.x, unit.w)),
            "outer adder": unit.outer or "none",
        },
    )


def typical(config: LBA, lanes: int, steps: int, generator: np.random.Generator) -> Inputs:
    """Inputs of the unit of ``config.operands``: `recoup.gates.typical`, rounded to the operands' formats, for one
    output of ``steps`` cycles in the config's chunks.

    Both are smaller by a factor where such a sum's deviation would exceed a quarter of the accumulator's largest value.
    """
    unit = Unit.of(config, None, None)
    x, w = (form.largest_value for form in (unit.x, unit.w))
    deviation = (steps / 2) ** 0.5 * x * w / draw.DEVIATIONS**2
    factor = min(1.0, (config.accumulator.largest_value * config.scale / 4 / deviation) ** 0.5)
    control = output(unit.schedule(), config.chunk or steps, unit.outer == "shared", steps)
    found = {name: np.repeat(bits[:, None], lanes, 1) for name, bits in control.items()}
    for name, form, kind in (("x", unit.x, draw.activations), ("w", unit.w, draw.weights)):
        values = torch.from_numpy(kind((steps, lanes), form.largest_value * factor, generator))
        rounded = values.round() if isinstance(form, Int) else quantize(values, form, config, torch.zeros_like(values))
        found[name] = ports.codes(rounded, form)
    return found


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
        if isinstance(form, Int) and (form.bits > 24 or form.largest_value < 1):
            raise RecoupError(f"silicon: operands={form!r}: integer operands have 2 to 24 bits, or 1 without sign")
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
            ports.port(name, "in", form, f"{what}, {ports.told(form)}{note}")
            for name, what, form in (("x", "activation", self.x), ("w", "weight", self.w))
        ]

    # What it is made of --------------------------------------------------------------------------------------------

    def elaborate(self, m: Any, port: Any) -> None:
        """Gates and registers."""
        config, inner = self.config, self.config.accumulator
        p = product(m, port.x, port.w, self.x, self.w, config)
        s = hdl.Signal(code_bits(inner), name="accumulator", reset_less=True)
        if self.outer is None:
            m.d.sync += s.eq(self.added(m, p, self._going_on(m, s, port.first, p), inner, "add"))
            m.d.comb += port.y.eq(s)
            return
        y = hdl.Signal(code_bits(config.outer), name="output", reset_less=True)
        m.d.comb += port.y.eq(y)
        if self.outer == "own":
            before = self.sum_of(m, y & ~port.start.replicate(len(y)), config.outer, "output")
            total = self.added(m, self.sum_of(m, s, inner, "chunk"), before, config.outer, "outer")
            m.d.sync += s.eq(self.added(m, p, self._going_on(m, s, port.first, p), inner, "add"))
        else:
            base = hdl.Mux(port.outer, y, s) & ~port.first.replicate(len(s))
            base = self.sum_of(m, arithmetic.named(m, "base", base), inner, "sum")
            chunk = self.sum_of(m, s, inner, "chunk")
            if isinstance(inner, Int):
                chunk = of_integer(m, chunk, round(log2(config.scale)), "chunk")
            total = self.added(m, either(m, port.outer, chunk, p, "term"), base, inner, "add")
            with m.If(~port.outer):
                m.d.sync += s.eq(total)
        with m.If(port.outer):
            m.d.sync += y.eq(total)

    def _going_on(self, m: Any, s: Any, first: Any, p: Any) -> Any:
        """The sum that p is added to: the register's, or zero with the first term."""
        inner = self.config.accumulator
        if isinstance(p, flagged.Flagged):
            return flagged.flagged(self.sum_of(m, s, inner, "sum"), first)
        return self.sum_of(m, s & ~first.replicate(len(s)), inner, "sum")

    def sums(self) -> tuple[Port, ...]:
        """The registers of sums."""
        return tuple(self._sum(name, form) for name, form in dict(self._sums()).items())

    def _sum(self, name: str, form: Float | Int) -> Port:
        """Its codes are those of multiples of the grain: the gates rely on that."""
        port, grain = ports.port(name, "out", form, "a sum"), self._grain_of(form)
        legal = port.legal
        if grain is None or legal is None or isinstance(form, Int):
            return port

        def occurring(patterns: np.ndarray) -> np.ndarray:
            return ports.codes(torch.trunc(ports.values(legal(patterns), form) / 2.0**grain) * 2.0**grain, form)

        return replace(port, legal=occurring)

    def _sums(self) -> tuple[tuple[str, Float | Int], tuple[str, Float | Int]]:
        """The chunk's sum and the output's; the register that drives the port goes by the port's name."""
        inner = "y" if self.outer is None else "accumulator"
        return (inner, self.config.accumulator), ("y", self.result)

    # What it computes ----------------------------------------------------------------------------------------------

    def expected(self, inputs: Inputs) -> Mapping[str, Expected]:
        """The steps of `recoup.lba.reference` for every lane."""
        config = self.config
        x, w = (ports.values(inputs[name], form) for name, form in (("x", self.x), ("w", self.w)))
        steps, lanes = x.shape
        control = {name: np.asarray(inputs[name]).reshape(steps, -1) != 0 for name in self.schedule()}
        s, y = (self._begun(inputs, name, form, lanes) for name, form in self._sums())
        at, rows, zero = [], [], torch.zeros(lanes, dtype=torch.float64)
        for step in range(steps):
            shown = s if self.outer is None else y
            if not bool(shown.isnan().any()):
                at.append(step)
                rows.append(ports.codes(shown, self.result, config.scale))
            first, outer, start = (_lanes(control.get(name), step, lanes) for name in ("first", "outer", "start"))
            if self.outer == "shared":
                start = first
            before = s
            if not (self.outer == "shared" and bool(outer.all())):
                p = x[step] * w[step]
                p = p if config.product is None else quantize(p, config.product, config, zero)
                s = added(p, torch.where(first, zero, s), config.accumulator, config, zero)
                s = torch.where(outer, before, s) if self.outer == "shared" else s
            if self.outer is not None and bool(outer.any()):
                total = added(before, torch.where(start, zero, y), config.outer, config, zero)
                y = torch.where(outer, total, y)
        return {"y": Expected(at, np.stack(rows) if rows else np.empty((0, lanes), np.uint64))}

    def _begun(self, inputs: Inputs, name: str, form: Float | Int, lanes: int) -> Tensor:
        """A sum before the first step; NaN where no preset says."""
        if name not in inputs:
            return torch.full((lanes,), torch.nan, dtype=torch.float64)
        return ports.values(inputs[name][0], form) * (self.config.scale if isinstance(form, Int) else 1.0)

    def schedules(self) -> list[dict[str, list[int]]]:
        """`schedule`; one that goes on with a sum that stands in the register; one that adds such a sum up first."""
        base = self.schedule()
        found = [base, base | {"first": [0, *base["first"][1:]]}]
        if self.outer == "shared":
            found.append({"first": [0, *base["first"]], "outer": [1, *base["outer"]]})
        if self.outer == "own":
            found.append(base | {"outer": [1, *base["outer"][1:]]})
        return found

    def schedule(self) -> dict[str, list[int]]:
        """The control of a run for verification: chunks of several lengths, an output of several chunks, another."""
        chunks = (self._saturating(), *RUN, RUN[0])
        new = 0, len(chunks) - 1  # chunks that begin an output
        if self.outer is None:
            return {"first": [int(not i) for terms in (chunks[0], 3) for i in range(terms)]}
        begins = [[1] + [0] * (terms - 1) for terms in chunks]
        if self.outer == "shared":
            first = [bit for number, bits in enumerate(begins) for bit in (*bits, int(number in new))]
            return {"first": first, "outer": [bit for terms in chunks for bit in (*[0] * terms, 1)]}
        ends = np.cumsum(chunks).tolist()  # the step after a chunk's last term
        outer = [int(step in ends) for step in range(ends[-1] + 1)]
        start = [int(step in [ends[number] for number in new]) for step in range(ends[-1] + 1)]
        return {"first": [*(bit for bits in begins for bit in bits), 1], "outer": outer, "start": start}

    def _saturating(self) -> int:
        """How many of the largest products leave the accumulator's range, within bounds."""
        product = self.x.largest_value * self.w.largest_value
        product = product if self.config.product is None else min(product, self.config.product.largest_value)
        top = self.config.accumulator.largest_value * self.config.scale
        return min(max(int(top / product) + 2, 5), LONGEST)

    @property
    def grain(self) -> int:
        """The exponent of a unit that all sums are multiples of: rounding to a coarser one keeps that."""
        forms = (self.x, self.w)
        exact = sum(0 if isinstance(f, Int) else f.min_exponent - f.mantissa for f in forms)
        if self.config.product is None:
            return exact
        least, form = sum(round(log2(ports.least(f))) for f in forms), self.config.product
        # The largest value is a multiple of its own last bit alone.
        return min(max(exact, max(least, form.min_exponent) - form.mantissa), form.max_exponent - form.mantissa)

    def sum_of(self, m: Any, code: Any, form: Float | Int, name: str) -> Any:
        """A register's sum: an `Int`'s code, or a number that is no smaller than the grain."""
        found = unpacked(m, code, form, name)
        grain = self._grain_of(form)
        return found if grain is None else replace(found, least=max(found.least, grain - found.base))

    def _grain_of(self, form: Float | Int) -> int | None:
        """The grain of the sums in a format; None: they have none."""
        if isinstance(form, Int) or isinstance(self.config.accumulator, Int):
            return None
        inner = self.config.accumulator
        last = min(f.max_exponent - f.mantissa for f in (form, inner) if isinstance(f, Float))
        return self.grain if self.grain <= last else None

    def added(self, m: Any, term: Any, before: Any, form: Float | Int, name: str) -> Any:
        """The code of Q(term + before)."""
        return sum_code(m, term, before, form, self.config, name, self._grain_of(form))

    def control(self, steps: int) -> Inputs:
        """The schedules, as long as a run; zeros follow."""
        columns = self.schedules()
        return {
            name: np.array([(column[name] + [0] * steps)[:steps] for column in columns], np.uint64).T
            for name in columns[0]
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


def _lanes(control: np.ndarray | None, step: int, lanes: int) -> Tensor:
    """A control port's bits in one step, per lane."""
    if control is None:
        return torch.zeros(lanes, dtype=torch.bool)
    return torch.from_numpy(np.broadcast_to(control[step], (lanes,)).copy())


def _title(config: LBA, unit: Unit) -> str:
    total = config.accumulator
    parts = [ports.told(total)]
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
