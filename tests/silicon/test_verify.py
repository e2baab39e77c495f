"""Modules against the letter: what is equal passes, what is broken by hand is caught, and shown."""

import numpy as np
import pytest

pytest.importorskip("amaranth")

from recoup.errors import RecoupError
from recoup.gates.module import Expected, Module, Port, pattern, signed
from recoup.silicon import faults
from recoup.silicon.measured import Measured


def multiply(m, port):
    m.d.comb += port.y.eq(port.a * port.b)


def product(inputs):
    return {"y": Expected((0,), pattern(inputs["a"].astype(np.int64) * signed(inputs["b"], 4), 8))}


MUL = Module(
    name="mul",
    title="4 x 4",
    ports=(
        Port("a", "in", 4, "factor"),
        Port("b", "in", 4, "factor", signed=True),
        Port("y", "out", 8, "product", signed=True),
    ),
    elaborate=multiply,
    expected=product,
    clocked=False,
)


def accumulate(m, port):
    from amaranth.hdl import Mux, Signal
    from amaranth.hdl import signed as twos

    total = Signal(twos(12), reset_less=True, name="total")
    m.d.sync += total.eq(Mux(port.first, 0, total) + port.x)
    m.d.comb += port.y.eq(total)


def total(inputs):
    values, first = signed(inputs["x"], 8), inputs["first"][:, 0]
    sums, now = [], np.zeros(values.shape[1], np.int64)
    for x, begins in zip(values, first, strict=True):
        now = x + (0 if begins else now)
        sums.append(now)
    return {"y": Expected(range(1, len(sums)), pattern(np.stack(sums[:-1]), 12))}


SUM = Module(
    name="summing",
    title="sum",
    ports=(
        Port("x", "in", 8, "term", signed=True),
        Port("first", "in", 1, "begins a sum"),
        Port("y", "out", 12, "sum", signed=True),
    ),
    elaborate=accumulate,
    expected=total,
    latency=1,
    steps=9,
    control=lambda steps: {"first": np.arange(steps) % 4 == 0},
)


def test_every_product_of_a_multiplier():
    found = Measured.of(MUL).verify("exhaustive", coverage=False)
    assert (found.vectors, found.exhaustive, found.mismatches, found.ok) == (256, True, 0, True)
    assert found.coverage is None


def test_a_sum_whose_registers_begin_with_anything():
    found = Measured.of(SUM).verify(4096)
    assert found, found.missed
    assert found.verdict == "equal"
    assert found.mismatches == 0
    assert found.faults > 100


def test_a_broken_module_is_caught_with_the_operands():
    def broken(m, port):
        m.d.comb += port.y.eq(port.a * port.b + ((port.a == 7) & (port.b == -3)))

    found = Measured.of(MUL.replace(elaborate=broken)).verify("exhaustive")
    assert not found.ok
    assert found.mismatches == 1
    example = found.counterexample
    assert (example.operands, example.expected, example.got) == ({"a": [7], "b": [13]}, 235, 236)
    assert "y in step 0 is 236, expected 235; operands a=7, b=13" in str(found)
    assert found.to_dict()["verdict"] == "DIFFERS"
    assert "NOT PROVED" not in str(found)


def test_vectors_that_try_faults_are_compared_too():
    """Wrong where few operands meet: 64 vectors do not, those on which faults are tried do."""

    def seldom(m, port):
        m.d.comb += port.y.eq((port.a * port.b) ^ ((port.a == 0x5B) & (port.b == 0x1A)))

    def exact(inputs):
        return {"y": Expected((0,), inputs["a"] * inputs["b"])}

    ports = (Port("a", "in", 7, "factor"), Port("b", "in", 7, "factor"), Port("y", "out", 14, "product"))
    found = Measured.of(MUL.replace(name="seldom", ports=ports, elaborate=seldom, expected=exact)).verify(64)
    assert (found.verdict, found.faults) == ("DIFFERS", 0)
    assert found.vectors > 64
    assert found.counterexample is not None
    assert (found.counterexample.operands["a"], found.counterexample.operands["b"]) == ([0x5B], [0x1A])


def test_vectors_that_cannot_show_a_fault_do_not_pass():
    dull = SUM.replace(control=lambda steps: {"first": np.ones(steps, bool)})
    found = Measured.of(dull).verify(4096)
    assert found.mismatches == 0
    assert found.coverage < 0.995
    assert not found
    assert found.verdict == "equal, NOT PROVED"
    assert str(found).endswith("NOT PROVED: nothing differed, but the vectors show fewer than 99.5% of the faults")
    assert any("stuck at" in name for name in found.missed)


