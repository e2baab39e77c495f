"""Stuck-at faults: whether the vectors would show a gate that is broken."""

from collections.abc import Callable, Sequence

import numpy as np

from recoup.gates.module import Inputs, Module
from recoup.silicon import fault_kernels as kernels
from recoup.silicon.kernels import ONES
from recoup.silicon.netlist import Netlist, first_states
from recoup.silicon.words import packed

ROUNDS = (1 << 14, 1 << 17, 1 << 19, 1 << 21)
"""Vectors of a round; a later one tries what the earlier ones did not show, unless enough is shown."""
MOST = 10**11
"""Gates times faults times words of vectors that a later round may have; with more it takes hours and is not made."""
MEMORY, WORDS = 1 << 27, 8
"""Bytes that the values of all nets in all steps may take, and the words that are tried at once at the most."""


def cover(
    module: Module,
    netlist: Netlist,
    draw: Callable[[int], Inputs | None],
    generator: np.random.Generator,
    rounds: Sequence[int],
    enough: float,
) -> tuple[int, tuple[str, ...]]:
    """Try every gate's and register's output stuck at 0 and at 1.

    Args:
        module: says at which steps which outputs are looked at.
        netlist: without fault; its outputs are the truth here.
        draw: vectors of so many lanes; None: the netlist is wrong on them, and there is nothing to try.
        generator: of the registers' first states.
        rounds: how many vectors each has; one after the first is left out where it would take more than `MOST`.
        enough: the share of the faults at which no further round is made.

    Returns:
        How many faults were tried, and those that no watched output shows, as "name stuck at 0".
    """
    nets = list(dict.fromkeys([gate.target for gate in netlist.gates] + [r.state for r in netlist.registers]))
    sites = np.repeat(np.array(nets, np.int64), 2)
    stuck = np.tile(np.array([0, ONES], np.uint64), len(nets))
    tried = len(sites)
    for number, vectors in enumerate(rounds):
        if number and len(sites) * len(netlist.gates) * (vectors // 64) > MOST:
            break
        lanes = -(-vectors // (64 * module.steps)) * 64  # whole words: a spare lane would run no schedule
        inputs = draw(lanes)
        if inputs is None:
            return 0, ()
        missed = _missed(module, netlist, inputs, generator, sites, stuck)
        sites, stuck = sites[missed], stuck[missed]
        if len(sites) <= (1 - enough) * tried:
            break
    named = [
        f"{netlist.names.get(int(net), f'net {net}')} stuck at {int(level != 0)}"
        for net, level in zip(sites, stuck, strict=True)
    ]
    return tried, tuple(named)


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
