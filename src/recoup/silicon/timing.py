"""Static timing of a mapped netlist: own arrival times from the library's tables.

Rising and falling edges apart, slews and loads propagated, the unateness of every arc, setup at registers. Input ports
and clock have slew 0 and arrive at 0; paths from input ports count.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from recoup.errors import RecoupError
from recoup.silicon.cells import Arc, Library
from recoup.silicon.netlist import Netlist, Register

Wires = str | float | None
"""Capacitance of wires: None (pins alone), "library" (its default wire load), or farads per fan-out."""


@dataclass(frozen=True, slots=True)
class Delay:
    """The shortest clock period of a module, or the longest way through it.

    Attributes:
        module: its title.
        ns: nanoseconds.
        path: nets of the longest path, from its start to its end.
        ends: "setup" of a register, or "output".
        wires: what capacitance wires have: "none", the library's wire load by name, or a figure.
        tool, liberty: what measured it; file name and sha256 of each library file.
    """

    module: str
    ns: float
    path: tuple[str, ...]
    ends: str
    wires: str
    tool: str
    liberty: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(slots=True)
class Arrivals:
    """Per net: latest arrival and slew of its rise (0) and fall (1), s; where it comes from; delay of each gate, s."""

    time: np.ndarray
    slew: np.ndarray
    source: dict[tuple[int, int], tuple[int, int]]
    load: np.ndarray
    gate_delay: np.ndarray
    register_delay: dict[int, float]


def loads(netlist: Netlist, library: Library, wires: Wires) -> np.ndarray:
    """Capacitance of every net: pins, and wires if asked for. F."""
    total, fanout = np.zeros(netlist.nets), np.zeros(netlist.nets, np.int64)
    drawn = {gate.name: (gate.kind, gate.pins) for gate in netlist.gates}
    drawn |= {register.name: (register.kind, register.pins) for register in netlist.registers}
    for kind, pins in drawn.values():
        capacitance = library.cell(kind).capacitance
        for pin, net in pins.items():
            if pin in capacitance:
                total[net] += capacitance[pin]
                fanout[net] += 1
    if wires is None:
        return total
    if wires == "library":
        return total + library.wire_capacitance(fanout)
    if isinstance(wires, str | bool) or wires < 0:
        raise RecoupError(f"wires={wires!r}: must be None, 'library', or farads per fan-out")
    return total + fanout * float(wires)


def arrivals(netlist: Netlist, library: Library, wires: Wires = None) -> Arrivals:
    """Latest arrivals at every net."""
    n = netlist.nets
    found = Arrivals(
        np.full((n, 2), -np.inf), np.zeros((n, 2)), {}, loads(netlist, library, wires), np.zeros(len(netlist.gates)), {}
    )
    for nets in netlist.inputs.values():
        found.time[nets] = 0.0
    for register in netlist.registers:
        for arc in library.cell(register.kind).arcs:
            net = register.outputs.get(arc.target)
            if arc.edge and net is not None:
                found.register_delay[net] = _register(found, net, arc)
    for i, gate in enumerate(netlist.gates):
        delays = [
            delay
            for arc in library.cell(gate.kind).arcs
            if arc.target == gate.output and arc.source in gate.pins
            for delay in _through(found, gate.pins[arc.source], gate.target, arc)
        ]
        found.gate_delay[i] = np.mean(delays) if delays else 0.0
    return found


def _register(found: Arrivals, net: int, arc: Arc) -> float:
    load, delays = found.load[net], []
    for edge, (delay, slew) in enumerate(((arc.rise, arc.rise_slew), (arc.fall, arc.fall_slew))):
        if delay is not None:
            value = delay.at(0.0, load)
            delays.append(value)
            if value > found.time[net, edge]:
                found.time[net, edge] = value
                found.slew[net, edge] = slew.at(0.0, load) if slew else 0.0
    return float(np.mean(delays)) if delays else 0.0


def _through(found: Arrivals, source: int, target: int, arc: Arc) -> list[float]:
    """Propagate one arc; its delays."""
    load, delays = found.load[target], []
    for edge, (delay, slew) in enumerate(((arc.rise, arc.rise_slew), (arc.fall, arc.fall_slew))):
        if delay is None:
            continue
        causes = {"positive_unate": (edge,), "negative_unate": (1 - edge,)}.get(arc.sense, (0, 1))
        for cause in causes:
            start = found.time[source, cause]
            if start == -np.inf:
                continue
            step = delay.at(found.slew[source, cause], load)
            delays.append(step)
            if start + step > found.time[target, edge]:
                found.time[target, edge] = start + step
                found.source[(target, edge)] = (source, cause)
            if slew is not None:
                found.slew[target, edge] = max(found.slew[target, edge], slew.at(found.slew[source, cause], load))
    return delays


def longest(netlist: Netlist, library: Library, wires: Wires = None) -> tuple[float, tuple[str, ...], str]:
    """Seconds, the nets of the longest path, and what it ends at."""
    found = arrivals(netlist, library, wires)
    ends = [
        (found.time[net, edge], net, edge, "output")
        for nets in netlist.outputs.values()
        for net in nets
        for edge in (0, 1)
    ]
    for register in netlist.registers:
        ends += _setups(found, register, library)
    worst = max(ends, key=lambda end: end[0], default=(0.0, 0, 0, "output"))
    if worst[0] == -np.inf:
        return 0.0, (), "output"
    path, place = [], (worst[1], worst[2])
    while True:
        path.append(netlist.names.get(place[0], f"net {place[0]}"))
        if place not in found.source:
            return float(worst[0]), tuple(reversed(path)), worst[3]
        place = found.source[place]


def _setups(found: Arrivals, register: Register, library: Library) -> list[tuple[float, int, int, str]]:
    ends = []
    for pin, tables in library.cell(register.kind).setup.items():
        net = register.pins.get(pin)
        if net is None or net < 2:
            continue
        for edge, table in enumerate(tables):
            if table is not None and found.time[net, edge] > -np.inf:
                # a constraint's axes are the slews of the data or of the clock, by the library's template
                ends.append(
                    (found.time[net, edge] + table.at(*table.order(0.0, found.slew[net, edge])), net, edge, "setup")
                )
    return ends
