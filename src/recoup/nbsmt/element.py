"""NB-SMT's processing element, and its product unit alone, as modules: ports, registers, what they compute.

What each must compute is `recoup.nbsmt.reference.contribution`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from recoup.errors import RecoupError
from recoup.gates.module import Expected, Inputs, Module, Port, amaranth, pattern, signed
from recoup.nbsmt import reference
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.ports import UNSIGNED
from recoup.nbsmt.product_unit import Gates, halves, total_of

REGISTERS = ("none", "product", "decode")
"""Stages of registers: none, behind the products' sum, and before the multipliers too."""
_EDGES = (1, 7, 8, 9, 15, 16, 17, 23, 24, 25, 40, 119, 120, 127, 128, 135, 136, 231, 232, 239, 240, 247, 248, 249)
_STEPS = 24
CLEARED = ("x_", "w_", "first_", "decode", "product")
"""Registers, by the beginning of their names, that are zero before a run: those in front of a preset accumulator."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a processing element has besides its config.

    Attributes:
        registers: pipeline registers, one of `REGISTERS`.
        drain: whether it has a second register that results leave through.
        accumulator_bits: of the accumulator, which wraps.
        exact: whether it has a full 8 x 8 multiplier a thread: what NB-SMT is to be compared with.
        zero: of the activation codes: 0 unsigned, 128 signed. The ports carry values.
    """

    registers: str = "product"
    drain: bool = True
    accumulator_bits: int = 32
    exact: bool = False
    zero: int = UNSIGNED

    @property
    def stages(self) -> int:
        """Pipeline registers between operands and accumulator."""
        return {"none": 0, "product": 1, "decode": 2}[self.registers]


def sum_bits(threads: int) -> int:
    """Bits of the exact sum of a slot's products."""
    return {1: 16, 2: 17, 4: 18}[threads]


def activations(words: np.ndarray, zero: int) -> np.ndarray:
    """The values of activations at a port, int64."""
    return signed(words, 8) if zero else words.astype(np.int64)


def slot_sum(x: np.ndarray, w: np.ndarray, config: NBSMT, options: Options) -> np.ndarray:
    """What a slot adds: x, w int64 [..., T] -> int64 [...], by the emulation's own reference."""
    x_T, w_T = (torch.from_numpy(np.ascontiguousarray(np.moveaxis(v, -1, 0))) for v in (x, w))
    if options.exact or config.threads == 1:
        return (x_T * w_T).sum(0).numpy()
    active = (x_T != 0) & (w_T != 0)
    counted = active if config.zero_test else torch.ones_like(active)
    others = counted.sum(0) - counted.long()
    return reference.contribution(x_T, w_T, others, config, options.zero).sum(0).numpy()


def products(config: NBSMT, options: Options) -> Module:
    """The sum of a slot's products, without registers."""
    T, exact = config.threads, options.exact

    def elaborate(m: Any, port: Any) -> None:
        gates = Gates(m, config, options.zero)
        operands = gates.operands(halves(port.x, T, options.zero > 0), halves(port.w, T, True), exact)
        m.d.comb += port.y.eq(total_of([gates.product(pair) for pair in operands]))

    def expected(inputs: Inputs) -> Mapping[str, Expected]:
        x, w = activations(inputs["x"], options.zero), signed(inputs["w"], 8)
        x, w = (v.reshape(*v.shape[:2], T) for v in (x, w))
        return {"y": Expected(range(len(x)), pattern(slot_sum(x, w, config, options), sum_bits(T)))}

    return Module(
        name=f"{named(config, options)}_products",
        title=f"{titled(config, options)}: products",
        ports=(*operand_ports(T, options.zero), Port("y", "out", sum_bits(T), "the slot's sum", signed=True)),
        elaborate=elaborate,
        expected=expected,
        clocked=False,
        work=T,
        protocol={"order": "combinational: one slot, element t of x and w is thread t's"},
        baselines=lambda: (
            {f"{T} exact multipliers": products(config, replace(options, exact=True))} if T > 1 and not exact else {}
        ),
    )


