"""What every wing's measure promises, on a small network."""

import pytest

from recoup.network.wing import Card
from recoup.study.lab import Lab
from recoup.study.measures import measure_of, tables
from recoup.study.rows import Row
from recoup.wings import cards
from tests.study.examples import small_recipe

MEASURED = [card for card in cards().values() if card.measure is not None]


def names(cards: list[Card]) -> list[str]:
    return [card.config.__name__ for card in cards]


@pytest.mark.parametrize("card", MEASURED, ids=names(MEASURED))
def test_a_measure_fills_its_own_tables(card, tmp_path):
    measure = measure_of(card)
    assert measure is not None
    config = next(iter(card.presets.values()))
    found = measure.measure(Lab(small_recipe(tmp_path, configs=[repr(config)])), config, 3)
    assert found.keys() == measure.ROWS.keys()
    for table, kind in measure.ROWS.items():
        assert found[table]
        for row in found[table]:
            read = kind(config=repr(config), **row)
            assert kind.model_validate_json(read.model_dump_json()) == read


@pytest.mark.parametrize("card", MEASURED, ids=names(MEASURED))
def test_without_images_only_what_shapes_decide_is_left(card, tmp_path):
    measure = measure_of(card)
    assert measure is not None
    config = next(iter(card.presets.values()))
    found = measure.measure(Lab(small_recipe(tmp_path, configs=[repr(config)], profile_images=0)), config, 3)
    assert {table for table, rows in found.items() if rows} <= {"cycles", "traffic"}


def test_no_two_wings_fill_the_same_table():
    each = [measure.ROWS for card in MEASURED if (measure := measure_of(card)) is not None]
    assert sum(map(len, each)) == len(tables())
    assert all(issubclass(kind, Row) for kind in tables().values())
    assert tables([]) == {}
