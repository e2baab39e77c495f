"""Stuck-at faults: whether the vectors would show a gate that is broken."""

from collections.abc import Callable, Sequence

import numpy as np

from recoup.gates.module import Inputs, Module
from recoup.silicon import fault_kernels as kernels
from recoup.silicon.kernels import ONES
from recoup.silicon.netlist import Netlist, first_states
from recoup.silicon.redundant import redundant
from recoup.silicon.words import packed

ROUNDS = (1 << 14, 1 << 17, 1 << 19, 1 << 21, 1 << 22)
"""Vectors of a round; a later one tries what the earlier ones did not show, unless enough is shown."""
MOST = 10**12
"""Gates times faults times words of vectors that a later round may have; with more it takes hours and is not made."""
FEW, EASY, HARD = 3, 3 * 10**6, 10**7
"""Rounds after which the faults that are left are asked to be proved redundant where they times gates are no more than
the second; up to the third only after the last round, with more not at all: a proof takes up to seconds."""
MEMORY, WORDS = 1 << 27, 8
"""Bytes that the values of all nets in all steps may take, and the words that are tried at once at the most."""


def cover(
    module: Module,
    netlist: Netlist,
    draw: Callable[[int], Inputs | None],
    generator: np.random.Generator,
    rounds: Sequence[int],
    enough: float,
) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    """Try every gate's and register's output stuck at 0 and at 1.

    Where the vectors do not show enough, those that they miss are asked to be proved redundant.

    Args:
        module: says at which steps which outputs are looked at.
        netlist: without fault; its outputs are the truth here.
        draw: vectors of so many lanes; None: the netlist is wrong on them, and there is nothing to try.
        generator: of the registers' first states.
        rounds: how many vectors each has; one after the first is left out where it would take more than `MOST`.
        enough: the share of the faults at which no further round is made.

    Returns:
        How many faults were tried; those that no watched output shows, as "name stuck at 0"; and those that none can.
    """
    nets = list(dict.fromkeys([gate.target for gate in netlist.gates] + [r.state for r in netlist.registers]))
    sites = np.repeat(np.array(nets, np.int64), 2)
    stuck = np.tile(np.array([0, ONES], np.uint64), len(nets))
    left, never, asked = np.arange(len(sites)), np.zeros(len(sites), bool), False
    for number, vectors in enumerate(rounds):
        if number and _enough(left, never, enough):
            break
        if number == FEW and len(left) * len(netlist.gates) <= EASY:
            left, asked = _provable(module, netlist, sites, stuck, left, never), True
        if number and (_enough(left, never, enough) or len(left) * len(netlist.gates) * (vectors // 64) > MOST):
            break
        lanes = -(-vectors // (64 * module.steps)) * 64  # whole words: a spare lane would run no schedule
        inputs = draw(lanes)
        if inputs is None:
            return 0, (), ()
        left = left[_missed(module, netlist, inputs, generator, sites[left], stuck[left])]
    if not asked and not _enough(left, never, enough) and len(left) * len(netlist.gates) <= HARD:
        left = _provable(module, netlist, sites, stuck, left, never)

    def named(which: np.ndarray) -> tuple[str, ...]:
        pairs = zip(sites[which].tolist(), stuck[which].tolist(), strict=True)
        return tuple(f"{netlist.names.get(net, f'net {net}')} stuck at {int(level != 0)}" for net, level in pairs)

    return len(sites), named(left), named(np.flatnonzero(never))


def _enough(left: np.ndarray, never: np.ndarray, enough: float) -> bool:
    return bool(len(left) <= (1 - enough) * (len(never) - never.sum()))


def _provable(
    module: Module, netlist: Netlist, sites: np.ndarray, stuck: np.ndarray, left: np.ndarray, never: np.ndarray
) -> np.ndarray:
    """Marks in ``never`` what is proved redundant of the faults that are left; what is left then."""
    never[left] = redundant(module, netlist, sites[left], stuck[left])
    return left[~never[left]]


def _missed(
    module: Module,
    netlist: Netlist,
    inputs: Inputs,
    generator: np.random.Generator,
    sites: np.ndarray,
    stuck: np.ndarray,
) -> np.ndarray:
    """Which of the faults no watched output shows."""
    words = packed(module, inputs)
    initial = first_states(module, netlist, inputs, generator)
    watched = np.zeros((len(words), netlist.nets), np.bool_)
    expected = module.letter(inputs)
    for port in module.shown:
        if port.name in expected:
            bits = np.repeat(expected[port.name].looked_at(port), port.element, axis=1)
            for step, row in zip(expected[port.name].at, bits, strict=True):
                watched[step, np.array(netlist.shown[port.name])[row]] = True
    watched[:, :2] = False  # constants: an output tied to one shows nothing
    missed = np.ones(len(sites), np.bool_)
    states, loaded = netlist.states
    fan = (*_by_net(netlist.nets, netlist.program[:, 2:4]), *_by_net(netlist.nets, loaded[:, None]))
    most = int(np.clip(MEMORY // (8 * len(words) * netlist.nets), 1, WORDS))
    for start in range(0, words.shape[2], most):
        part = slice(start, start + most)
        given, first = (np.ascontiguousarray(v[..., part]) for v in (words, initial))
        good = np.empty((len(words), netlist.nets, given.shape[2]), np.uint64)
        kernels.traced(netlist.program, netlist.input_nets, given, states, loaded, first, good)
        kernels.undetected(netlist.program, *fan, states, good, watched, sites, stuck, missed)
    return missed


def _by_net(nets: int, read: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows by the nets that they read: where each net's begin, and one more; the rows."""
    rows = np.repeat(np.arange(len(read)), read.shape[1])
    order = np.argsort(read.ravel(), kind="stable")
    first = np.searchsorted(read.ravel()[order], np.arange(nets + 1))
    return first.astype(np.int64), rows[order].astype(np.int64)
