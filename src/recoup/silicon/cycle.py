"""A clock cycle of a netlist as clauses for a SAT solver (python-sat)."""

import importlib
from collections import defaultdict
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np

from recoup.errors import RecoupError
from recoup.gates.module import PIP
from recoup.silicon.kernels import AND, COPY, NAND, NOR, NOT, OR, XNOR, XOR
from recoup.silicon.netlist import Netlist

__all__ = ["Clauses", "Cycle", "never"]

CONFLICTS = 200_000
"""What the solver has not decided after so many is open."""
_INVERTED = {NOT: COPY, NAND: AND, NOR: OR, XNOR: XOR}

Clauses = list[list[int]]


class Cycle:
    """A clock cycle: variable n + 1 is net n.

    Attributes:
        clauses: what holds of the cycle; more may be added.
        state, next: literals of what a register holds and of what it becomes, by the nets that show it.
    """

    def __init__(self, netlist: Netlist) -> None:
        self.rows = [tuple(int(v) for v in row[:4]) for row in netlist.program]
        self.variables = netlist.nets
        states, loaded = (nets.tolist() for nets in netlist.states)
        self.seen = list(dict.fromkeys([*netlist.output_nets.tolist(), *loaded]))
        self.readers: dict[int, list[int]] = defaultdict(list)
        for i, (_, _, a, b) in enumerate(self.rows):
            for net in {a, b}:
                self.readers[net].append(i)
        self.state = {0: 1, 1: 2} | {state: state + 1 for state in states}
        self.next = {0: 1, 1: 2} | {state: net + 1 for state, net in zip(states, loaded, strict=True)}
        for code, target, a, _ in self.rows:  # a register's other output, and inverters behind it
            if code in (COPY, NOT) and a in self.next and target not in self.next:
                for known in (self.state, self.next):
                    known[target] = known[a] if code == COPY else -known[a]
        self.clauses: Clauses = [[-1], [2]]
        for code, target, a, b in self.rows:
            self.clauses += _gate(code, target + 1, a + 1, b + 1)

    def variable(self) -> int:
        """A new one."""
        self.variables += 1
        return self.variables

    def ask(self, clauses: Clauses) -> list[bool] | bool | None:
        """Values of all variables for which the cycle's clauses and these are true.

        Returns:
            By number, the first of no meaning; False: it is proved that there are none; None: not decided.
        """
        with _solver([*self.clauses, *clauses]) as solver:  # a new one: what it simplifies at first is most of the way
            solver.conf_budget(CONFLICTS)
            answer = solver.solve_limited()
            return [False, *(literal > 0 for literal in solver.get_model())] if answer else answer

    def leaves(self, nets: list[int], clauses: Clauses) -> Clauses:
        """Clauses: the next state of registers breaks one of some clauses on their nets."""
        following = {net + 1: self.next[net] for net in nets}
        found: Clauses = []
        broken = []
        for clause in clauses:
            broken.append(self.variable())
            for literal in clause:
                after = following[abs(literal)]
                found.append([-broken[-1], -after if literal > 0 else after])
        return [*found, broken]

    def differs(self, site: int, level: bool) -> Clauses:
        """Clauses: what is seen differs where a net is stuck. The gates behind it are there twice, right and faulty."""
        faulty = {site: 2 if level else 1}
        rows = list(self.readers[site])
        heapify(rows)
        waiting, clauses = set(rows), []
        while rows:
            code, target, a, b = self.rows[heappop(rows)]
            if target == site:
                continue
            faulty[target] = self.variable()
            clauses += _gate(code, faulty[target], faulty.get(a, a + 1), faulty.get(b, b + 1))
            for row in self.readers[target]:
                if row not in waiting:
                    waiting.add(row)
                    heappush(rows, row)
        differ = []
        for net in self.seen:
            if net in faulty:
                differ.append(self.variable())
                clauses += [[-differ[-1], net + 1, faulty[net]], [-differ[-1], -net - 1, -faulty[net]]]
        return [*clauses, differ]


def never(codes: np.ndarray, nets: list[int]) -> Clauses:
    """Clauses: nets, lowest bit first, hold no code that is True in ``codes``, [2^nets]."""
    return [[-(nets[i] + 1) if one else nets[i] + 1 for i, one in cube] for cube in _cubes(codes, len(nets))]


def _cubes(codes: np.ndarray, bits: int) -> list[list[tuple[int, bool]]]:
    """Cubes of (bit, its value) that cover the codes: as few as taking bits from the highest gives."""
    if not codes.any():
        return []
    if codes.all():
        return [[]]
    top = bits - 1
    low, high = codes[: 1 << top], codes[1 << top :]
    both = low & high
    found = _cubes(both, top)
    for one, half in ((False, low), (True, high)):
        found += [[(top, one), *cube] for cube in _cubes(half & ~both, top)]
    return found


def _gate(code: int, out: int, x: int, y: int) -> Clauses:
    """Clauses: an operation of `recoup.silicon.kernels` and its value agree."""
    if code in _INVERTED:
        code, out = _INVERTED[code], -out
    if code == AND:
        return [[-out, x], [-out, y], [out, -x, -y]]
    if code == OR:
        return [[out, -x], [out, -y], [-out, x, y]]
    if code == XOR:
        return [[-out, x, y], [-out, -x, -y], [out, -x, y], [out, x, -y]]
    assert code == COPY
    return [[-out, x], [out, -x]]


def _solver(clauses: Clauses) -> Any:
    try:
        return importlib.import_module("pysat.solvers").Cadical153(bootstrap_with=clauses)
    except ImportError as error:
        raise RecoupError(f"silicon proves faults redundant with python-sat ({error}): {PIP}") from error
