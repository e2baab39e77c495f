"""Energy of a mapped module on given operands: toggles times their cost, clock pins by the state they meet, leakage.

A step costs, over all nets, rises (C V^2 / 2 + the driver's internal energy of a rise) + falls (the same of a fall),
and over all flip-flops the clock pin's C V^2 + its internal energy by D and Q. C is that of pins (and of wires if asked
for); internal tables are read at 0.1 ns slew. With inertial delay glitches count: they decide. Zero delay is a lower
bound.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from recoup.errors import RecoupError
from recoup.gates.module import Inputs, Module
from recoup.silicon import logic, timing
from recoup.silicon.cells import Cell, Library, Power, Table
from recoup.silicon.netlist import Netlist, first_states
from recoup.silicon.toggles import Toggles, toggles
from recoup.silicon.words import packed

SLEW = 1e-10
TICK = 25e-12


@dataclass(frozen=True, slots=True)
class Energy:
    """What a step costs on given operands.

    Attributes:
        module: its title.
        step: femtojoules a clock cycle.
        operation: femtojoules an operation (multiply-accumulate, element).
        clock, registers, logic, inputs, leakage: where the step's energy goes, fJ: clock pins, flip-flops' outputs,
            other gates' outputs, input ports' nets, leakage over ``period``.
        period: ns, the clock period that leakage is counted for: the module's delay.
        lower_bound: True: without glitches.
        gated: the step with clocks that run only when they are needed, for the registers ``gates``; the same as
            ``step`` where there are none.
        gates: names of these registers, such as the drain's.
        lanes, steps: simulated runs and cycles.
        tick: ps, the time step of the simulation; 0 without glitches.
        wires: as in `recoup.silicon.timing.Delay`.
        tool, liberty: what measured it; file name and sha256 of each library file.
    """

    module: str
    step: float
    operation: float
    clock: float
    registers: float
    logic: float
    inputs: float
    leakage: float
    period: float
    lower_bound: bool
    gated: float
    gates: tuple[str, ...]
    lanes: int
    steps: int
    tick: float
    wires: str
    tool: str
    liberty: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def energy_of(
    module: Module,
    netlist: Netlist,
    library: Library,
    inputs: Inputs,
    *,
    glitches: bool = True,
    wires: timing.Wires = None,
    tick: float = TICK,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures of `Energy` that depend on the operands, as plain values.

    Raises:
        RecoupError: fewer than two steps, or a tick that is none.
    """
    words = packed(module, inputs)
    steps, lanes = words.shape[0], words.shape[2] * 64
    if steps < 2:
        raise RecoupError(f"energy of {module.name}: {steps} step; toggles need two or more")
    if not 1e-13 <= tick <= 1e-9:
        raise RecoupError(f"energy: tick={tick!r} s: must lie between 1e-13 and 1e-9")
    initial = first_states(module, netlist, inputs, np.random.default_rng(seed))
    always = np.ones((len(netlist.registers), steps), np.bool_)
    found = timing.arrivals(netlist, library, wires)
    counts = toggles(netlist, words, initial, always, found if glitches else None, tick)
    parts = _parts(netlist, library, counts, found.load, lanes, steps)
    period = timing.longest(netlist, library, wires)[0]
    parts["leakage"] = period * _leakage(netlist, library)
    femto = {name: float(value) * 1e15 for name, value in parts.items()}
    total = sum(femto.values())
    spared = 0.0
    if module.gated:  # which register meets which state does not depend on delays
        needed = toggles(netlist, words, initial, _running(module, netlist, inputs, steps), None, tick)
        spared = femto["clock"] - 1e15 * _clocked(netlist, library, needed.seen) / (lanes * steps)
    return {
        "step": total, "gated": total - spared, "operation": total / module.work, **femto,
        "period": period * 1e9, "lanes": lanes, "steps": steps, "lower_bound": not glitches,
        "tick": tick * 1e12 if glitches else 0.0,
    }  # fmt: skip


def _running(module: Module, netlist: Netlist, inputs: Inputs, steps: int) -> np.ndarray:
    """[registers, steps]: whether a register's clock runs."""
    running = np.ones((len(netlist.registers), steps), np.bool_)
    for name, when in module.gated.items():
        nets = {net for net, own in netlist.names.items() if own.startswith(name)}
        for i, register in enumerate(netlist.registers):
            if nets & {register.state, *register.outputs.values()}:
                running[i] = when(inputs)
    return running


