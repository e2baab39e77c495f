"""A hardware module as a wing's ``rtl.py`` describes it: ports, gates, what it computes, and what to feed it.

The contract between a wing and recoup.silicon. The card names a module (``rtl="recoup.<wing>.rtl"``) that has

    def build(config, *, operands=None, registers="product", ...) -> Module       keyword options of its own
    def capture(layer, inputs) -> tuple[ndarray, ...]                             optional: a layer's real operands
    def typical(config, lanes, steps, generator) -> Inputs                        optional: `recoup.gates.typical` ones

Its ``build`` hands over only options that the function's signature names, refuses all others, and returns
the `Module` with its measurements (verify, verilog, area, delay, energy). A `Module` is plain data and functions:

    def elaborate(m, port):                        # m: amaranth.hdl.Module, its domain ``sync`` without reset
        m.d.comb += port.y.eq(port.a * port.b)     # port.NAME: its Signal; m.submodules.NAME = another hdl.Module

    def expected(inputs):                          # the letter, as integers; see `Expected`
        return {"y": Expected((0,), product)}

    Module(name="mul", title="8 x 8", ports=(Port("a", "in", 8, "..."), ...), elaborate=elaborate, expected=expected)

**Values** are bit patterns. Of a port whose elements have 64 bits or fewer: ``uint64`` arrays, else object arrays of
Python integers, never negative; `signed` and `pattern` convert. Shapes: [steps, lanes], and [steps, lanes, parts] for
a port of several elements (element 0 in the lowest bits). A *lane* is an independent run of the module, a *step* a
clock cycle: inputs of a step are applied, outputs read before the clock edge that ends it. So what is registered once
shows one step later. Registers begin with random bits, but for ``presets``: a module that needs a reset must be given
it by ``control``.

**Registers** that should be told apart in reports and gated clocks (``drain``, ``accumulator``) are named Signals of
``m.d.sync`` with ``reset_less=True``; the domain has no reset, initial values are not part of the hardware.
"""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from recoup.errors import RecoupError

__all__ = ["PIP", "Expected", "Inputs", "Module", "Port", "amaranth", "element_type", "pattern", "signed"]

PIP = "pip install 'recoup[silicon]'"
Inputs = Mapping[str, np.ndarray]
"""Port name -> patterns [steps, lanes] or [steps, lanes, parts]."""


