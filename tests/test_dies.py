"""Energy and area of networks: sums by hand of the units' own tables, and what has none is named."""

import re
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("amaranth")

import recoup as rc
from recoup import dies
from recoup.network.systolic import Array
from recoup.silicon import build, tables
from recoup.silicon.tables import Tables, ordinary
from recoup.wings import wing_of
from tests.silicon.test_liberty import TINY

SHAPE = (4, 6, 6)
ARRAY = Array(4, 8)
ONE, TWO = rc.NBSMT(1), rc.NBSMT(2)
NARROW = rc.LBA.int12(operands=rc.Int(4)).replace(chunk=16)
FLAT = re.sub(r'values \("([\d.]+), [\d.]+", "[^"]*"\)', r'values ("\1, \1", "\1, \1")', TINY)
"""The tiny library with delays that do not grow with the load, which its tables do not reach."""


@pytest.fixture(scope="module")
def liberty(tmp_path_factory):
    path = tmp_path_factory.mktemp("liberty") / "tiny.lib"
    path.write_text(FLAT)
    return path


def net():
    """Two convolutions, the second grouped, a norm, a classifier and one more in float."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 5))
    return nn.Sequential(*layers, nn.Linear(5, 3)).eval()


def test_sums_by_hand(liberty):
    found = rc.cost(net(), {"0": TWO, "1": ONE, "4": NARROW}, SHAPE, ARRAY, liberty=liberty)
    areas = {config: build(config).area(liberty).area for config in (TWO, NARROW)}
    assert found.area == pytest.approx(4 * 8 * (areas[TWO] + areas[NARROW]), rel=1e-12)  # one thread runs on two
    assert found.units == tuple(sorted([repr(TWO), repr(NARROW)]))
    steps = {
        "0": (6 - 2) ** 2 * 6 * 2 * 9,  # ceil(4 channels / 2 threads) x 9 taps
        "1": (4 - 2) ** 2 * 6 * 3 * 9,  # a group's channels
        "4": 5 * (24 + 2),  # two chunk sums of at most 16 terms
    }
    joules = {}
    for config in (ONE, TWO, NARROW):
        module = build(config)
        joules[config] = module.energy(ordinary(config, module), liberty).step / 1e3
    expected = {"0": joules[TWO] * steps["0"], "1": joules[ONE] * steps["1"], "4": joules[NARROW] * steps["4"]}
    rows = {layer.name: layer for layer in found.layers}
    assert {name: row.steps for name, row in rows.items()} == {**steps, "2": None, "5": None}
    assert {name: row.energy for name, row in rows.items()} == {**expected, "2": None, "5": None}
    assert found.energy == pytest.approx(sum(expected.values()), rel=1e-12)
    missing = "2, 5: in float, for which no hardware is generated"
    assert found.absent == {"energy": missing, "area": missing}
    assert f"{found.energy:,.0f} pJ, {found.area:,.0f} um2\nnot in energy: {missing}\nnot in area: {missing}" in str(
        found
    )
    told = found.to_dict()
    assert (told["energy"], told["area"], told["absent"]) == (found.energy, found.area, found.absent)


def test_without_a_library_areas_are_nands(liberty):
    found = rc.cost(net(), {"0": TWO}, SHAPE, ARRAY)
    assert found.energy is None
    assert found.area == pytest.approx(32 * build(TWO).area().nand2)
    assert found.absent["energy"].startswith("0: energy needs a Liberty file")
    assert found.area != rc.cost(net(), {"0": TWO}, SHAPE, ARRAY, liberty=liberty).area


def test_what_its_generator_refuses_is_named(liberty):
    wide = rc.LBA.m7e4()
    found = rc.cost(net(), {"0": TWO, "4": wide}, SHAPE, ARRAY, liberty=liberty)
    assert found.area == pytest.approx(32 * build(TWO).area(liberty).area)
    assert found.energy == next(layer.energy for layer in found.layers if layer.name == "0")
    assert "operands=None are float32" in found.absent["energy"]
    assert found.absent["area"].startswith(f"{wide!r}: ")
    nothing = rc.cost(net(), {"4": wide}, SHAPE, ARRAY, liberty=liberty)
    assert nothing.area is nothing.energy is None
    alone = rc.cost(net(), {}, SHAPE, ARRAY, liberty=liberty)
    assert alone.area is alone.energy is None
    assert alone.absent["area"] == "0, 1, 2, 4, 5: in float, for which no hardware is generated"


def test_norms_of_rows_run_on_no_generated_unit(liberty):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    found = rc.cost(model, {"1": rc.LightNorm(chunks=2)}, (8,), ARRAY, liberty=None)
    assert found.layers[1].steps is None
    assert "1: layer and RMS norms run on units of their own" in found.absent["area"]
    assert "--set unit=layer" in found.absent["area"]
    assert found.area is None


def test_steps_and_places_of_every_wing():
    sizes = rc.cost(net(), {"2": rc.LightNorm()}, SHAPE, ARRAY)
    assert next(layer.steps for layer in sizes.layers if layer.name == "2") == 2 * 4 * 2  # 2 x 2 places, 6 channels
    unit = rc.TensorCore.hopper_fp8()
    core = rc.cost(net(), {"0": unit, "4": unit}, SHAPE, ARRAY)
    assert [layer.steps for layer in core.layers if layer.steps] == [16 * 6 * 2, 5]  # 36 and 24 products, 32 at once
    assert wing_of(unit, "test").units_on(unit, Array(16, 16)) == 8
    assert wing_of(unit, "test").units_on(unit, Array(3, 11)) == 2
    assert wing_of(TWO, "test").units_on(TWO, ARRAY) == 32
    assert wing_of(rc.LightNorm(), "test").units_on(rc.LightNorm(), ARRAY) == 1


def test_tables_are_read_once(liberty, monkeypatch):
    for table in (tables._area, tables._energy):
        table.cache_clear()
    calls = []
    for name in ("area", "energy"):
        original = getattr(tables.build(TWO).__class__, name)
        monkeypatch.setattr(
            tables.build(TWO).__class__, name, lambda *a, n=name, f=original, **k: calls.append(n) or f(*a, **k)
        )
    for _ in range(3):
        found = rc.cost(net(), {"0": TWO, "1": TWO, "4": TWO}, SHAPE, ARRAY, liberty=liberty)
        assert found.area
        assert found.energy
    assert sorted(calls) == ["area", "energy"]


def test_without_the_extra_both_say_so(monkeypatch, tmp_path, liberty):
    for table in (tables._area, tables._energy, tables._work):
        table.cache_clear()
    monkeypatch.setenv("RECOUP_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "amaranth.hdl", None)
    found = rc.cost(net(), {"0": TWO}, SHAPE, ARRAY, liberty=liberty)
    assert found.area is found.energy is None
    for name in ("area", "energy"):
        assert "pip install 'recoup[silicon]'" in found.absent[name]


def test_the_least_units_that_do():
    areas = {"a": 3.0, "b": 2.0, "c": 4.0}
    assert dies.least_units([("a",), ("b",)], areas) == (("a", "b"), 5.0)
    assert dies.least_units([("a", "c"), ("b", "c")], areas) == (("c",), 4.0)
    assert dies.least_units([("a", "c"), ("b",), ()], areas) == (("a", "b"), 5.0)
    assert dies.least_units([], areas) == ((), 0.0)


def test_a_card_is_all_it_takes(trunc, monkeypatch, tmp_path, liberty):
    """A stranger's wing whose card has ``rtl`` and a unit of plain integers: neither steps nor operands are said."""
    import stranger  # type: ignore[import-not-found]

    (tmp_path / "stranger_rtl.py").write_text(RTL)
    card = rc.wings.Card(config=trunc, layers={nn.Linear: stranger.TruncLinear}, rtl="stranger_rtl", multiplies=True)
    rc.wings.register(card)
    config = trunc()
    found = rc.cost(net(), {"4": config}, SHAPE, ARRAY, liberty=liberty)
    row = next(layer for layer in found.layers if layer.name == "4")
    assert row.steps == 24 * 5 / 2  # two products a step
    pJ = Tables(liberty).energy(config).value
    assert row.energy is not None
    assert pJ is not None
    assert row.energy == pytest.approx(24 * 5 / 2 * pJ)
    assert found.area == pytest.approx(32 * build(config).area(liberty).area)
    codes = ordinary(config, build(config))
    assert 0.4 < (codes["x"] == 0).mean() < 0.6
    assert 20 < codes["x"][codes["x"] > 0].mean() < 80


RTL = """
from recoup.gates.module import Expected, Module, Port

def elaborate(m, port):
    m.d.comb += port.y.eq(port.x[:8] * port.w + port.x[8:] * port.w)

def build(config):
    ports = Port("x", "in", 16, "", parts=2), Port("w", "in", 8, "", signed=True), Port("y", "out", 17, "", signed=True)
    return Module(
        name="pair", title="pair", ports=ports, elaborate=elaborate, expected=lambda inputs: {}, clocked=False, work=2.0
    )
"""
