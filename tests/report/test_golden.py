"""The report of the demo's results, which golden/ holds, byte for byte: page, terminal and tables.

Pictures are matplotlib's and change with its version: of each is compared what it says, its label and its words.
Date, seconds and machine are those of the golden results, so they are compared too. They are of an older recoup, which
kept no answers image by image, and the page says so.
"""

import re
from pathlib import Path

import pytest

from recoup.report import render, write_tables
from recoup.study import Results
from recoup.study.measures.pipeline import PipelineResults
from tests.report.pages import shown

GOLDEN = Path(__file__).with_name("golden")
TABLES = ("accuracy", "cycles", "layers", "shifts", "traffic", "units")


@pytest.fixture(scope="module")
def found() -> tuple[Results, PipelineResults | None]:
    return Results.load(GOLDEN), PipelineResults.load(GOLDEN)


def said(picture: re.Match[str]) -> str:
    """A picture's label and its texts; ticks are numbers, and which of them are drawn is matplotlib's choice."""
    texts = (
        " ".join(re.sub(r"<[^>]*>", "", text).split()) for text in re.findall(r"<text.*?</text>", picture[2], re.S)
    )
    words = [text for text in texts if re.search("[A-Za-z]", text)]
    return "\n".join([f"<svg {picture[1]}>", *words, "</svg>"])


@pytest.fixture(scope="module")
def page(found) -> str:
    return render(*found)


def masked(page: str) -> str:
    return re.sub(r'<svg role="img" (aria-label="[^"]*") [^>]*>(.*?)</svg>', said, page, flags=re.S)


def test_the_page(page):
    assert masked(page) == (GOLDEN / "report.html").read_text("utf-8")


def test_the_terminal(found):
    assert shown(*found) == (GOLDEN / "terminal.txt").read_text("utf-8")


def test_the_tables(found, tmp_path):
    paths = write_tables(found[0], tmp_path)
    assert sorted(path.stem for path in paths) == sorted(TABLES)
    for path in paths:
        assert path.read_text("utf-8") == (GOLDEN / path.name).read_text("utf-8")


def test_the_mask_leaves_all_but_the_drawing(page):
    left = masked(page)
    assert left.count("<svg") == page.count("<svg") == 7
    assert re.sub(r"<svg.*?</svg>", "", left, flags=re.S) == re.sub(r"<svg.*?</svg>", "", page, flags=re.S)
    assert "Slots with a collision, %" in left
    assert "<path" not in left
