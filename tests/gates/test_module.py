"""The record that describes hardware: ports, patterns, and the text that Amaranth makes of it."""

import json

import numpy as np
import pytest

from recoup.errors import RecoupError
from recoup.gates.module import Expected, Module, Port, pattern, signed


def product(m, port):
    m.d.comb += port.y.eq(port.a * port.b)


def counter(m, port):
    from amaranth.hdl import Signal

    count = Signal(4, reset_less=True, name="count")
    m.d.sync += count.eq(count + port.step)
    m.d.comb += port.y.eq(count)


def nothing(inputs):
    return {"y": Expected((), np.zeros((0, 1), np.uint64))}


MUL = Module(
    name="mul",
    title="4 x 4",
    ports=(Port("a", "in", 4, "factor"), Port("b", "in", 4, "factor", signed=True), Port("y", "out", 8, "product")),
    elaborate=product,
    expected=nothing,
    clocked=False,
    protocol={"order": "none"},
)


def test_the_text_has_the_ports_and_no_source_paths():
    pytest.importorskip("amaranth")
    text = MUL.rtlil()
    assert "wire width 4 input 1 signed \\b" in " ".join(text.split())
    assert "module \\mul" in text
    assert "\\clk" not in text
    assert ".py" not in text
    assert text == MUL.rtlil()


def test_a_clocked_module_has_a_clock_and_no_reset():
    pytest.importorskip("amaranth")
    ports = (Port("step", "in", 4, "step"), Port("y", "out", 4, "count"))
    text = Module(name="count", title="", ports=ports, elaborate=counter, expected=nothing).rtlil()
    assert "input 0 " in text.split("\\clk")[0][-20:]
    assert "\\rst" not in text


def test_interface():
    values = json.loads(MUL.replace(latency=2, clocked=True, facts={"bits": 8}).interface())
    assert [port["name"] for port in values["ports"]] == ["clk", "a", "b", "y"]
    assert (values["latency"], values["protocol"], values["facts"]) == (2, {"order": "none"}, {"bits": 8})


@pytest.mark.parametrize("width", [1, 7, 8, 33, 64])
def test_patterns_and_values(width):
    low, high = -(1 << (width - 1)), (1 << (width - 1)) - 1
    values = np.array([low, -1, 0, high], dtype=np.int64)
    patterns = pattern(values, width)
    assert patterns.dtype == np.uint64
    assert [int(p) for p in patterns] == [int(v) % (1 << width) for v in values]
    assert signed(patterns, width).tolist() == values.tolist()


def test_wide_patterns_are_python_integers():
    assert pattern(np.array([-1, 5], dtype=object), 70).tolist() == [(1 << 70) - 1, 5]
    assert pattern(np.array([-1, 5], dtype=object), 8).tolist() == [255, 5]


def test_parts_divide_the_width():
    with pytest.raises(RecoupError, match="parts must divide the width"):
        Port("x", "in", 8, "", parts=3)


def test_without_amaranth_the_error_names_the_command(monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(RecoupError, match=r"pip install 'recoup\[silicon\]'"):
        MUL.rtlil()
