"""Reports of a wing that recoup has never heard of: a config of ten lines, with and without a chapter."""

import re
import sys
from dataclasses import dataclass, replace
from html import escape

import pytest
import torch
from torch import nn

from recoup import wings
from recoup.errors import RecoupError
from recoup.recalibrate import AVERAGE, PAIRED
from recoup.report import render, write_tables
from recoup.report.chapters import chapter_at
from recoup.study import Recipe, Results
from recoup.study.repairs import states
from recoup.study.results import AccuracyRow, ShiftRow
from recoup.study.rows import Row
from recoup.wings import Baseline, Card
from tests.report.pages import Page, plain_page, shown, verdicts
from tests.study.examples import results, with_accuracy


@dataclass(frozen=True)
class Trunc:
    bits: int = 4


class TruncLinear(wings.Emulated, nn.Linear):
    float_class = nn.Linear

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 -- torch's name
        return super().forward(input).round(decimals=self.config.bits)


class BlotRow(Row):
    name: str
    blots: int


# What belongs to other wings. "thread" and "array" are looked for above the recipe, which has CPU threads and an array.
WORDS = (
    r"nb-?smt|collision|slot|8.bit|int8|lossy|utili[sz]ation|policy|slowed|cycle|lba|accumulator|swamped|underflow|"
    r"chunk|slope|residual(?! additions)|light-?norm|range|traffic|blocks?\b|exponent|FP10|pipeline|delay|gain per|bias"
)
ABOVE_THE_RECIPE = r"thread|array|multiplier"


@pytest.fixture
def card():
    yield lambda **more: wings.register(Card(config=Trunc, layers={nn.Linear: TruncLinear}, **more))
    wings.forget(Trunc)


def stranger(top1: tuple[float, float, float] = (89.5, 90.0, 91.5), configs=(Trunc(4), Trunc(2)), **tables) -> Results:
    """A study of the stranger alone; ``top1``: bare, and after its repairs."""
    made, wanted = results(), states([wings.wing_of(configs[0], "a test")])
    recipe = made.recipe.model_dump(mode="json") | {"configs": configs, "states": wanted}
    accuracy = [row for row in made.accuracy if row.config == "float"]
    for config in configs:
        for seed in (0, 1, 2):
            for state, value in zip(wanted, top1, strict=False):
                row = {"config": repr(config), "state": state, "seed": seed, "top1": value, "top5": 99.6}
                accuracy.append(AccuracyRow(**row, count=10_000, seconds=1.0))
    shifts = tuple(ShiftRow(config=repr(c), layer="bn1", mean=0.1, variance=1.1) for c in configs)
    machine = made.machine.model_copy(update={"backend": "", "isa": "", "reason": ""})
    changes = {"tables": tables, "shifts": shifts, "notes": (), "recipe": Recipe.build(recipe), "machine": machine}
    return with_accuracy(made, accuracy, **changes)


def visible(page: str) -> str:
    """What a reader sees or hears of a page."""
    labels = " ".join(re.findall(r'(?:aria-label|title)="([^"]*)"', page))
    return labels + " ".join(Page(re.sub(r"<style>.*?</style>", "", page, flags=re.S)).text)


def test_it_never_meets_a_word_of_another_wing(card):
    card(repairs=(AVERAGE, PAIRED), default=(PAIRED.name,))
    made = stranger()
    page = render(made)
    assert Page(page).open == []
    for text in (visible(page), shown(made)):
        assert "Trunc(bits=4)" in text
        assert not re.findall(WORDS, text, re.I)
        assert not re.findall(ABOVE_THE_RECIPE, text.partition("How to reproduce")[0], re.I)


def test_the_words_are_those_of_other_wings():
    text = visible(plain_page()) + shown(results())
    found = {word.lower() for word in re.findall(f"{WORDS}|{ABOVE_THE_RECIPE}", text, re.I)}
    assert found > {"collision", "cycle", "thread", "multiplier", "8 bit", "8-bit", "slot", "nb-smt", "policy"}


ODD = "$1 [b]&<i>{{ 7 * 7 }}$"


def test_its_names_are_text_everywhere(card):
    odd = replace(PAIRED, name=f"state {ODD}", sentence=f"sentence {ODD}", meaning=f"meaning {ODD}")
    card(title=lambda config: f"title {ODD} {config.bits}", repairs=(odd,), quoted=(odd.name,))
    page = render(stranger())
    assert Page(page).open == []
    for kind in ("title", "state", "sentence", "meaning"):
        assert f"{kind} {ODD}" in "".join(Page(page).text)
        assert kind == "meaning" or f"{kind} {ODD}" in " ".join(shown(stranger(), width=200).split())
    drawn = "".join(re.findall(r"<text.*?</text>", page, re.S))
    assert f"title {escape(ODD, quote=False)} 4" in drawn
    assert f"state {escape(ODD, quote=False)}" in drawn


