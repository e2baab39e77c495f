"""Faults are followed gate by gate; a netlist with the fault written into it shows the same."""

import numpy as np
import pytest

pytest.importorskip("amaranth")

from recoup.gates.module import Module
from recoup.silicon import faults, vectors
from recoup.silicon.kernels import ONES, simulate
from recoup.silicon.measured import Measured
from recoup.silicon.netlist import Netlist, first_states
from recoup.silicon.words import packed
from tests.silicon.test_verify import MUL, SUM, in_turn


def rebuilt(module: Module, netlist: Netlist, inputs: dict, seed: int) -> dict[tuple[int, int], bool]:
    """By fault, whether a watched output differs, where the whole netlist is simulated with the net held."""
    words = packed(module, inputs)
    initial = first_states(module, netlist, inputs, np.random.default_rng(seed))
    good = netlist.run(words, initial)
    watched = np.zeros(good.shape[:2], bool)
    place = 0
    for port in module.outputs:
        expected = module.letter(inputs)[port.name]
        mask = np.repeat(expected.looked_at(port), port.element, axis=1)
        watched[list(expected.at), place : place + port.width] = mask
        place += port.width
    states, loaded = netlist.states
    found = {}
    for net in dict.fromkeys([g.target for g in netlist.gates] + states.tolist()):
        for level in (0, 1):

            def held(nets: np.ndarray, net: int = net, level: int = level) -> np.ndarray:
                return np.where(nets == net, level, nets).astype(np.int32)

            program = np.column_stack([netlist.program[:, :2], held(netlist.program[:, 2:])])
            seen = np.empty_like(good)
            simulate(np.ascontiguousarray(program), netlist.nets, netlist.input_nets, words, held(netlist.output_nets),
                     seen, states, held(loaded), initial)  # fmt: skip
            found[net, level] = bool(((seen ^ good).any(axis=2) & watched).any())
    return found


@pytest.mark.parametrize("words", [1, 8])
@pytest.mark.parametrize("module", [MUL, SUM, in_turn(np.eye(2, dtype=bool))], ids=lambda module: module.name)
def test_the_faults_that_are_shown_are_those_of_netlists_with_them(module, words, monkeypatch):
    monkeypatch.setattr(faults, "WORDS", words)
    netlist = Measured.of(module).netlist()
    inputs = dict(vectors.structured(module, 70 if module is not SUM else 130, np.random.default_rng(1)))
    for name in inputs:  # few vectors: some faults must be missed
        inputs[name] = np.repeat(inputs[name][:, :2], inputs[name].shape[1], axis=1)
    wanted = rebuilt(module, netlist, inputs, 5)
    sites, stuck = (np.array(part) for part in zip(*wanted, strict=True))
    missed = faults._missed(
        module, netlist, inputs, np.random.default_rng(5), sites, np.where(stuck == 1, ONES, np.uint64(0))
    )
    assert (~missed).tolist() == list(wanted.values())
    assert missed.any()
    assert not missed.all()