def test_a_round_that_would_take_hours_is_not_made(monkeypatch):
    rounds = []
    missed = faults._missed
    monkeypatch.setattr(faults, "_missed", lambda *given: rounds.append(1) or missed(*given))
    dull = Measured.of(SUM.replace(control=lambda steps: {"first": np.ones(steps, bool)}))
    assert not dull.verify(64)
    assert len(rounds) == len(faults.ROUNDS)
    monkeypatch.setattr(faults, "MOST", 0)
    assert not dull.verify(64)
    assert len(rounds) == len(faults.ROUNDS) + 1


@pytest.mark.parametrize("vectors", [0, -1, True, "all", 2.5])
def test_vectors_that_are_none(vectors):
    with pytest.raises(RecoupError, match="vectors must be a positive integer or 'exhaustive'"):
        Measured.of(MUL).verify(vectors)


def test_exhaustive_is_for_operations_without_memory():
    with pytest.raises(RecoupError, match="this one runs 9 steps"):
        Measured.of(SUM).verify("exhaustive")


def turns(m, port):
    """Two elements of a bit: the first shows a while b is 0, the second while it is 1."""
    from amaranth.hdl import Cat

    m.d.comb += port.y.eq(Cat(port.a & ~port.b, port.a & port.b))


def in_turn(mask, values=None):
    """`turns` over two steps, b = 0 and 1, looked at by a mask."""

    def shown(inputs):
        a, b = inputs["a"], inputs["b"]
        return {"y": Expected((0, 1), np.stack([a & (1 - b), a & b], 2) if values is None else values(a), mask)}

    return Module(
        name="turns",
        title="turns",
        ports=(Port("a", "in", 1, ""), Port("b", "in", 1, ""), Port("y", "out", 2, "", parts=2)),
        elaborate=turns,
        expected=shown,
        clocked=False,
        steps=2,
        control=lambda steps: {"b": np.arange(steps) % 2},
    )


def test_a_mask_says_which_parts_are_looked_at_and_when():
    diagonal = np.eye(2, dtype=bool)
    rubbish = in_turn(diagonal, lambda a: np.where(diagonal[:, None], a[:, :, None], 7))
    found = Measured.of(rubbish).verify(4096)
    assert found.mismatches == 0
    assert found.faults
    assert Measured.of(in_turn(None)).verify(4096).ok
    zeros = Measured.of(in_turn(~diagonal)).verify(4096)  # only what is 0 anyway
    assert (zeros.mismatches, zeros.ok) == (0, False)
    assert len(zeros.missed) > len(found.missed)


def test_a_counterexample_shows_what_is_looked_at():
    wrong = in_turn(np.eye(2, dtype=bool), lambda a: np.stack([a, a], 2) ^ np.array([0, 1], np.uint64))
    found = Measured.of(wrong).verify(4096)
    assert found.mismatches == 2048
    assert found.counterexample.step == 1
    assert found.counterexample.expected[0] is found.counterexample.got[0] is None
    assert found.counterexample.expected[1] == 1 - found.counterexample.got[1]


NONE = np.empty((1, 64, 2), np.uint64)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({}, "turns: expected leaves out y: whatever it showed would pass"),
        ({"y": Expected((0,), NONE), "z": Expected((0,), NONE)}, "names z, neither an output port nor a probe"),
        ({"y": Expected((), NONE[:0])}, "'y': no step shows part 0, 1"),
        ({"y": Expected((0,), NONE, np.array([[True, False]]))}, "no step shows part 1"),
        ({"y": Expected((0,), NONE, np.ones((2, 2), bool))}, r"shape \[2, 2\], must be \[1, 2\]"),
    ],
)
def test_a_letter_that_says_nothing_proves_nothing(expected, message):
    with pytest.raises(RecoupError, match=message):
        Measured.of(in_turn(None).replace(expected=lambda _: expected)).verify(64)


def test_a_letter_that_leaves_out_a_port_of_several_names_it():
    """A port that nothing is said of would pass whatever it showed."""

    def both(m, port):
        m.d.comb += [port.y.eq(port.a & port.b), port.z.eq(port.a ^ port.b)]

    pins = [Port(name, "in", 1, "") for name in "ab"] + [Port(name, "out", 1, "") for name in "yz"]
    half = Module(
        name="half", title="half", ports=tuple(pins), elaborate=both, clocked=False,
        expected=lambda inputs: {"y": Expected((0,), inputs["a"] & inputs["b"])},
    )  # fmt: skip
    with pytest.raises(RecoupError, match="half: expected leaves out z: whatever it showed would pass"):
        Measured.of(half).verify(64)
