"""Every rule finds a tiny offence, and lets its lawful neighbour pass."""

import re
from pathlib import Path

import pytest

from tests.architecture.arrows import between_wings, circles, hidden_modules, room_edges, unlisted, upward
from tests.architecture.chains import chains
from tests.architecture.libraries import loaded_at_once, misplaced
from tests.architecture.sizes import long_files, long_functions, untested_rooms, without_a_job
from tests.architecture.tree import Tree
from tests.architecture.words import template_words, wing_words

FLOORS = tuple(frozenset({room}) for room in ("ground", "wing", "top", "recoup"))
LAZY = "def f():\n    {}\n"
TYPING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {}\n"


@pytest.mark.parametrize(
    "wrapped", ["{}", LAZY, TYPING, "class C:\n    {}\n", "try:\n    {}\nexcept ImportError:\n    raise\n"]
)
@pytest.mark.parametrize(
    "statement",
    [
        "import recoup.top",
        "import recoup.top.a",
        "from recoup import top",
        "from recoup.top import a",
        "from recoup.top.a import f as g",
        "from .. import top",
        "from ..top import a",
        "import importlib; importlib.import_module('recoup.top.a')",
    ],
)
def test_arrows_up_are_found_wherever_they_stand(wrapped: str, statement: str):
    tree = Tree.of_texts({"ground.low": wrapped.format(statement), "top.a": "def f(): ..."})
    (place,) = upward(tree, FLOORS).values()
    assert re.match(r"recoup/ground/low.py:\d: imports recoup.top(.a)?, which lies 2 floors up", place)


def test_arrows_down_and_sideways_are_lawful():
    tree = Tree.of_texts(
        {"top.a": "import recoup.ground.b\nfrom recoup.top import c", "top.c": "", "ground.b": "import os"}
    )
    assert upward(tree, FLOORS) == {}
    assert unlisted(tree, FLOORS) == {}


def test_the_root_lies_above_all():
    tree = Tree.of_texts({"top.a": "import recoup as rc", "": "from recoup import top"})
    assert list(upward(tree, FLOORS)) == ["recoup/top/a.py -> recoup"]


def test_a_room_without_a_floor_is_told_where_to_go():
    found = unlisted(Tree.of_texts({"cellar": ""}), FLOORS)
    assert found == {
        "cellar": "recoup/cellar.py: 'cellar' is on no floor: list it in FLOORS of tests/test_architecture.py"
    }


@pytest.mark.parametrize(
    "statement", ["from recoup.other.config import X", "import recoup.other", "from recoup import other"]
)
def test_wings_keep_apart(statement: str):
    tree = Tree.of_texts({"wing.a": LAZY.format(statement), "other.config": "class X: ..."})
    assert len(between_wings(tree, frozenset({"wing", "other"}))) == 1
    assert between_wings(tree, frozenset({"wing"})) == {}


def test_circles_of_files_and_rooms():
    tree = Tree.of_texts(
        {
            "a.one": "from recoup.a import two",
            "a.two": LAZY.format("from recoup.a.three import f"),
            "a.three": TYPING.format("import recoup.a.one"),
            "a.four": "import recoup.a.one\nimport recoup.b.low",
            "b.low": "import os",
            "b.high": "import recoup.a.four",
        }
    )
    assert list(circles(tree.edges)) == ["recoup.a.one <-> recoup.a.three <-> recoup.a.two"]
    assert list(circles(room_edges(tree))) == ["a <-> b"]


def test_a_package_and_its_module_make_a_circle():
    tree = Tree.of_texts({"a": "from recoup.a.one import f", "a.one": "from recoup.a import g\nf = g"})
    assert list(circles(tree.edges)) == ["recoup.a <-> recoup.a.one"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("from matplotlib.figure import Figure", "matplotlib is for plots"),
        (LAZY.format("import matplotlib.pyplot as plt"), "matplotlib is for plots"),
        (TYPING.format("import matplotlib"), "matplotlib is for plots"),
        ("import torchvision", "torchvision is for nobody"),
        ("import requests", "requests is not listed: add it to LIBRARIES of tests/test_architecture.py"),
    ],
)
def test_libraries_have_their_users(text: str, told: str):
    users = {"matplotlib": ("plots",), "torchvision": ()}
    (place,) = misplaced(Tree.of_texts({"report.a": text}), users, frozenset({"torch"})).values()
    assert told in place


