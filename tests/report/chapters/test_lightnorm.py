from recoup.report import render
from recoup.report.chapters.lightnorm import CHAPTER, total
from recoup.report.figures import VARIABLES
from tests.report.pages import Page, plain_page, shown, verdicts
from tests.study.examples import norm_results, results


def test_traffic_adds_up():
    made = norm_results()
    context = CHAPTER.context(made)
    assert context is not None
    tables = context["tables"]
    assert [rows[0].config for _, _, rows in tables] == [repr(config) for config in made.recipe.configs[1:]]
    bits = total(made.rows("traffic", repr(made.recipe.configs[1])))
    assert tables[0][1] == bits
    assert bits.conventional == 4 * 8192 * 288
    assert bits.ratio == 288 / 61.5
    assert CHAPTER.context(results()) is None


def test_traffic_has_a_section_a_figure_and_tables():
    html = render(norm_results())
    page = Page(html)
    assert page.open == []
    labels = [str(attributes["aria-label"]) for tag, attributes in page.seen if tag == "svg"]
    said = [label for label in labels if label.startswith("Bits an element moves")]
    assert len(said) == 1
    assert "float32 batch norm: 288; LightNorm, FP10 1-5-4, blocks of 4: 61.5" in said[0]
    assert "A model, our own count" in html
    assert "28 % · 68 % · 4 %" in html
    assert html.count('<caption class="unseen">LightNorm, FP10 1-5-4, blocks of') == 2
    assert "<dt>batch norm traffic</dt>" in html
    assert not any(colour in html for colour in VARIABLES)
    assert "Batch norm traffic" not in plain_page()


def test_traffic_is_a_table():
    text = shown(norm_results())
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "Batch norm traffic" in text
    assert "LightNorm, FP10 1-5-4, blocks of 4 1,179.6 251.9 4.68x" in " ".join(text.split())
    assert "Batch norm traffic" not in shown(results())


def test_verdicts_of_norm_units_are_against_float():
    _, norm, largest = verdicts(norm_results())
    fall = "LightNorm, FP10 1-5-4, blocks of 4: 91.73 % in float falls to 89.50 % with 4.7x less batch norm traffic in"
    assert norm == f"{fall} training; paired recalibration brings back 90 % of the loss (91.50 %)."
    assert "blocks of 32, largest exponent shared: 91.73 % in float falls to 89.50 % with 7.2x less" in largest
    assert "with" not in verdicts(norm_results(layers=0))[1]
    held = verdicts(norm_results(top1=(91.7, 91.7, 91.7)))[1]
    assert held.endswith(
        "becomes 91.70 % with 4.7x less batch norm traffic in training, within noise of 10,000 images; there is "
        "nothing to repair."
    )
