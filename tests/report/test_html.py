import re
from dataclasses import replace

import pytest

from recoup.report import render, write_html
from recoup.report.figures import VARIABLES
from recoup.report.html import interval_text
from recoup.report.summary import summarize
from tests.report.pages import EVIL, Page, plain_page
from tests.study.examples import results


@pytest.fixture
def html():
    return plain_page()


def test_nothing_outside_is_referred_to(html):
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<iframe|javascript:", html)
    assert all(target.startswith("#") for target in re.findall(r'\b(?:src|href)="([^"]*)"', html))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_the_page_is_well_formed(html):
    page = Page(html)
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {target[1:] for target in re.findall(r'\bhref="([^"]*)"', html)} | set(
        re.findall(r"url\(#([^)]*)\)", html)
    )
    assert targets <= set(ids)


def test_plots_are_described_and_follow_the_pages_colours(html):
    plots = [attributes for tag, attributes in Page(html).seen if tag == "svg"]
    assert len(plots) == 3
    assert all(plot["role"] == "img" for plot in plots)
    labels = " ".join(str(plot["aria-label"]) for plot in plots)
    assert "4 threads, S+A, paired: 91.60 %" in labels
    assert "largest error 0.024 in conv5" in labels
    assert "largest shift 0.24 standard deviations in bn5" in labels
    assert not any(colour in html for colour in VARIABLES)
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", html))
    defined = set(re.findall(r"(--[a-z0-9-]+):", html))
    assert used <= defined


def test_tables_have_headers(html):
    page = Page(html)
    assert sum(tag == "table" for tag, _ in page.seen) == sum(tag == "caption" for tag, _ in page.seen) == 4
    assert all("scope" in attributes for tag, attributes in page.seen if tag == "th")


def test_what_a_reader_needs_is_there(html):
    for text in (
        "brings back 93\N{NO-BREAK SPACE}% of the loss",
        "recoup run recipe.yaml", "Student&#39;s interval over 3 draws", "±0.54 points",
        "What is modelled, and what is not", "int8 (AMX)", "ab" * 32, "because grouped", "<dt>collision</dt>",
    ):  # fmt: skip
        assert text in html
    single = render(results(seeds=(0,)))
    assert "interval over" not in single
    assert "Wilson&#39;s interval of the single measurement" in single


def test_user_strings_are_escaped():
    made = results(name=EVIL)
    recipe = made.recipe.model_copy(update={"weights": EVIL, "data": EVIL, "out": EVIL})
    html = render(made.model_copy(update={"recipe": recipe, "data_name": EVIL, "model_name": EVIL, "notes": (EVIL,)}))
    page = Page(html)
    assert page.open == []
    assert {tag for tag, _ in page.seen} & {"script", "img"} == set()
    assert not any(name.startswith("on") for _, attributes in page.seen for name in attributes)
    assert "<script" in "".join(page.text)


def test_names_that_look_like_markup_elsewhere():
    html = render(results(name=r"$\frac1$ \g<0> {{7*7}}{%"))
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", html)[0]
    assert html.count(r"$\frac1$ \g&lt;0&gt; {{7*7}}{%") > 20


def test_sections_without_data_are_left_out():
    made = results()
    html = render(made.model_copy(update={"tables": {}, "shifts": (), "notes": ()}))
    assert "Layer by layer" not in html
    assert "Shift of BatchNorm statistics" not in html
    assert "Array cycles" not in html
    assert html.count("<svg") == 1


def test_the_same_results_give_the_same_file(tmp_path):
    path = write_html(results(), tmp_path)
    assert path.read_text() == plain_page()


@pytest.mark.parametrize("layers", [1, 150])
def test_few_and_many_layers(layers):
    assert render(results(layers=layers)).count('<th scope="row"><') == 0


def test_the_caption_explains_the_kinds_of_interval_that_the_table_has():
    found = results()
    summary = summarize(found)
    both, single = interval_text(found, summary), interval_text(found, summarize(results(seeds=(0,))))
    alone = replace(summary, lines=tuple(line for line in summary.lines if line.reached.kind == "t"))
    told = [text.partition(":")[0] + (" W" if "W:" in text else "") for text in (both, single)]
    assert told == ["t W", "W W"]
    assert "W:" not in interval_text(found, alone)
    fixed = replace(summary, lines=tuple(line for line in summary.lines if line.reached.kind != "t"))
    assert interval_text(found, fixed).startswith("W: Wilson's interval of the single measurement")