def test_users_are_rooms_modules_and_patterns():
    texts = dict.fromkeys(("kernels", "formats.cpu", "formats.cpu_two"), "import numba\nimport torch\nimport os.path")
    tree = Tree.of_texts({**texts, "kernels.deep": "import numba", "kernelsmith": "import numba"})
    found = misplaced(tree, {"numba": ("kernels", "formats.cpu*")}, frozenset({"torch"}))
    assert list(found) == ["recoup/kernelsmith.py: numba"]


def test_what_the_package_loads_at_once():
    texts = {
        "": "from recoup.a import f",
        "a": "from recoup.b.deep import g\nf = g",
        "b": "import heavy.one",
        "b.deep": LAZY.format("import heavy.two") + TYPING.format("import heavy.three"),
        "c": "import heavy",
    }
    found = loaded_at_once(Tree.of_texts(texts), "recoup", frozenset({"heavy"}))
    told = "recoup/b/__init__.py:1: heavy is loaded by `import recoup`; import it where it is used"
    assert found == {"recoup/b/__init__.py: heavy": told}


@pytest.mark.parametrize(
    "text",
    [
        "from recoup.a.plan import plan",
        "from recoup.other import x as plan",
        "def plan(): ...",
        "class plan: ...",
        "plan = 3",
        "from recoup import other as plan",
    ],
)
def test_hidden_modules(text: str):
    tree = Tree.of_texts({"a": text, "a.plan": "def plan(): ...", "other": "x = 1"})
    assert list(hidden_modules(tree)) == ["recoup.a.plan"]


@pytest.mark.parametrize(
    "text", ["from recoup.a import plan", "from recoup.a.plan import plan as plan_of", LAZY.format("plan = 3")]
)
def test_modules_in_the_open(text: str):
    assert hidden_modules(Tree.of_texts({"a": text, "a.plan": "def plan(): ..."})) == {}


IMPORTS = {
    "from recoup.wing.config import Chip\n": "Chip",
    "from recoup.wing import Chip as C\n": "C",
    "from recoup.wing import config\n": "config.Chip",
    "import recoup.wing.config\n": "recoup.wing.config.Chip",
    "from recoup import wing\n": "wing.Chip",
    "from recoup.wing import Chip\nKinds = int | Chip\n": "Kinds",
    "from recoup.wing import Chip\nKinds: tuple = (int, Chip)\n": "Kinds",
    "from recoup.unions import Both\n": "Both",
}
QUESTIONS = [
    "isinstance(x, {})",
    "isinstance(x, int | {})",
    "isinstance(x, (int, {}))",
    "issubclass(k, {})",
    "type(x) is {}",
    "type(x) in (int, {})",
    "x.__class__ == {}",
    "{{{}: 1, int: 2}}",
    "{{{}: n for n in x}}",
    "f.register({})",
]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("imported", IMPORTS)
def test_chains_are_found_under_every_name(imported: str, question: str):
    text = imported + "def ask(x, k, f):\n    return " + question.format(IMPORTS[imported])
    assert list(chains(_two_wings(text), frozenset({"wing", "other"}))) == ["above: Chip"]


def test_chains_in_match():
    text = "from recoup.wing import Chip\ndef ask(x):\n    match x:\n        case Chip(bits=4):\n            return 1\n"
    found = chains(_two_wings(text), frozenset({"wing", "other"}))
    assert found == {"above: Chip": "recoup/above.py:4: asks whether something is a Chip"}


@pytest.mark.parametrize(
    "text",
    [
        "isinstance(x, int)",
        "Chip(3)",
        "kept: list[Chip] = []",
        "{'chip': Chip}",
        "x == Chip(4)",
        "cards.register(Card(config=Chip))",
        "def Chip(): ...\nisinstance(x, Stranger)",
    ],
)
def test_what_is_no_chain(text: str):
    text = "from recoup.wing import Chip\nfrom recoup.network import Card, Stranger\n" + text
    assert chains(_two_wings(text), frozenset({"wing", "other"})) == {}