def operand_ports(threads: int, zero: int = UNSIGNED) -> tuple[Port, Port]:
    """The ports x and w."""
    alike = {"parts": threads, "signed": zero > 0, "narrow": 5 if zero else 4, "edges": _EDGES}
    return (
        Port("x", "in", 8 * threads, "activations, thread 0 lowest", **alike),
        Port("w", "in", 8 * threads, "weights", signed=True, parts=threads, narrow=4, edges=_EDGES),
    )


def named(config: NBSMT, options: Options) -> str:
    """What its modules' names begin with."""
    return f"{'exact' if options.exact else 'nbsmt'}_{config.threads}t{'_signed' if options.zero else ''}"


def titled(config: NBSMT, options: Options) -> str:
    """What it is called in tables."""
    codes = ", signed" if options.zero else ""
    if config.threads == 1:
        return f"1T{codes}"
    if options.exact:
        return f"{config.threads}T exact{codes}"
    port = f" on {config.port} bits" if options.zero else ""
    return f"{config.threads}T {config.policy} {config.rounding}{codes}{port}"


def compute(m: Any, config: NBSMT, options: Options, x: Any, w: Any, first: Any) -> tuple[Any, Any]:
    """Products, pipeline registers and accumulator behind operand registers: the accumulator, and ``first`` with it."""
    gates = Gates(m, config, options.zero)
    hdl, T = gates.hdl, config.threads
    operands = gates.operands(halves(x, T, options.zero > 0), halves(w, T, True), options.exact)
    if options.registers == "decode" and not options.exact and T > 1:
        held = []
        for k, parts in enumerate(operands):
            names = [hdl.Signal(p.shape(), name=f"decode{k}_{i}", reset_less=True) for i, p in enumerate(parts)]
            m.d.sync += [name.eq(part) for name, part in zip(names, parts, strict=True)]
            held.append(tuple(names))
        operands, first = held, delayed(m, hdl, first, "first_decode")
    value = total_of([gates.product(parts) for parts in operands])
    if options.registers != "none":
        product = hdl.Signal(hdl.signed(sum_bits(T)), name="product", reset_less=True)
        m.d.sync += product.eq(value)
        value, first = product, delayed(m, hdl, first, "first_product")
    accumulator = hdl.Signal(hdl.signed(options.accumulator_bits), name="accumulator", reset_less=True)
    m.d.sync += accumulator.eq(hdl.Mux(first, 0, accumulator) + value)
    return accumulator, first


def delayed(m: Any, hdl: Any, value: Any, name: str) -> Any:
    """One register."""
    register = hdl.Signal(len(value), name=name, reset_less=True)
    m.d.sync += register.eq(value)
    return register


def element(config: NBSMT, options: Options) -> Module:
    """One processing element."""
    T, bits = config.threads, options.accumulator_bits
    latency = 1 + stages_of(config, options)

    def elaborate(m: Any, port: Any) -> None:
        hdl = amaranth("hdl")
        x, w = delayed(m, hdl, port.x, "x_held"), delayed(m, hdl, port.w, "w_held")
        first = delayed(m, hdl, port.first, "first_held")
        m.d.comb += [port.x_next.eq(x), port.w_next.eq(w), port.first_next.eq(first)]
        accumulator, ready = compute(m, config, options, x, w, first)
        if not options.drain:
            m.d.comb += port.y.eq(accumulator)
            return
        shift = delayed(m, hdl, port.shift, "shift_held")
        drain = hdl.Signal(bits, name="drain", reset_less=True)
        with m.If(shift):
            m.d.sync += drain.eq(port.drain)
        with m.Elif(ready):
            m.d.sync += drain.eq(accumulator)
        m.d.comb += [port.drain_next.eq(drain), port.shift_next.eq(shift)]

    return Module(
        name=f"{named(config, options)}_pe",
        title=titled(config, options),
        ports=element_ports(T, options),
        elaborate=elaborate,
        expected=lambda inputs: element_expected(inputs, config, options, latency),
        latency=latency,
        steps=_STEPS,
        control=lambda steps: element_control(steps, options),
        cleared=CLEARED,
        presets=(Port(preset_of(options), "in", bits, "the accumulator before the run", signed=True),),
        protocol=element_protocol(T, options, latency),
        work=T,
        feed=lambda operands, lanes, generator: element_feed(operands, lanes, generator, T, options),
        gated={"drain": lambda inputs: drain_runs(inputs, latency)} if options.drain else {},
        baselines=lambda: element_baselines(config, options),
        facts={"accumulator bits": bits, "registers": options.registers, "drain register": options.drain},
    )