def _parts(
    netlist: Netlist, library: Library, counts: Toggles, load: np.ndarray, lanes: int, steps: int
) -> dict[str, float]:
    """Joules a step by kind."""
    square = library.voltage**2
    per_edge = counts.rises + counts.falls
    found = dict.fromkeys(("clock", "registers", "logic", "inputs"), 0.0)
    for nets in netlist.inputs.values():
        found["inputs"] += float((per_edge[nets] * load[nets]).sum()) * square / 2
    for gate in netlist.gates:
        found["logic"] += _driven(library.cell(gate.kind), gate.output, gate.target, counts, load, square)
    for register in netlist.registers:
        cell = library.cell(register.kind)
        for pin, net in register.outputs.items():
            found["registers"] += _driven(cell, pin, net, counts, load, square)
    scale = 1.0 / (lanes * (steps - 1))
    found = {name: value * scale for name, value in found.items()}
    return {**found, "clock": _clocked(netlist, library, counts.seen) / (lanes * steps)}


def _clocked(netlist: Netlist, library: Library, all_seen: np.ndarray) -> float:
    """Joules of all clock pins over the whole run."""
    total = 0.0
    for register, seen in zip(netlist.registers, all_seen, strict=True):
        cell = library.cell(register.kind)
        total += float(seen.sum()) * cell.capacitance.get(register.clock, 0.0) * library.voltage**2
        total += sum(
            float(count) * _clock(cell, register.clock, bool(state >> 1), bool(state & 1))
            for state, count in enumerate(seen)
        )
    return total


def _driven(cell: Cell, pin: str, net: int, counts: Toggles, load: np.ndarray, square: float) -> float:
    """Joules of a driver's output over the whole run."""
    rise, fall = (_internal(cell, pin, edge, load[net]) for edge in ("rise", "fall"))
    own = load[net] * square / 2
    return float(counts.rises[net]) * (own + rise) + float(counts.falls[net]) * (own + fall)


def _internal(cell: Cell, pin: str, edge: str, load: float) -> float:
    """The mean internal energy of an output's edge over its causes and conditions."""
    values = [
        table.at(SLEW, load)
        for power in cell.power
        if power.pin == pin and power.related and not _asynchronous(cell, power)
        if (table := getattr(power, edge)) is not None
    ]
    return float(np.mean(values)) if values else 0.0


def _asynchronous(cell: Cell, power: Power) -> bool:
    """Whether an output's entry is about a clear or preset."""
    return cell.flip_flop is not None and cell.flip_flop.clock not in power.related.split()


def _clock(cell: Cell, clock: str, d: bool, q: bool) -> float:
    """Internal energy of both edges of a clock pin while D and Q are what they are."""
    inside = cell.flip_flop
    assert inside is not None
    outputs = {pin: (q if tree == inside.state else not q) for pin, tree in cell.outputs.items()}
    given = {**dict.fromkeys(cell.capacitance, True), **dict.fromkeys(logic.names(inside.next_state), d), **outputs}
    for tree in (inside.clear, inside.preset):
        for name in logic.names(tree) if tree is not None else ():
            given[name] = not logic.value(tree, {**given, name: True})  # type: ignore[arg-type]
    if inside.next_state == ("not", logic.names(inside.next_state)[0]):
        given[logic.names(inside.next_state)[0]] = not d
    entries = [power for power in cell.power if power.pin == clock]
    total = 0.0
    for level, edge in ((True, "rise"), (False, "fall")):
        given[clock] = level
        total += _conditional(entries, edge, given)
    return total


def _conditional(entries: list[Power], edge: str, given: dict[str, bool]) -> float:
    """The table whose condition holds; else the one without; else nothing."""
    plain: Table | None = None
    for power in entries:
        table = getattr(power, edge)
        if table is None:
            continue
        if power.when is None:
            plain = table
        elif set(logic.names(power.when)) <= given.keys() and logic.value(power.when, given):
            return table.at(SLEW, 0.0)
    return plain.at(SLEW, 0.0) if plain is not None else 0.0


def _leakage(netlist: Netlist, library: Library) -> float:
    """Watts."""
    cells = {gate.name: gate.kind for gate in netlist.gates} | {r.name: r.kind for r in netlist.registers}
    return sum(library.cell(kind).leakage for kind in cells.values())
