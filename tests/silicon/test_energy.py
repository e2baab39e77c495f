"""Energy by hand, and what is refused."""

import numpy as np
import pytest

pytest.importorskip("amaranth")

from recoup.errors import RecoupError
from recoup.gates.module import Expected, Module, Port
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, lib: m.energy({"a": np.zeros((2, 64), np.uint64)}, lib), "port 'b': no patterns"),
        (lambda m, lib: m.energy({n: np.zeros((2, 64)) for n in "ab"}, lib), "must be uint64, got float64"),
        (lambda m, lib: m.energy({n: np.full((2, 64), 2, np.uint64) for n in "ab"}, lib), "2 has more than 1 bits"),
        (lambda m, lib: m.energy({n: np.zeros((1, 64), np.uint64) for n in "ab"}, lib), "toggles need two or more"),
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
