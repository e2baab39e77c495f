"""Stuck-at faults that nothing can show, proved by a SAT solver: they are no fault of the vectors.

A fault is redundant where in one clock cycle no operands and no state of the registers make any output, probe or next
state of a register differ: then no run does, of any length, whose sums began from zero. Operands are codes that occur
at their ports, where all of these are known; the registers of `Module.held` hold codes that they can hold
(`recoup.silicon.reached`), all others anything.
"""

import numpy as np

from recoup.gates.module import Module
from recoup.silicon import vectors
from recoup.silicon.cycle import Clauses, Cycle, never
from recoup.silicon.netlist import Netlist
from recoup.silicon.reached import reached

__all__ = ["redundant"]

WIDEST = 18
"""Bits of a port whose codes are listed; what is wider takes anything here, and less is proved."""


def redundant(module: Module, netlist: Netlist, sites: np.ndarray, stuck: np.ndarray) -> np.ndarray:
    """Which of some faults nothing can show.

    Args:
        module: says which codes occur.
        netlist: without fault.
        sites: nets.
        stuck: what each is stuck at, zero or not.

    Returns:
        A bool for each; False also where it was not decided.

    Raises:
        RecoupError: the solver is not installed.
    """
    cycle = Cycle(netlist)
    cycle.clauses += _inputs(module, netlist)
    cycle.clauses += reached(module, netlist, cycle)
    if not isinstance(cycle.ask([]), list):  # what contradicts itself would prove anything
        return np.zeros(len(sites), bool)
    pairs = zip(sites.tolist(), stuck.tolist(), strict=True)
    return np.array([cycle.ask(cycle.differs(net, level != 0)) is False for net, level in pairs], bool)


def _inputs(module: Module, netlist: Netlist) -> Clauses:
    """Clauses: operands are codes that occur."""
    found: Clauses = []
    for port in module.inputs:
        if port.legal is None or not port.complete or port.element > WIDEST:
            continue
        codes = np.ones(1 << port.element, bool)
        codes[vectors.codes(port)] = False
        nets = netlist.inputs[port.name]
        for first in range(0, port.width, port.element):
            found += never(codes, nets[first : first + port.element])
    return found