def preset_of(options: Options) -> str:
    """The accumulator's name in a netlist: that of the port, where it is one."""
    return "accumulator" if options.drain else "y"


def stages_of(config: NBSMT, options: Options) -> int:
    """Pipeline registers that this element really has: one multiplier a thread needs no decoding."""
    return min(options.stages, 1) if options.exact or config.threads == 1 else options.stages


def element_ports(T: int, options: Options) -> tuple[Port, ...]:
    """All ports of a processing element."""
    x, w = operand_ports(T, options.zero)
    bits = options.accumulator_bits
    ports = [x, w, Port("first", "in", 1, "these operands begin a new sum")]
    passed = [
        Port("x_next", "out", x.width, "the activations, one clock later", parts=T, signed=options.zero > 0),
        Port("w_next", "out", w.width, "the weights, one clock later", parts=T, signed=True),
        Port("first_next", "out", 1, "first, one clock later"),
    ]
    if not options.drain:
        return (*ports, *passed, Port("y", "out", bits, "the accumulator", signed=True))
    ports += [
        Port("shift", "in", 1, "the drain register takes what stands at drain"),
        Port("drain", "in", bits, "the drain register above", signed=True, edges=(1 << (bits // 2),)),
    ]
    passed += [
        Port("shift_next", "out", 1, "shift, one clock later"),
        Port("drain_next", "out", bits, "the drain register", signed=True),
    ]
    return (*ports, *passed)


def element_protocol(T: int, options: Options, latency: int) -> dict[str, Any]:
    """What a user of the Verilog must know."""
    said = {
        "valid": "every clock takes a slot; a slot of zeros changes nothing",
        "first": "high with the first slot of a sum: the accumulator begins anew"
        + ("; the drain register takes the finished sum" if options.drain else ""),
        "order": f"slots in im2col order; element t of x and w, bits {'8t+7:8t'}, is thread t's (T = {T})",
        "latency": f"a slot at the ports before clock edge 1 is in the accumulator after edge {latency + 1}",
    }
    if options.drain:
        said["drain"] = (
            "drain_next holds a finished sum from the edge at which the next sum's first slot is accumulated until "
            "shift; shift acts one clock after it stands at the port and goes before loading"
        )
    return said


def element_control(steps: int, options: Options) -> Inputs:
    """Sums of different lengths, and shifts between them."""
    first = np.zeros(steps, bool)
    first[[7, 8, 14]] = True
    if not options.drain:
        return {"first": first}
    shift = np.zeros(steps, bool)
    shift[[12, 19, 20]] = True
    return {"first": first, "shift": shift}


def element_expected(inputs: Inputs, config: NBSMT, options: Options, latency: int) -> Mapping[str, Expected]:
    """The registers, step by step."""
    T, bits = config.threads, options.accumulator_bits
    x, w = activations(inputs["x"], options.zero), signed(inputs["w"], 8)
    x, w = (v.reshape(*v.shape[:2], T) for v in (x, w))
    terms = slot_sum(x, w, config, options)
    steps, lanes = terms.shape
    first = inputs["first"][:, 0].astype(bool)
    now = signed(inputs[preset_of(options)][0], bits)
    sums = np.zeros((steps, lanes), np.int64)
    for s in range(steps):
        now = terms[s] + (0 if first[s] else now)
        sums[s] = now
    later = range(1, steps)
    found = {f"{name}_next": Expected(later, inputs[name][:-1]) for name in ("x", "w", "first")}
    if not options.drain:
        at = range(latency + 1, steps)
        return {**found, "y": Expected(at, pattern(sums[: steps - latency - 1], bits))}
    shift = inputs["shift"][:, 0].astype(bool)
    drain, held, known = np.zeros(lanes, np.uint64), [], []
    valid = False
    for s in range(1, steps):  # the drain register after the edge that ends step s - 1
        source = s - 1 - latency  # the slot whose sum begins in the accumulator at this edge
        if s >= 2 and shift[s - 2]:
            drain, valid = inputs["drain"][s - 1], True
        elif source >= 1 and first[source]:
            drain, valid = pattern(sums[source - 1], bits), True
        if valid:
            known.append(s)
            held.append(drain)
    found["shift_next"] = Expected(later, inputs["shift"][:-1])
    return {**found, "drain_next": Expected(known, np.stack(held))}


def drain_runs(inputs: Inputs, latency: int) -> np.ndarray:
    """The steps at whose end the drain register's clock must run."""
    first, shift = (inputs[name][:, 0].astype(bool) for name in ("first", "shift"))
    return np.concatenate([np.zeros(latency, bool), first])[: len(first)] | np.concatenate([[False], shift])[:-1]


def layer_operands(operands: tuple[np.ndarray, ...], threads: int, zero: int) -> tuple[np.ndarray, np.ndarray]:
    """A layer's operands x [M, T, S] and w [T, S, N], of any type of integers.

    Raises:
        RecoupError: not two arrays, no integers, a wrong shape, or values beyond 8 bits.
    """
    kind = "int8" if zero else "uint8"
    legal = (
        f"legal are x {kind} [positions, {threads}, slots] and w int8 [{threads}, slots, channels] as "
        "recoup.silicon.capture gives them"
    )
    if len(operands) != 2:
        raise RecoupError(f"energy of NB-SMT: {len(operands)} array(s) of operands; {legal}")
    x, w = operands
    for name, value, (low, high) in (("x", x, (-zero, 255 - zero)), ("w", w, (-128, 127))):
        if value.dtype.kind not in "iu":
            raise RecoupError(f"energy of NB-SMT: {name} is {value.dtype}, no integers; {legal}")
        if value.ndim != 3 or not value.size:
            raise RecoupError(f"energy of NB-SMT: {name} has shape {list(value.shape)}; {legal}")
        if value.min() < low or value.max() > high:
            found = f"{value.min()} to {value.max()}"
            other = _other_codes(zero) if name == "x" else ""
            raise RecoupError(f"energy of NB-SMT: {name} holds {found}, beyond {low} to {high}; {legal}{other}")
    if x.shape[1] != threads or w.shape[0] != threads or x.shape[2] != w.shape[1]:
        raise RecoupError(f"energy of NB-SMT: x has shape {list(x.shape)} and w {list(w.shape)}; {legal}")
    return x, w


def _other_codes(zero: int) -> str:
    """What to do with a layer of the codes that the unit is not for."""
    kind = "unsigned" if zero else "signed"
    always = "" if zero else '; calibrate_(..., activations="signed") makes all layers signed'
    return (
        f'; {kind} activations go through build(..., activations="{kind}"), and capture(..., layers=[...]) takes '
        f"layers of one kind{always}"
    )


def element_feed(
    operands: tuple[np.ndarray, ...], lanes: int, generator: np.random.Generator, threads: int, options: Options
) -> Inputs:
    """Outputs drawn from a layer: x uint8 (signed: int8) [M, T, S], w int8 [T, S, N]; a lane is one output, a step one
    slot.

    Raises:
        RecoupError: as `layer_operands`.
    """
    x, w = layer_operands(operands, threads, options.zero)
    rows, columns = generator.integers(0, x.shape[0], lanes), generator.integers(0, w.shape[2], lanes)
    slots = x.shape[2]
    found = {
        "x": np.ascontiguousarray(pattern(x[rows].astype(np.int64), 8).transpose(2, 0, 1)),
        "w": np.ascontiguousarray(pattern(w[:, :, columns].astype(np.int64), 8).transpose(1, 2, 0)),
        "first": np.repeat((np.arange(slots) == 0)[:, None], lanes, 1).astype(np.uint64),
    }
    found = {name: v[:, :, 0] if v.ndim == 3 and v.shape[2] == 1 else v for name, v in found.items()}
    if options.drain:
        found["shift"] = np.zeros((slots, lanes), np.uint64)
        found["drain"] = np.zeros((slots, lanes), np.uint64)
    return found


def element_baselines(config: NBSMT, options: Options) -> Mapping[str, Module]:
    """One thread, and as many full multipliers as there are threads on one accumulator."""
    if options.exact or config.threads == 1:
        return {}
    exact = replace(options, exact=True)
    return {
        "1T": element(config.single, options),
        f"{config.threads}T exact": element(config, exact),
    }
