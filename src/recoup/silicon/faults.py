"""Stuck-at faults: whether the vectors would show a gate that is broken."""

from collections.abc import Callable, Sequence

import numpy as np

from recoup.gates.module import Inputs, Module
from recoup.silicon import kernels
from recoup.silicon.netlist import Netlist, first_states
from recoup.silicon.words import packed

ROUNDS = (1 << 14, 1 << 17, 1 << 21)
"""Vectors of a round; a later one tries what the earlier ones did not show, unless enough is shown."""
MOST = 10**10
"""Gates times faults times words of vectors that a later round may have; with more it takes hours and is not made."""


def cover(
    module: Module,
    netlist: Netlist,
    draw: Callable[[int], Inputs],
    generator: np.random.Generator,
    rounds: Sequence[int],
    enough: float,
) -> tuple[int, tuple[str, ...]]:
    """Try every gate's and register's output stuck at 0 and at 1.

    Args:
        module: says at which steps which outputs are looked at.
        netlist: without fault; its outputs are the truth here.
        draw: vectors of so many lanes.
        generator: of the registers' first states.
        rounds: how many vectors each has; one after the first is left out where it would take more than `MOST`.
        enough: the share of the faults at which no further round is made.

    Returns:
        How many faults were tried, and those that no watched output shows, as "name stuck at 0".
    """
    nets = list(dict.fromkeys([gate.target for gate in netlist.gates] + [r.state for r in netlist.registers]))
    sites = np.repeat(np.array(nets, np.int64), 2)
    stuck = np.tile(np.array([0, kernels.ONES], np.uint64), len(nets))
    tried = len(sites)
    for number, vectors in enumerate(rounds):
        if number and len(sites) * len(netlist.gates) * (vectors // 64) > MOST:
            break
        lanes = max(64, -(-vectors // module.steps))
        missed = _missed(module, netlist, draw(lanes), generator, sites, stuck)
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
    good = netlist.run(words, initial)
    watched = np.zeros(good.shape[:2], np.bool_)
    place = 0
    expected = module.letter(inputs)
    for port in module.outputs:
        if port.name in expected:
            bits = np.repeat(expected[port.name].looked_at(port), port.element, axis=1)
            for step, row in zip(expected[port.name].at, bits, strict=True):
                watched[step, place : place + port.width] |= row
        place += port.width
    missed = np.ones(len(sites), np.bool_)
    kernels.undetected(
        netlist.program, netlist.nets, netlist.input_nets, words, netlist.output_nets, good, watched,
        *netlist.states, initial, sites, stuck, missed,
    )  # fmt: skip
    return missed
