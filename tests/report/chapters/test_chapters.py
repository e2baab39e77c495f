"""Each of recoup's own wings alone: its report has its chapter, and no word of another."""

import re
from pathlib import Path

import pytest

from recoup.report import render, write_tables
from recoup.report.chapters import chapter_of, parts_of
from recoup.study import Results
from recoup.wings import cards
from tests.report.pages import Page, shown

GOLDEN = Path(__file__).parents[1] / "golden"
WORDS = {
    "NBSMT": r"nb-?smt|collision|\bslots?\b|\b8.bit\b|lossy|utili[sz]ation|policy|slowed|cycle|multiplier",
    "LBA": r"\blba\b|accumulator|swamped|underflow|overflow|chunk|\bslope|gain per|\bM\dE\d",
    "LightNorm": r"light-?norm|range batch|traffic|shared? an? exponent|FP10|kB\b",
}
SECTIONS = {"NBSMT": ("cycles", "layers"), "LBA": ("widths", "units"), "LightNorm": ("traffic",)}
TABLES = {"NBSMT": {"layers", "cycles"}, "LBA": {"units"}, "LightNorm": {"traffic"}}


def alone(wing: str) -> Results:
    """The demo's results of one wing."""
    made = Results.load(GOLDEN)
    card = next(card for config, card in cards().items() if config.__name__ == wing)
    configs = tuple(config for config in made.recipe.configs if type(config) is card.config)
    names = {"float", card.baseline.name, *map(repr, configs)}
    states = tuple(state for state in made.recipe.states if state.applies(configs[0]))
    changes = {
        "recipe": made.recipe.model_copy(update={"configs": configs, "states": states}),
        "accuracy": tuple(row for row in made.accuracy if row.config in names),
        "shifts": tuple(row for row in made.shifts if row.config in names),
        "tables": {name: rows for name, rows in made.tables.items() if rows[0].config in names},
    }
    return made.model_copy(update=changes)


@pytest.mark.parametrize("wing", WORDS)
def test_a_wing_alone(wing, tmp_path):
    made = alone(wing)
    page = render(made)
    above = Page(re.sub(r"<style>.*?</style>", "", page, flags=re.S)).text
    said = "".join(above).partition("How to reproduce")[0] + " ".join(re.findall(r'aria-label="([^"]*)"', page))
    for text in (said, shown(made)):
        assert re.search(WORDS[wing], text, re.I)
        for other in WORDS.keys() - {wing}:
            assert not re.findall(WORDS[other], text, re.I)
    found = re.findall(r'<h2 id="(\w+)"', page)
    assert found == ["verdict", "accuracy", *SECTIONS[wing], "shift", "terms", "model", "reproduce"]
    assert {path.stem for path in write_tables(made, tmp_path)} == {"accuracy", "shifts"} | TABLES[wing]


def test_chapters_come_in_the_order_in_which_wings_were_registered():
    made = Results.load(GOLDEN)
    turned = made.model_copy(update={"recipe": made.recipe.model_copy(update={"configs": made.recipe.configs[::-1]})})
    studied = {type(config) for config in made.recipe.configs}
    expected = [chapter_of(card) for kind, card in cards().items() if kind in studied]
    assert [chapter for chapter, _ in parts_of(made)] == [chapter for chapter, _ in parts_of(turned)] == expected
