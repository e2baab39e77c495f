"""Which codes registers can hold: reached by simulation from zero, and proved closed by a SAT solver.

A sum of small integers holds no odd multiple of half, one of two bits no third binade: gates for those are redundant.
Simulation from the codes known so far, with operands that occur and any control, finds further ones; then the solver
is asked for a cycle that leaves them, which is one more code, until it proves that there is none. Where that takes too
long, and for registers of more than 14 bits, the codes of the format are asked alone: if zero is one of them and they
are proved to stay among themselves, they hold.
"""

from collections.abc import Sequence

import numpy as np

from recoup.gates.module import Module, Port
from recoup.silicon import fault_kernels, vectors
from recoup.silicon.cycle import Clauses, Cycle, never
from recoup.silicon.netlist import Netlist
from recoup.silicon.words import packed

__all__ = ["reached"]

WIDEST, GROWN = 18, 14
"""Bits of a register whose codes are listed, and of one whose codes are looked for by simulation."""
LANES, QUIET, MOST, ASKED = 1 << 14, 8, 200, 100
"""Runs of a round; rounds without a new code after which the solver is asked; all rounds; its answers."""


def reached(module: Module, netlist: Netlist, cycle: Cycle) -> Clauses:
    """Clauses that hold of the states of the module's ``held`` registers, once a run has begun from zero.

    Args:
        module: the module.
        netlist: its netlist.
        cycle: its cycle, with clauses of which operands occur.
    """
    ports = [port for port in module.held if _counted(port, netlist, cycle)]
    if not ports:
        return []
    nets = [netlist.held[port.name] for port in ports]
    found = _grown(module, netlist, cycle, nets) if max(map(len, nets)) <= GROWN else None
    if found is None:
        found = _format(cycle, ports, nets)
    return [clause for codes, own in zip(found, nets, strict=True) for clause in never(~codes, own)]


def _counted(port: Port, netlist: Netlist, cycle: Cycle) -> bool:
    nets = netlist.held.get(port.name)
    return nets is not None and len(nets) <= WIDEST and all(net in cycle.next for net in nets)


def _grown(module: Module, netlist: Netlist, cycle: Cycle, nets: list[list[int]]) -> list[np.ndarray] | None:
    """The codes reached of each register, [2^bits]; None: not proved to be all within bounds."""
    generator = np.random.default_rng(0)
    codes = [np.arange(1 << len(own)) == _zero(own) for own in nets]
    quiet = 0
    for _ in range(MOST):
        quiet = 0 if _step(module, netlist, cycle, nets, codes, generator) else quiet + 1
        if quiet == QUIET:
            break
    for _ in range(ASKED):
        holds = [never(~known, own) for known, own in zip(codes, nets, strict=True)]
        now = [clause for clauses in holds for clause in clauses]
        new = False
        for known, own, clauses in zip(codes, nets, holds, strict=True):
            answer = cycle.ask([*now, *cycle.leaves(own, clauses)]) if clauses else False
            if answer is None:
                return None
            if isinstance(answer, list):
                literals = [cycle.next[net] for net in own]
                known[sum((answer[abs(v)] == (v > 0)) << i for i, v in enumerate(literals))] = new = True
        if not new:
            return codes
        _step(module, netlist, cycle, nets, codes, generator)
    return None


def _step(
    module: Module,
    netlist: Netlist,
    cycle: Cycle,
    nets: list[list[int]],
    codes: list[np.ndarray],
    generator: np.random.Generator,
) -> bool:
    """A cycle from states of known codes: marks those that follow. Whether there are new ones."""
    inputs = {port.name: vectors.drawn(port, 1, LANES, generator) for port in module.inputs}
    words = packed(module, inputs)
    states, loaded = netlist.states
    initial = generator.integers(0, 1 << 64, (len(states), words.shape[2]), dtype=np.uint64)
    register = {state + 1: i for i, state in enumerate(states.tolist())}
    for own, known in zip(nets, codes, strict=True):
        before = generator.choice(np.flatnonzero(known), LANES)
        for i, literal in enumerate(cycle.state[net] for net in own):
            column = np.packbits((before >> i & 1).astype(np.uint8), bitorder="little").view("<u8")
            if abs(literal) in register:  # no constant
                initial[register[abs(literal)]] = column if literal > 0 else ~column
    good = np.empty((1, netlist.nets, words.shape[2]), np.uint64)
    fault_kernels.traced(netlist.program, netlist.input_nets, words, states, loaded, initial, good)
    new = False
    for own, found in zip(nets, codes, strict=True):
        after = np.zeros(LANES, np.int64)
        for i, literal in enumerate(cycle.next[net] for net in own):
            values = good[0, abs(literal) - 1]
            plane = np.unpackbits((values if literal > 0 else ~values).view(np.uint8), bitorder="little")
            after |= plane.astype(np.int64) << i
        new |= not bool(found[after].all())
        found[after] = True
    return new


def _zero(nets: list[int]) -> int:
    """The code that a sum begins from: 0, but for bits that are constant."""
    return sum(1 << i for i, net in enumerate(nets) if net == 1)


def _format(cycle: Cycle, ports: Sequence[Port], nets: list[list[int]]) -> list[np.ndarray]:
    """The codes of each register's format where they stay among themselves, together with those of the others."""
    codes = []
    for port, own in zip(ports, nets, strict=True):
        occur = np.ones(1 << len(own), bool)
        if port.legal is not None and port.complete:
            occur[:] = False
            occur[vectors.codes(port)] = occur[_zero(own)] = True
        codes.append(occur)
    while True:
        holds = [never(~known, own) for known, own in zip(codes, nets, strict=True)]
        now = [clause for clauses in holds for clause in clauses]
        broken = [
            known
            for known, own, clauses in zip(codes, nets, holds, strict=True)
            if clauses and cycle.ask([*now, *cycle.leaves(own, clauses)]) is not False
        ]
        if not broken:
            return codes
        for known in broken:
            known[:] = True
