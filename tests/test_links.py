"""README.md, docs and what is beside them: every link between files of the repository leads to a file and a heading.

There is no public address yet, so links are relative; where pyproject.toml names one, README.md's links to docs must be
absolute, because a package index shows README.md without the repository.
"""

import posixpath
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
ROOT_FILES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
PAGES = [*ROOT_FILES, *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)) for heading in headings)
    return {heading.strip().lower().replace(" ", "-") for heading in plain}


def dead(page: str) -> list[str]:
    """The links of a page that lead nowhere."""
    text = (ROOT / page).read_text("utf-8")
    found = []
    for target, anchor in LINK.findall(FENCED.sub("", text)):
        if re.match(r"\w+://|mailto:", target):
            continue
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target)) if target else page
        there = (ROOT / path).exists()
        if not there or (anchor and path.endswith(".md") and anchor not in anchors((ROOT / path).read_text("utf-8"))):
            found.append(f"{target}#{anchor}" if anchor else target)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert dead(page) == []


def test_readmes_links_are_absolute_where_there_is_an_address():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    relative = re.findall(r"\]\((docs/[^)]*)\)", (ROOT / "README.md").read_text("utf-8"))
    assert not (project.get("urls") and relative)


def test_readme_is_a_door():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 120


def test_every_page_is_in_the_navigation_and_the_citation_has_the_version():
    from recoup.version import __version__

    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    missing = [page for page in PAGES if page.startswith("docs/") and page.removeprefix("docs/") not in text]
    assert missing == []
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == __version__
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"version = {{{__version__}}}" in (ROOT / "docs/papers/index.md").read_text("utf-8")
