"""CONTRIBUTING.md: every file, folder and name that it quotes exists, and its map is the one that is enforced."""

import re
from pathlib import Path

from scripts import draw_map

from tests.architecture.references import missing, references
from tests.architecture.tree import Tree
from tests.test_architecture import FLOORS, FOLDER, WINGS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def section(title: str) -> str:
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_everything_it_names_is_there():
    faults = missing(TEXT, ROOT, {"<wing>": tuple(sorted(WINGS))})
    assert not faults, "\n" + "\n".join(faults)


def test_its_map_is_the_one_that_is_enforced():
    there = {source.room for source in Tree.of_folder(FOLDER).values()}
    rows = [line.split("|")[1] for line in section("The map").splitlines() if line.startswith("| `")]
    assert [set(re.findall(r"`(\w+)`", row)) for row in rows] == [
        set(floor & there) for floor in FLOORS if floor & there
    ]


def test_its_picture_is_the_one_that_is_drawn():
    assert draw_map.TARGET.read_text("utf-8") == draw_map.drawn(), "python scripts/draw_map.py draws it anew"


def test_its_journeys_lead_somewhere():
    """Five, of at least seven numbered steps each, and every step names a place in the code."""
    journeys = [part for part in re.split(r"\n(?=\*\*)", section("Five journeys")) if part.startswith("**")]
    assert len(journeys) == 5
    for journey in journeys:
        steps = re.findall(r"^(\d+)\. (.*(?:\n   .*)*)", journey, re.MULTILINE)
        assert [int(number) for number, _ in steps] == list(range(1, len(steps) + 1))
        assert len(steps) >= 7
        assert all(list(references(step)) for _, step in steps)


def test_it_says_how_to_add_things():
    kinds = re.findall(r"^\*\*(.+?)\.?\*\*", section("How to add"), re.MULTILINE)
    wanted = ("format", "policy", "form", "layer", "norm", "data set", "model", "optimizer", "repair", "wing")
    assert len(kinds) == len(wanted)
    assert all(word in kind for word, kind in zip(wanted, kinds, strict=True))
