"""Energy by hand, and what is refused."""

import numpy as np
import pytest

pytest.importorskip("amaranth")

from recoup.errors import RecoupError
from recoup.gates.module import Expected, Module, Port
from recoup.silicon import measured
from recoup.silicon.energy import energy_of
from recoup.silicon.measured import Measured
from tests.silicon.test_liberty import TINY


@pytest.fixture(scope="module")
def liberty(tmp_path_factory):
    path = tmp_path_factory.mktemp("liberty") / "tiny.lib"
    path.write_text(TINY)
    return path


def nand(m, port):
    m.d.comb += port.y.eq(~(port.a & port.b))


NAND = Module(
    name="nand",
    title="nand",
    ports=(Port("a", "in", 1, ""), Port("b", "in", 1, ""), Port("y", "out", 1, "")),
    elaborate=nand,
    expected=lambda inputs: {"y": Expected((0,), 1 - (inputs["a"] & inputs["b"]))},
    clocked=False,
)


def test_energy_by_hand(liberty):
    """One NAND; b is 1, a goes 0, 1, 0, 1: two falls and one rise of y, in all lanes alike."""
    inputs = {"a": np.repeat(np.array([[0], [1], [0], [1]], np.uint64), 64, 1), "b": np.ones((4, 64), np.uint64)}
    found = Measured.of(NAND).energy(inputs, liberty)
    # y drives nothing: C = 0; its tables at 0.1 ns and no load give 1 - (2 - 1) / 2 = 0.5 pF V^2; a's pin has 2 fF
    assert found.logic == pytest.approx(3 * 500 / 3)
    assert found.inputs == pytest.approx(3 * 2e-15 / 2 / 3 * 1e15)
    assert (found.clock, found.registers, found.lanes, found.steps) == (0.0, 0.0, 64, 4)


def clocked(m, port):
    from amaranth.hdl import Signal

    kept = Signal(reset_less=True, name="kept")
    m.d.sync += kept.eq(port.a)
    m.d.comb += port.y.eq(kept)


KEPT = Module(
    name="kept",
    title="kept",
    ports=(Port("a", "in", 1, ""), Port("y", "out", 1, "")),
    elaborate=clocked,
    expected=lambda inputs: {"y": Expected(range(1, len(inputs["a"])), inputs["a"][:-1])},
    gated={"y": lambda inputs: np.ones(len(inputs["a"]), bool)},
)


def test_what_is_kept_belongs_to_shape_work_gates_and_version(liberty, monkeypatch, tmp_path):
    """Each of these, measured after the other, is what it is when it is measured alone."""
    monkeypatch.setenv("RECOUP_CACHE", str(tmp_path / "cache"))  # a run before this one has kept all of it
    bits = np.random.default_rng(0).integers(0, 2, (4, 128)).astype(np.uint64)
    one = Measured.of(KEPT)
    found = one.energy({"a": bits}, liberty)
    reshaped = one.energy({"a": bits.reshape(8, 64)}, liberty)  # the same bytes
    assert (reshaped.steps, reshaped.lanes) == (8, 64)
    double = Measured.of(KEPT.replace(work=2.0)).energy({"a": bits}, liberty)
    assert double.operation == found.operation / 2
    still = Measured.of(KEPT.replace(gated={"y": lambda inputs: np.zeros(len(inputs["a"]), bool)}))
    assert found.gated == found.step
    assert still.energy({"a": bits}, liberty).gated < found.step
    calls = []
    monkeypatch.setattr(measured, "energy_of", lambda *a, **k: calls.append(1) or energy_of(*a, **k))
    one.energy({"a": bits}, liberty)
    assert not calls
    monkeypatch.setattr(measured, "__version__", "9.9.9")
    one.energy({"a": bits}, liberty)
    assert calls


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, lib: m.energy({"a": np.zeros((2, 64), np.uint64)}, lib), "port 'b': no patterns"),
        (lambda m, lib: m.energy({n: np.zeros((2, 64)) for n in "ab"}, lib), "must be uint64, got float64"),
        (lambda m, lib: m.energy({n: np.full((2, 64), 2, np.uint64) for n in "ab"}, lib), "2 has more than 1 bits"),
        (lambda m, lib: m.energy({n: np.zeros((1, 64), np.uint64) for n in "ab"}, lib), "toggles need two or more"),
        (
            lambda m, lib: m.energy({n: [[0] * 64] * 2 for n in "ab"}, lib),
            "'a': patterns must be a numpy array, got list",
        ),
        (lambda m, _: m.simulate({n: [[0] * 64] * 2 for n in "ab"}), "'a': patterns must be a numpy array, got list"),
        (lambda m, _: m.simulate({n: np.zeros((2, k), np.uint64) for n, k in (("a", 64), ("b", 32))}), r"b \[2, 32\]"),
        (lambda m, lib: m.energy((np.zeros(3),), lib), "takes inputs by port"),
        (lambda m, lib: m.energy({}, lib, lanes=3), "positive multiple of 64"),
        (lambda m, _: m.energy({}, None), "energy needs a Liberty file"),
        (lambda m, _: m.delay(None), "delay needs a Liberty file"),
        (lambda m, lib: m.delay(lib, wires="library"), "names no default wire load"),
        (lambda m, lib: m.delay(lib, wires=-1.0), "must be None, 'library', or farads"),
        (lambda m, _: m.area(3), "must be a path, several paths, or None"),
    ],
)
def test_what_is_refused(liberty, call, message):
    with pytest.raises(RecoupError, match=message):
        call(Measured.of(NAND), liberty)
