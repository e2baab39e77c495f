"""Liberty libraries: what is read, in SI units, and what is wrong with a broken one."""

import gzip

import numpy as np
import pytest

pytest.importorskip("amaranth")

from recoup.errors import RecoupError
from recoup.silicon import logic
from recoup.silicon.cells import Library

_TABLE = 'index_1 ("0.1, 0.3"); index_2 ("0.001, 0.003"); values ("{0}, {1}", "{1}, {2}");'


def gate(name, area, function, pins):
    """A combinational cell with one arc an input."""
    kinds = (("cell_rise", 1), ("cell_fall", 2), ("rise_transition", 3), ("fall_transition", 3))
    tables = " ".join(f"{k} (t) {{ {_TABLE.format(0.1 * s, 0.2 * s, 0.3 * s)} }}" for k, s in kinds)
    power = f"rise_power (t) {{ {_TABLE.format(1, 2, 3)} }} fall_power (t) {{ {_TABLE.format(1, 2, 3)} }}"
    sense = "non_unate" if "^" in function else "negative_unate" if "!" in function else "positive_unate"
    arcs = " ".join(
        f'timing () {{ related_pin : "{p}"; timing_sense : {sense}; {tables} }} '
        f'internal_power () {{ related_pin : "{p}"; {power} }}'
        for p in pins
    )
    inputs = " ".join(f"pin ({p}) {{ direction : input; capacitance : 0.002; }}" for p in pins)
    output = f'pin (Y) {{ direction : output; max_capacitance : 0.1; function : "{function}"; {arcs} }}'
    return f"  cell ({name}) {{ area : {area}; cell_leakage_power : 5; {inputs} {output} }}\n"


def flip_flop():
    """A flip-flop without reset, whose clock costs less when D equals Q."""
    kinds = ("cell_rise", "cell_fall", "rise_transition", "fall_transition")
    tables = " ".join(f"{k} (t) {{ {_TABLE.format(0.1, 0.2, 0.3)} }}" for k in kinds)
    setup = f"rise_constraint (s) {{ {_TABLE.format(0.05, 0.05, 0.05)} }} "
    setup += f"fall_constraint (s) {{ {_TABLE.format(0.05, 0.05, 0.05)} }}"
    clock = "".join(
        f'internal_power () {{ when : "{when}"; rise_power (c) {{ index_1 ("0.1, 0.3"); values ("{v}, {v}"); }} '
        f'fall_power (c) {{ index_1 ("0.1, 0.3"); values ("{v}, {v}"); }} }}'
        for when, v in (("D & Q", 1), ("!D & !Q", 1), ("D & !Q", 4), ("!D & Q", 4))
    )
    return f"""  cell (DFF) {{ area : 20; cell_leakage_power : 9;
    ff (IQ, IQN) {{ clocked_on : "CK"; next_state : "D"; }}
    pin (CK) {{ direction : input; clock : true; capacitance : 0.001; {clock} }}
    pin (D) {{ direction : input; capacitance : 0.002;
      timing () {{ related_pin : "CK"; timing_type : setup_rising; {setup} }} }}
    pin (Q) {{ direction : output; function : "IQ";
      timing () {{ related_pin : "CK"; timing_type : rising_edge; {tables} }} }}
  }}
"""


TINY = (
    """/* a library of a few cells */
library (tiny) {
  time_unit : "1ns"; voltage_unit : "1V"; leakage_power_unit : "1nW"; nom_voltage : 1.0;
  capacitive_load_unit (1, pf); default_max_transition : 5; default_fanout_load : 1;
  lu_table_template (t) { variable_1 : input_net_transition; variable_2 : total_output_net_capacitance;
    index_1 ("0.1, 0.3"); index_2 ("0.001, 0.003"); }
  lu_table_template (s) { variable_1 : related_pin_transition; variable_2 : constrained_pin_transition;
    index_1 ("0.1, 0.3"); index_2 ("0.1, 0.3"); }
  power_lut_template (c) { variable_1 : input_transition_time; index_1 ("0.1, 0.3"); }
"""
    + gate("INV", 1, "!A", "A")
    + gate("BUF", 2, "A", "A")
    + gate("NAND2", 2, "!(A & B)", "AB")
    + gate("NOR2", 2.5, "!(A | B)", "AB")
    + gate("XOR2", 4, "A ^ B", "AB")
    + flip_flop()
    + "}\n"
)


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.lib"
    path.write_text(TINY)
    return Library((path,))


