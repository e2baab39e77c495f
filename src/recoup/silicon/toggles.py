"""How often nets toggle on given operands: with zero delay, or with inertial delay in ticks, glitches included."""

from dataclasses import dataclass

import numpy as np

from recoup.errors import RecoupError
from recoup.silicon import kernels
from recoup.silicon.netlist import Netlist
from recoup.silicon.timing import Arrivals

MEMORY = 4 << 30
"""Bytes that the waves of one step may take."""


@dataclass(frozen=True, slots=True)
class Toggles:
    """Rises and falls of every net over all lanes and steps but the first, and registers by 2 D + Q at their clocks."""

    rises: np.ndarray
    falls: np.ndarray
    seen: np.ndarray


def toggles(
    netlist: Netlist, words: np.ndarray, initial: np.ndarray, running: np.ndarray, delays: Arrivals | None, tick: float
) -> Toggles:
    """Simulate ``words`` [steps, input bits, words]; ``delays`` None: zero delay.

    Raises:
        RecoupError: a step of more ticks than there is memory for.
    """
    n = netlist.nets
    found = Toggles(np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros((len(netlist.registers), 4), np.int64))
    states, loaded = netlist.states
    common = (netlist.nets, netlist.input_nets, words, states, loaded, initial)
    if delays is None:
        kernels.zero_delay(netlist.program, *common, running, found.rises, found.falls, found.seen)
        return found
    targets = np.array([gate.target for gate in netlist.gates], np.int64)
    ticks = np.maximum(1, np.rint(delays.gate_delay / tick)).astype(np.int64)
    starts = np.zeros(n, np.int64)
    for net, seconds in delays.register_delay.items():
        starts[net] = max(1, round(seconds / tick))
    low, high = _windows(netlist, ticks, starts)
    if 8 * n * int(high.max()) > MEMORY:
        raise RecoupError(
            f"energy: the longest path takes {high.max() * tick * 1e9:,.0f} ns, {high.max():,} ticks of "
            f"{tick * 1e12:g} ps for each of {n:,} nets, which need more than {MEMORY >> 30} GiB; take a larger tick, "
            "glitches=False, or a library whose tables reach as far as this module's loads"
        )
    kernels.inertial(
        netlist.program, netlist.first, targets, ticks, low, high, *common, starts, running,
        found.rises, found.falls, found.seen,
    )  # fmt: skip
    return found


def _windows(netlist: Netlist, ticks: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ticks between which every net can change."""
    low, high = starts.copy(), starts.copy()
    for gate, delay in zip(netlist.gates, ticks, strict=True):
        nets = [net for net in gate.pins.values() if net > 1 and net != gate.target] or [0]
        low[gate.target] = min(low[net] for net in nets) + delay
        high[gate.target] = max(high[net] for net in nets) + delay
    return low, high
