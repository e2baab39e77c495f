"""Faults that are proved redundant are those that no operand shows, all tried; wrong invariants are not believed."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("amaranth")

from recoup.errors import RecoupError
from recoup.formats import Float
from recoup.gates.module import Expected, Module, Port
from recoup.lba import LBA
from recoup.lba.rtl import build
from recoup.silicon import Measured, faults, vectors
from recoup.silicon.kernels import ONES
from recoup.silicon.redundant import redundant

BITS = 5
PATTERNS = np.arange(1 << BITS, dtype=np.uint64)


def sites_of(netlist):
    nets = list(dict.fromkeys([gate.target for gate in netlist.gates] + [r.state for r in netlist.registers]))
    return np.repeat(np.array(nets, np.int64), 2), np.tile(np.array([0, ONES], np.uint64), len(nets))


def logic(tables, occurring, complete=True):
    """Two outputs of five bits, each a sum of products; only some patterns occur, or only some are drawn."""
    codes = np.array(sorted(occurring), np.uint64)

    def elaborate(m, port):
        for name, table in zip("yz", tables, strict=True):
            terms = [port.a == pattern for pattern in table]
            m.d.comb += getattr(port, name).eq(sum(terms[1:], terms[0]) != 0)

    def expected(inputs):
        return {n: Expected((0,), np.isin(inputs["a"], sorted(t)).astype(np.uint64)) for n, t in zip("yz", tables)}  # noqa: B905

    def legal(patterns):
        return np.where(np.isin(patterns, codes), patterns, codes[patterns % np.uint64(len(codes))])

    a = Port("a", "in", BITS, "", legal=legal, complete=complete)
    outputs = [Port(name, "out", 1, "") for name in "yz"]
    return Measured.of(
        Module(name="logic", title="", ports=(a, *outputs), elaborate=elaborate, expected=expected, clocked=False)
    )


patterns = st.sets(st.integers(0, 31), min_size=1)


@settings(max_examples=8)
@given(st.tuples(patterns, patterns), patterns)
def test_they_are_the_faults_that_no_operand_shows(tables, occurring):
    module = logic(tables, occurring)
    netlist = module.netlist()
    sites, stuck = sites_of(netlist)
    every = vectors.exhaustive(module, 0, vectors.count(module))
    missed = faults._missed(module, netlist, every, np.random.default_rng(0), sites, stuck)
    assert np.array_equal(redundant(module, netlist, sites, stuck), missed)


def test_operands_that_are_not_drawn_but_may_occur_show_faults():
    module = logic(({1, 2}, {3, 7}), {0, 1, 2}, complete=False)
    netlist = module.netlist()
    sites, stuck = sites_of(netlist)
    every = {"a": PATTERNS[None]}
    missed = faults._missed(module, netlist, every, np.random.default_rng(0), sites, stuck)
    assert np.array_equal(redundant(module, netlist, sites, stuck), missed)
    drawn = vectors.exhaustive(module, 0, vectors.count(module))
    assert faults._missed(module, netlist, drawn, np.random.default_rng(0), sites, stuck).sum() > missed.sum()


def test_contradictions_prove_nothing():
    """A register that is said to hold no code that it begins from."""
    module = logic(({1, 2}, {3, 7}), {0, 1, 2})
    nothing = Port("b", "in", 1, "", legal=lambda patterns: patterns & np.uint64(0), complete=True)
    netlist = module.netlist()
    netlist.inputs["b"] = [1]  # constant one
    ports = (*module.ports, nothing)
    assert not redundant(module.replace(ports=ports), netlist, *sites_of(netlist)).any()


def counter(bits, codes):
    """Counts 0, 1, 2, 0; ``codes`` are claimed to be those of its register."""
    known = np.array(codes, np.uint64)

    def elaborate(m, port):
        from amaranth.hdl import Mux, Signal

        count = Signal(bits, name="count", reset_less=True)
        m.d.sync += count.eq(Mux(port.first | (count == 2), 0, count + 1))
        m.d.comb += port.y.eq(count == 3)

    def control(steps):
        return {"first": np.array([1] + [0] * (steps - 1), np.uint64)}

    def expected(inputs):
        return {"y": Expected(range(1, 8), np.zeros((7, inputs["first"].shape[1]), np.uint64))}

    held = Port("count", "out", bits, "", legal=lambda p: known[p % np.uint64(len(known))], complete=True)
    ports = (Port("first", "in", 1, ""), Port("y", "out", 1, ""))
    module = Module(name="counter", title="", ports=ports, elaborate=elaborate, expected=expected, steps=8)
    return Measured.of(module.replace(control=control, held=(held,)))


@pytest.mark.parametrize(
    ("bits", "codes", "believed"),
    [(2, [0, 1, 2], True), (2, [0, 1], True), (2, [0, 3], True), (16, [0, 1, 2], True), (16, [0, 1], False)],
)
def test_states_that_never_follow_are_left_out_and_wrong_claims_are_not_believed(bits, codes, believed):
    """3 never follows: its gate is stuck at 0. Few bits are counted whatever is claimed, many are held to the claim."""
    module = counter(bits, codes)
    netlist = module.netlist()
    last = netlist.outputs["y"][0]
    found = redundant(module, netlist, np.array([last, last]), np.array([0, ONES], np.uint64))
    assert found.tolist() == [believed, False]


def test_a_unit_with_gates_that_nothing_shows_is_proved():
    form = Float.lba(5, 2, bias=16)
    found = Measured.of(build(LBA(form, form, None), operands=Float.lba(3, 4, bias=3))).verify()
    assert found.ok, found
    assert not found.missed
    assert 0 < len(found.redundant) < 30
    assert f"{found.faults - len(found.redundant)} of" in str(found)
    assert "more proved redundant" in str(found)
    assert found.to_dict()["redundant"] == found.redundant


def test_without_a_solver_the_command_is_named(monkeypatch):
    module = logic(({1, 2}, {3}), {0, 1, 2})
    netlist = module.netlist()
    monkeypatch.setitem(sys.modules, "pysat.solvers", None)
    with pytest.raises(RecoupError, match=r"python-sat .*pip install 'recoup\[silicon\]'"):
        redundant(module, netlist, *sites_of(netlist))
