"""Area by kind of part: every cell is in one kind, and kinds that a module lacks are not listed."""

import pytest

pytest.importorskip("amaranth")

import recoup as rc
from recoup.silicon import build
from recoup.silicon.area import WEIGHTS
from recoup.silicon.measured import Measured
from recoup.silicon.parts import KINDS, NAMES, REGISTERS, REST
from tests.silicon.test_verify import MUL, SUM


def test_a_multiplier_is_nothing_else():
    area = Measured.of(MUL).area(parts=True)
    assert area.parts == {"multipliers": area.area}
    assert Measured.of(MUL).area().parts == {}


def test_a_sum_has_registers_an_adder_and_a_choice():
    area = Measured.of(SUM).area(parts=True)
    assert list(area.parts) == [REGISTERS, "adders", "selection and shifts"]
    assert area.parts[REGISTERS] == area.registers == 12 * WEIGHTS["$_DFF_P_"]
    assert area.area <= sum(area.parts.values()) < 1.2 * area.area


def test_parts_of_an_element_are_those_of_its_array():
    """Modules that are held are counted as often as they are there, beside skew registers."""
    pe = build(rc.NBSMT(threads=2)).area(parts=True)
    array = build(rc.NBSMT(threads=2), array=(1, 2)).area(parts=True)
    assert list(pe.parts) == [REGISTERS, *KINDS, REST] == list(NAMES)
    for kind in KINDS:
        assert array.parts[kind] == pytest.approx(2 * pe.parts[kind])
    assert array.parts[REGISTERS] > 2 * pe.parts[REGISTERS]


def test_exact_multipliers_are_where_the_area_goes():
    module = build(rc.NBSMT(threads=2))
    own, exact = module.area(parts=True).parts, module.counterparts()["2T exact"].area(parts=True).parts
    assert exact["multipliers"] > 1.3 * own["multipliers"]  # which take their operands behind masks
    assert exact["selection and shifts"] < own["selection and shifts"]
    assert exact[REGISTERS] == own[REGISTERS]