def test_without_repairs(card):
    card()
    assert verdicts(stranger())[0] == "Trunc(bits=4): 91.73 % in float falls to 89.50 %; no repair was measured."


def test_a_verdict_quotes_its_repairs_where_the_card_prefers_none(card):
    card(repairs=(AVERAGE, PAIRED))
    said = "recalibration on the hardware brings back 22 % of the loss (90.00 %)."
    assert verdicts(stranger())[0] == f"Trunc(bits=4): 91.73 % in float falls to 89.50 %; {said}"
    card(repairs=(AVERAGE, PAIRED), quoted=(PAIRED.name,))
    assert "paired recalibration brings back 90 % of the loss (91.50 %)" in verdicts(stranger())[0]


def test_what_it_models_is_to_be_looked_up(card):
    card()
    page = render(stranger())
    assert "The layers of Trunc: what their own forward pass computes." in page
    assert "Layers outside the emulation: their accuracy is that of float." in page
    assert "costs against its baseline (float)" in page


def test_a_baseline_of_its_own(card):
    card(baseline=Baseline("wide", "16 bits", "at 16 bits", lambda _: Trunc(16), hardware="no cut"))
    made = stranger(configs=(Trunc(4),))
    rows = tuple(row.model_copy(update={"config": "wide", "top1": 91.0}) for row in made.accuracy[1:2])
    made = with_accuracy(made, (made.accuracy[0], *rows, *made.accuracy[1:]))
    assert verdicts(made)[0].startswith("Trunc(bits=4): 91.00 % at 16 bits falls to 89.50 %")
    page = render(made)
    assert ">16 bits, no cut<" in re.sub(r"<text[^>]*>", ">", page)
    assert "costs against its baseline (16 bits)" in page
    assert '<tr class="group"><th scope="rowgroup" colspan="5">16 bits</th></tr>' in page


CHAPTER = """
from pathlib import Path
from recoup.report.chapters import Chapter, Limit, Table, measured

def context(results):
    blots = measured(results, "blots")
    return {"blots": blots} if blots else None

def totals(results):
    return [Table(f"Blots: {name}", ("layer", "[blots]"), tuple((r.name, str(r.blots)) for r in rows))
            for name, rows in measured(results, "blots")]

CHAPTER = Chapter(
    template=Path(__file__).with_name("blots.j2"), context=context, totals=totals,
    saving=lambda results, config: f" with {len(results.rows('blots', repr(config)))} blots",
    terms=lambda results: {"blot": "What a pen leaves."}, modelled=("Blots.",), costs=("Ink.",),
    limits={"area": Limit("Paper"), "pens": Limit("Pens", "they are quills")},
)
"""
TEMPLATE = """{#- Blots. #}
<section aria-labelledby="blots"><h2 id="blots">Blots</h2>
{%- for name, rows in chapter.blots %}
<p>{{ name }}: {% for row in rows %}{{ row.name }} {{ row.blots }}{% endfor %}</p>
{%- endfor %}
</section>"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The chapter as a module of the stranger's, outside recoup."""
    (tmp_path / "blotted.py").write_text(CHAPTER)
    (tmp_path / "blots.j2").write_text(TEMPLATE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "blotted"
    sys.modules.pop("blotted", None)


def test_a_chapter_plugs_in_by_its_path(card, module, tmp_path):
    card(chapter=module)
    made = stranger(blots=(BlotRow(config=repr(Trunc(2)), name="<fc>", blots=7),))
    page = render(made)
    assert Page(page).open == []
    assert "<p>Trunc(bits=2): &lt;fc&gt; 7</p>" in page
    assert page.index('id="accuracy"') < page.index('id="blots"') < page.index('id="shift"')
    assert "<dt>blot</dt><dd>What a pen leaves.</dd>" in page
    assert "<ul><li>Blots.</li><li>Ink.</li></ul>" in page
    assert "<li>Paper.</li><li>Pens: they are quills.</li></ul>" in page
    assert "own forward pass" not in page
    assert [text.partition(" falls to ")[2] for text in verdicts(made)] == [
        "89.50 % with 0 blots; no repair was measured.",
        "89.50 % with 1 blots; no repair was measured.",
    ]
    text = shown(made)
    for part in ("Blots:", "[blots]", "<fc>"):
        assert part in text
    paths = {path.name: path for path in write_tables(made, tmp_path)}
    assert paths["blots.csv"].read_text() == "config,name,blots\nTrunc(bits=2),<fc>,7\n"
    assert "Blots" not in visible(render(stranger())).partition("What is modelled")[0]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("recoup.no.such", "chapter 'recoup.no.such': the module cannot be imported (No module named 'recoup.no')"),
        ("math", "chapter 'math': CHAPTER is None; must be a recoup.report.chapters.Chapter"),
    ],
)
def test_a_path_without_a_chapter(path, told):
    with pytest.raises(RecoupError, match=re.escape(told)):
        chapter_at(path)
