"""Where things stand on the page: numbers before pictures, long tables folded, colours that differ; phone and paper."""

import itertools
import re

import numpy as np
import pytest

from recoup.plots.palette import DARK, LIGHT, MARKERS
from recoup.report import render
from recoup.report.figures import SERIES, VARIABLES
from recoup.report.html import STYLE
from recoup.report.summary import summarize
from tests.report.pages import Page, plain_page
from tests.study.examples import FOUR, results, with_accuracy

CSS = STYLE.read_text("utf-8")


def lab(colour: str, seen: np.ndarray) -> np.ndarray:
    """CIELAB of a colour, as who has such eyes sees it."""
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    rows = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.array(rows) @ np.clip(seen @ linear, 1e-4, 1) / np.array([0.9505, 1, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# Machado, Oliveira and Fernandes (2009), severity 1.
DEUTERANOPE = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]])


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_ten_configs_and_a_baseline_have_colours_of_their_own(palette):
    assert len(palette.series) == len(SERIES) == len(set(MARKERS)) == 11
    for one, other in itertools.combinations(palette.series, 2):
        assert np.linalg.norm(lab(one, np.eye(3)) - lab(other, np.eye(3))) > 25
        # 2.3 is a just noticeable difference; grey and pink are the closest, and every series has a marker of its own
        assert np.linalg.norm(lab(one, DEUTERANOPE) - lab(other, DEUTERANOPE)) > 4


def test_the_pages_colours_are_the_palettes():
    light, dark, paper = re.findall(r"--series-1: .*?(?=})", CSS, re.S)
    named = [dict(re.findall(r"--(series-\d+): (#\w+)", part)) for part in (light, dark, paper)]
    wanted = [{f"series-{i + 1}": c for i, c in enumerate(p.series)} for p in (LIGHT, DARK, LIGHT)]
    assert named == wanted
    assert len(set(VARIABLES)) == len(set(VARIABLES.values())) == 15


def test_numbers_come_before_pictures():
    html = plain_page()
    accuracy = html[html.index('id="accuracy"') :]
    assert accuracy.index("<table>") < accuracy.index("<svg")
    first = re.findall(r"<tr[^>]*>(.*?)</tr>", accuracy, re.S)[2]
    assert '<td class="state">' in first


@pytest.mark.parametrize(("layers", "folded"), [(6, False), (40, True)])
def test_long_tables_are_folded_and_unfold_on_paper(layers, folded):
    html = render(results(layers=layers))
    details = [attributes for tag, attributes in Page(html).seen if tag == "details"]
    assert len(details) == 2
    assert all(("open" not in attributes) == folded for attributes in details)
    assert f"· {layers} layers" in html
    paper = CSS[CSS.index("@media print") :]
    assert "details::details-content { content-visibility: visible; block-size: auto; }" in paper
    assert re.search(r"figure, [^{]*{ break-inside: avoid; }", paper)


def test_a_narrow_screen_keeps_accuracy_interval_and_gain():
    html = plain_page()
    hidden = re.findall(r'<th scope="col" class="[^"]*more">([^<]*)<', html)
    assert hidden == ["Std", "Top-5"]
    narrow = CSS[CSS.index("@media (max-width") : CSS.index("@media print")]
    assert ".more { display: none; }" in narrow
    assert "figure { overflow-x: auto; }" in narrow


def test_no_share_of_a_loss_that_may_be_none():
    made = results(seeds=(0,), layers=0)
    few = with_accuracy(made, (row.model_copy(update={"count": 200}) for row in made.accuracy), test_images=200)
    assert {line.recovered for line in summarize(few).lines} == {None}
    line = summarize(made).line(repr(FOUR), "paired")
    assert line is not None
    assert line.recovered is not None