@dataclass(frozen=True, slots=True)
class Port:
    """One port.

    Attributes:
        name: in Verilog, and in `Inputs`.
        direction: "in" or "out".
        width: bits of the whole port, a multiple of ``parts``.
        meaning: one phrase for the ports' table.
        signed: whether an element's pattern is read in two's complement.
        parts: how many elements lie side by side in it.
        narrow: bits of a *narrow* element for structured vectors; 0: half of its bits.
        edges: patterns of an element on both sides of every threshold; 0, the largest and the sign's are added.
        legal: makes a pattern that occurs of any pattern (``uint64`` in and out, any shape); None: all occur.
        complete: whether ``legal`` leaves every pattern that occurs as it is, so that its values are all there are.
    """

    name: str
    direction: Literal["in", "out"]
    width: int
    meaning: str
    signed: bool = False
    parts: int = 1
    narrow: int = 0
    edges: tuple[int, ...] = ()
    legal: Callable[[np.ndarray], np.ndarray] | None = None
    complete: bool = False

    def __post_init__(self) -> None:
        if self.width < 1 or self.parts < 1 or self.width % self.parts:
            raise RecoupError(
                f"Port({self.name!r}, width={self.width}, parts={self.parts}): parts must divide the width"
            )

    @property
    def element(self) -> int:
        """Bits of one element."""
        return self.width // self.parts

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for the JSON beside the Verilog."""
        names = ("name", "direction", "width", "parts", "signed", "meaning")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Expected:
    """What an output port must show.

    Attributes:
        at: the steps at which it is looked at.
        values: patterns [len(at), lanes] or [len(at), lanes, parts].
        mask: [len(at), parts]: which parts are looked at in which step; None: all. Values of the others are not read.
    """

    at: Sequence[int]
    values: np.ndarray
    mask: np.ndarray | None = None

    def looked_at(self, port: Port) -> np.ndarray:
        """[len(at), parts]: the mask.

        Raises:
            RecoupError: one of another shape, or a part of the port that no step shows: it would pass unseen.
        """
        mask = np.ones((len(self.at), port.parts), bool) if self.mask is None else self.mask
        if mask.shape != (len(self.at), port.parts):
            raise RecoupError(
                f"expected {port.name!r}: mask has shape {list(mask.shape)}, must be [{len(self.at)}, {port.parts}]"
            )
        unseen = [int(part) for part in np.flatnonzero(~mask.any(axis=0))]
        if unseen:
            raise RecoupError(f"expected {port.name!r}: no step shows part {', '.join(map(str, unseen))}")
        return mask


def _nothing(_: int) -> Inputs:
    return {}


def _none() -> Mapping[str, "Module"]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Module:
    """A piece of hardware: what it is made of, what it computes, and what to feed it.

    Attributes:
        name: of the top module in Verilog.
        title: in tables, such as "2 threads, S+A".
        ports: all but the clock, which every clocked module has as ``clk``.
        elaborate: ``elaborate(m, port)`` adds its gates to an Amaranth module.
        expected: the letter: inputs -> `Expected` by output port, every one. Integers, not the hardware's own steps.
        clocked: whether it has registers.
        latency: clock edges from operands at the ports to the result at the ports, beyond those of its schedule.
        steps: cycles of one run for verification; 1 where a run is one operation without memory.
        control: ``control(steps)``: patterns of the ports that follow a schedule and not the data: [steps], or
            [steps, schedules] where runs follow one of several, which are dealt to the lanes eight at a time.
        presets: registers by name whose first state the vectors draw and ``expected`` finds in ``inputs``, [1, lanes]:
            so that the upper bits of a wide accumulator are reached in few steps.
        cleared: registers by the beginning of their names that are zero before a run, such as those of a pipeline in
            front of a preset accumulator.
        probes: registers by name that ``expected`` tells too: what a port shows of a wide sum is a rounding of it.
        held: registers by name that hold sums which begin from zero, with the codes that occur in them: what they can
            hold is used to prove faults redundant.
        aim: ``aim(inputs, generator)``: structured vectors with some replaced by what those hardly ever meet, such as
            quotients that just fit.
        protocol: what the ports' sequence is, for users of the Verilog: plain values, written as JSON beside it.
        work: operations (multiply-accumulates, elements) a step, for energy by operation.
        feed: ``feed(operands, lanes, generator)``: inputs of ``lanes`` runs drawn from real operands.
        gated: registers by name whose clock a designer may gate, and in which steps it must run: ``[steps]`` bools.
        baselines: ``baselines()``: the conventional counterparts by title, built by the same generator.
        units: modules that it holds as Amaranth Instances of their name: made and mapped once each.
        facts: what else should be printed beside it, such as the bits of its accumulator.
    """

    name: str
    title: str
    ports: tuple[Port, ...]
    elaborate: Callable[[Any, Any], None]
    expected: Callable[[Inputs], Mapping[str, Expected]]
    clocked: bool = True
    latency: int = 0
    steps: int = 1
    control: Callable[[int], Inputs] = _nothing
    presets: tuple[Port, ...] = ()
    cleared: tuple[str, ...] = ()
    probes: tuple[Port, ...] = ()
    held: tuple[Port, ...] = ()
    aim: Callable[[dict[str, np.ndarray], np.random.Generator], Inputs] | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)
    work: float = 1.0
    feed: Callable[[tuple[np.ndarray, ...], int, np.random.Generator], Inputs] | None = None
    gated: Mapping[str, Callable[[Inputs], np.ndarray]] = field(default_factory=dict)
    baselines: Callable[[], Mapping[str, "Module"]] = _none
    units: tuple["Module", ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def replace(self, **changes: Any) -> "Module":
        """A copy with some fields changed."""
        return replace(self, **changes)

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The input ports."""
        return tuple(port for port in self.ports if port.direction == "in")

    @property
    def outputs(self) -> tuple[Port, ...]:
        """The output ports."""
        return tuple(port for port in self.ports if port.direction == "out")

    @property
    def shown(self) -> tuple[Port, ...]:
        """What is compared: the output ports, and the probes."""
        return (*self.outputs, *self.probes)

    def port(self, name: str) -> Port:
        """The port, or the probe, of a name."""
        return next(port for port in (*self.ports, *self.probes) if port.name == name)

    def letter(self, inputs: Inputs) -> Mapping[str, Expected]:
        """What `expected` says of every output port and probe.

        Raises:
            RecoupError: it leaves one out, which any hardware would equal, or names one that there is not.
        """
        found, shown = self.expected(inputs), [port.name for port in self.shown]
        unseen = [name for name in shown if name not in found]
        if unseen:
            raise RecoupError(f"{self.name}: expected leaves out {', '.join(unseen)}: whatever it showed would pass")
        unknown = [name for name in found if name not in shown]
        if unknown:
            raise RecoupError(f"{self.name}: expected names {', '.join(unknown)}, neither an output port nor a probe")
        return found

    def rtlil(self) -> str:
        """The module in yosys's own language, written by Amaranth; the same text for the same module.

        Raises:
            RecoupError: Amaranth is not installed.
        """
        hdl, back = amaranth("hdl"), amaranth("back.rtlil")
        m = hdl.Module()
        signals = {}
        for port in self.ports:
            shape = hdl.signed(port.width) if port.signed and port.parts == 1 else hdl.unsigned(port.width)
            signals[port.name] = hdl.Signal(shape, name=port.name)
        ports = list(signals.values())
        if self.clocked:
            domain = m.domains.sync = hdl.ClockDomain("sync", reset_less=True)
            ports.insert(0, domain.clk)
        self.elaborate(m, SimpleNamespace(**signals))
        text = back.convert(m, name=self.name, ports=ports, emit_src=False)
        return text + "".join(unit.rtlil().replace("attribute \\top 1\n", "") for unit in self.units)

    def interface(self) -> str:
        """Ports, latency and protocol as JSON, for a user of the Verilog."""
        clock = [{"name": "clk", "direction": "in", "width": 1, "parts": 1, "signed": False, "meaning": "rising edge"}]
        ports = (clock if self.clocked else []) + [port.to_dict() for port in self.ports]
        values = {"module": self.name, "title": self.title, "latency": self.latency, "ports": ports}
        return json.dumps({**values, "protocol": dict(self.protocol), "facts": dict(self.facts)}, indent=1)


def amaranth(part: str) -> Any:
    """A part of Amaranth, such as ``hdl``.

    Raises:
        RecoupError: it is not installed, or too old.
    """
    try:
        return importlib.import_module(f"amaranth.{part}")
    except ImportError as error:
        raise RecoupError(f"silicon needs Amaranth 0.5.10 or newer ({error}): {PIP}") from error


def element_type(port: Port) -> Any:
    """The numpy type of a port's patterns."""
    return np.uint64 if port.element <= 64 else object


def signed(patterns: np.ndarray, width: int) -> np.ndarray:
    """Two's complement patterns of ``width`` bits (1 to 64) as int64."""
    shift = np.uint64(64 - width)
    return (patterns.astype(np.uint64) << shift).view(np.int64) >> np.int64(64 - width)


def pattern(values: np.ndarray, width: int) -> np.ndarray:
    """Integers modulo 2^width: uint64 up to 64 bits, else Python integers."""
    if width > 64:
        return np.asarray(values, dtype=object) % (1 << width)
    if values.dtype == object:
        return (values % (1 << width)).astype(np.uint64)
    return values.astype(np.int64).view(np.uint64) & np.uint64((1 << width) - 1)