def test_what_a_library_says_in_si_units(tiny):
    assert tiny.nand2 == 2.0
    assert tiny.voltage == 1.0
    cell = tiny.cell("NAND2")
    assert cell.capacitance == {"A": pytest.approx(2e-15), "B": pytest.approx(2e-15)}  # the text's decimals in binary
    assert cell.leakage == pytest.approx(5e-9)
    assert cell.outputs["Y"] == ("not", ("and", "A", "B"))
    rise = cell.arcs[0].rise
    assert rise.at(0.1e-9, 1e-15) == pytest.approx(0.1e-9)
    assert rise.at(0.2e-9, 2e-15) == pytest.approx(0.2e-9)  # the middle of 0.1, 0.2, 0.2 and 0.3
    assert cell.power[0].rise.at(0.1e-9, 1e-15) == pytest.approx(1e-12)  # pF V^2
    inside = tiny.cell("DFF").flip_flop
    assert (inside.clock, inside.next_state, inside.clear) == ("CK", "D", None)


def test_a_compressed_library_is_the_same(tmp_path, tiny):
    path = tmp_path / "tiny.lib.gz"
    path.write_bytes(gzip.compress(TINY.encode()))
    assert Library((path,)).digests == tiny.digests


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("library (tiny)", "cells (tiny)"), "has no library group"),
        (("  cell (NOR2) {", "  cell (NOR2) { {"), r"brace is missing.*NOR2|in cell NOR2"),
        (('time_unit : "1ns";', ""), "time_unit or capacitive_load_unit is missing"),
        (("ff (IQ, IQN)", "latch (IQ, IQN)"), "no cell is a flip-flop"),
        (('"1ns"', '"1parsec"'), "is no unit of s"),
        (("cell (NAND2) { area : 2;", "cell (NAND2) {"), "cell NAND2: area is missing"),
        (("cell (NAND2) { area : 2;", "cell (NAND2) { area : two;"), "area is 'two', no number"),
        (("cell (NAND2) { area : 2;", "cell (NAND2) { area ? 2;"), "line [0-9]+"),
    ],
)
def test_a_broken_library_is_refused_with_its_place(tmp_path, change, message):
    path = tmp_path / "broken.lib"
    assert change[0] in TINY
    path.write_text(TINY.replace(*change))
    with pytest.raises(RecoupError, match=message):
        Library((path,)).cell("NAND2")


def test_files_that_are_none(tmp_path):
    with pytest.raises(RecoupError, match="is no file"):
        Library((tmp_path / "absent.lib",))
    (tmp_path / "fake.lib.gz").write_text("no gzip")
    with pytest.raises(RecoupError, match="cannot be unpacked"):
        Library((tmp_path / "fake.lib.gz",))
    with pytest.raises(RecoupError, match="no file is named"):
        Library(())


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("A B'", ("and", "A", ("not", "B"))),
        ("A*B+C", ("or", ("and", "A", "B"), "C")),
        ("!(A ^ B) | 1", ("or", ("not", ("xor", "A", "B")), 1)),
        ("(A1 & !A2)", ("and", "A1", ("not", "A2"))),
    ],
)
def test_expressions(text, tree):
    assert logic.parse(text) == tree


def test_values_of_expressions_are_those_of_python():
    tree = logic.parse("(A ^ B) & !C | C' B")
    for n in range(8):
        a, b, c = bool(n & 1), bool(n & 2), bool(n & 4)
        assert logic.value(tree, {"A": a, "B": b, "C": c}) == (((a != b) and not c) or (not c and b))


@pytest.mark.parametrize("text", ["", "A &", "(A", "A ? B", ")"])
def test_what_is_no_expression(text):
    with pytest.raises(RecoupError, match="liberty:"):
        logic.parse(text)


def test_tables_go_on_beyond_their_points():
    from recoup.silicon.cells import Table

    table = Table(np.array([1.0, 2.0]), np.array([1.0, 3.0]), np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert table.at(3.0, 1.0) == 5.0
    assert table.at(1.0, 5.0) == 3.0
