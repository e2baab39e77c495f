from recoup.report import render
from recoup.report.chapters.lba import CHAPTER, context, widths_of
from recoup.study import Results
from recoup.study.rows import Row
from tests.report.chapters.test_chapters import GOLDEN, alone
from tests.report.pages import Page, shown
from tests.study.examples import results


def test_units_have_a_section_a_picture_tables_and_terms():
    made = alone("LBA")
    html = render(made)
    page = Page(html)
    assert page.open == []
    labels = [str(attributes["aria-label"]) for tag, attributes in page.seen if tag == "svg"]
    assert any("M4E4 (9 bits), chunk 16: least slope 0.730 in features.7" in label for label in labels)
    for config in made.recipe.configs:
        assert len(made.rows("units", repr(config))) == 5
    assert html.count('<caption class="unseen">M') == 3
    assert "<dt>swamped</dt>" in html
    text = " ".join(shown(made).split())
    assert "features.7 288 1.16 5.82 0.00 0.730 0.108" in text
    assert "Layers without repair: M3E4 (8 bits), chunk 16" in text


def test_without_units_there_is_nothing_to_explain():
    assert CHAPTER.context(results()) is None
    assert CHAPTER.terms(results()) == {}
    assert CHAPTER.layers(results()) == []


def test_bits_stand_beside_accuracy():
    made = Results.load(GOLDEN)
    widths = widths_of(made)
    assert [(width.title, width.bits) for width in widths] == [
        ("M7E4 (12 bits), chunk 16", 12), ("M4E4 (9 bits), chunk 16", 9), ("M3E4 (8 bits), chunk 16", 8),
    ]  # fmt: skip
    rows = {(row.config, row.state): row.top1 for row in made.accuracy}
    for width, config in zip(widths, (c for c in made.recipe.configs if repr(c).startswith("LBA")), strict=True):
        assert width.bare is not None
        assert width.bare.reached.mean == rows[repr(config), "float statistics"]
        assert width.repaired is not None
        assert width.repaired.state == "paired"
    page = render(made)
    assert '<h2 id="widths">' in page
    assert "Accuracy by the accumulator&#x27;s bits" in page
    assert "Area, µm²" not in page
    assert "area" not in shown(made)


def test_an_area_is_shown_from_the_moment_there_is_one():
    made = Results.load(GOLDEN)
    config = next(repr(c) for c in made.recipe.configs if repr(c).startswith("LBA"))

    class AreaRow(Row):
        area: float

    made = made.model_copy(update={"tables": {**made.tables, "area": (AreaRow(config=config, area=1234.5),)}})
    page = render(made)
    assert page.count("Area, µm²") == 1
    assert '<td class="n">1,234</td>' in page
    assert "area, um2" in shown(made)


def test_a_single_width_needs_no_picture():
    made = Results.load(GOLDEN)
    configs = tuple(c for c in made.recipe.configs if repr(c) == "LBA()")
    alone = made.model_copy(update={"recipe": made.recipe.model_copy(update={"configs": configs})})
    found = context(alone)
    assert found is not None
    assert (len(found["widths"]), found["width_figure"]) == (1, None)
