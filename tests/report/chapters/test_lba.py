from recoup.report import render
from recoup.report.chapters.lba import CHAPTER
from tests.report.chapters.test_chapters import alone
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
    assert html.count("<caption>M") == 3
    assert "<dt>swamped</dt>" in html
    text = " ".join(shown(made).split())
    assert "features.7 288 1.16 5.82 0.00 0.730 0.108" in text
    assert "Layers without repair: M3E4 (8 bits), chunk 16" in text


def test_without_units_there_is_nothing_to_explain():
    assert CHAPTER.context(results()) is None
    assert CHAPTER.terms(results()) == {}
    assert CHAPTER.layers(results()) == []