def test_a_wing_may_ask_for_its_own():
    tree = Tree.of_texts(
        {"wing.config": "class Chip: ...", "wing.a": "from recoup.wing.config import Chip\nisinstance(1, Chip)"}
    )
    assert chains(tree, frozenset({"wing"})) == {}


def _two_wings(above: str) -> Tree:
    return Tree.of_texts(
        {
            "wing": "from recoup.wing.config import Chip",
            "wing.config": "class Chip: ...",
            "unions": "from recoup.wing import Chip\nBoth = Chip | None",
            "network": "class Card: ...\nclass Stranger: ...",
            "above": above,
        }
    )


WORDS = {"lba": re.compile(r"(?<![A-Za-z])lba(?![a-z])|LBA")}


@pytest.mark.parametrize(
    "text",
    [
        "lba = 1",
        "def choose_lba_(): ...",
        "class LBALayer: ...",
        "import recoup.lba.config",
        "from recoup.lba import x",
        "from recoup import lba as unit",
        "x.lba_rows",
        "f(lba=1)",
        "def f(lba): ...",
        "x = 'of an LBA layer'",
        "x = f'{y} for lba'",
        "match x:\n    case lba: ...",
    ],
)
def test_words_are_found(text: str):
    assert list(wing_words(Tree.of_texts({"study": text}), WORDS)) == ["recoup/study.py: lba"]


@pytest.mark.parametrize(
    "text",
    ['"""Such as an LBA."""', "x = 1  # as LBA does", "fallback = rollback = 1", 'class A:\n    b: int\n    """lba"""'],
)
def test_words_that_pass(text: str):
    assert wing_words(Tree.of_texts({"study": text}), WORDS) == {}


def test_a_wing_may_speak_of_itself():
    assert wing_words(Tree.of_texts({"lba.config": "class LBA: ..."}), WORDS) == {}


def test_words_of_templates(tmp_path: Path):
    (tmp_path / "page.html.j2").write_text("<p>\nThe LBA unit</p>")
    (tmp_path / "page.txt").write_text("LBA")
    name = f"{tmp_path.name}/page.html.j2"
    assert template_words(tmp_path, WORDS) == {f"{name}: lba": f"{name}:2: says 'LBA', which is lba's"}


def test_sizes():
    text = "class A:\n    def f(self):\n        def g():\n            a = 1\n            return a\n        return g\n"
    tree = Tree.of_texts({"a": text})
    assert long_files(tree, 5) == {"recoup/a.py": "recoup/a.py: 6 lines"}
    assert long_files(tree, 6) == {}
    assert list(long_functions(tree, 4)) == ["recoup/a.py:A.f"]
    assert list(long_functions(tree, 2)) == ["recoup/a.py:A.f", "recoup/a.py:A.f.g"]
    assert long_functions(tree, 5) == {}


@pytest.mark.parametrize("text", ["", "x = 1", '"""Things"""', '"""Various things and helpers"""', '"""Helpers."""'])
def test_files_without_a_job(text: str):
    assert list(
        without_a_job(Tree.of_texts({"a.b": text, "a": '"""Does one thing."""', "": '"""Does it all."""'}))
    ) == ["recoup/a/b.py"]


@pytest.mark.parametrize(
    "text", ['"""Adds what is added."""', '"""The sum over a row:\n\nlong"""', '"""A sum, e.g. of\ntwo. More"""']
)
def test_files_with_a_job(text: str):
    assert without_a_job(Tree.of_texts({"": text})) == {}


def test_rooms_without_tests(tmp_path: Path):
    tree = Tree.of_texts({"top": "", "a.one": "", "a.deep.two": "", "b.three": "", "c": ""})
    for name in ("a/test_one.py", "b/helper.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert list(untested_rooms(tree, tmp_path)) == ["recoup/a/deep", "recoup/b"]
