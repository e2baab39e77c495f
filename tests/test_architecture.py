"""The rules of the house, held against the source text of src/recoup: nothing of recoup is imported.

Every rule gives findings by a key. An exception is either OWED, for a reason that stays, or one of KNOWN
(tests/architecture/known.py): faults that somebody is still to mend, a table that can only shrink. The rules themselves
are tested in tests/architecture/test_rules.py.
"""

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.architecture.arrows import between_wings, circles, hidden_modules, room_edges, unlisted, upward
from tests.architecture.chains import chains
from tests.architecture.known import KNOWN
from tests.architecture.libraries import loaded_at_once, misplaced
from tests.architecture.sizes import long_files, long_functions, untested_rooms, without_a_job
from tests.architecture.tree import Findings, Tree
from tests.architecture.words import template_words, wing_words

FOLDER = Path(__file__).resolve().parents[1] / "src" / "recoup"
LONGEST_FILE, LONGEST_FUNCTION = 400, 60

# From the ground. Arrows point down or along a floor; a new room or module of the top level belongs on one of them.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "version"}),
    frozenset({"fields", "storage"}),
    frozenset({"kernels", "network", "models", "gates", "tasks"}),
    frozenset({"formats", "data"}),
    frozenset({"evaluation", "recalibrate", "gains", "knapsack"}),
    frozenset({"nbsmt", "lba", "lightnorm", "tensorcore", "pipeline"}),
    frozenset({"wings", "grammar", "plots"}),
    frozenset({"policy", "emulate", "calibrate", "repair", "saving", "silicon"}),
    frozenset({"costs", "dies"}),
    frozenset({"search", "study"}),
    frozenset({"training", "report"}),
    frozenset({"cli"}),
    frozenset({"recoup", "__main__"}),
)
WINGS = frozenset({"nbsmt", "lba", "lightnorm", "tensorcore", "pipeline"})

# Who may import a library: rooms or modules below the root.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "llvmlite": (
        *("kernels", "formats.cpu*", "nbsmt.codes", "nbsmt.combine", "nbsmt.emit*", "lba", "lightnorm.fused"),
        *("pipeline.native", "tensorcore.emit*"),
    ),
    "numba": (
        "kernels",
        "formats.cpu*",
        "lightnorm.cpu*",
        "lightnorm.fused",
        "lightnorm.rows.cpu*",
        "silicon.*kernels",
        "tensorcore.block_kernels",
    ),
    "triton": ("kernels.operators", "formats.gpu*", "nbsmt.gpu*", "lba.gpu*", "lightnorm.gpu*", "tensorcore.gpu*"),
    "pysat": ("silicon.cycle",),
    "amaranth": ("gates", "silicon", "nbsmt.rtl", "lba.rtl", "lightnorm.rtl", "tensorcore.rtl"),
    "scipy": ("knapsack", "study.intervals", "pipeline.analysis", "search"),
    "dask": ("tasks.cluster", "tasks.jobs"),
    "dask_jobqueue": ("tasks.jobs",),
    "transformers": ("network.hugging_face", "lba.hugging_face", "models"),
    "safetensors": ("storage", "models", "saving", "training", "cli.demo"),
    "datasets": ("data.hub",),
    "pyarrow": ("data.cifar",),
    "PIL": ("data",),
    "sklearn": ("data.digits",),
    "xxhash": ("nbsmt.prepare", "network.replay", "storage.digest"),
    "yaml": ("policy", "study", "cli"),
    "pydantic": ("policy", "search", "study", "training", "report"),
    "matplotlib": ("plots", "report"),
    "jinja2": ("report",),
    "rich": ("network.batches", "study.progress", "training.progress", "report.terminal", "cli"),
    "typer": ("cli",),
    "torchvision": (),  # its wheel needs the CUDA build of torch
}
EVERYONE = frozenset({"torch", "numpy"})
# What `import recoup` may load; extras that may be missing and what only some commands need come later.
AT_ONCE = frozenset({"llvmlite", "numba", "scipy", "safetensors", "xxhash", "rich"})

# What speaks of a wing in code.
WORDS: dict[str, re.Pattern[str]] = {
    "nbsmt": re.compile(r"(?i:nb-?smt|sysmt)"),
    "lba": re.compile(r"(?<![A-Za-z])lba(?![a-z])|LBA|(?i:fmaq)"),
    "lightnorm": re.compile(r"(?i:light[_-]?norm)"),
    "tensorcore": re.compile(r"(?i:tensor[_-]?core)"),
    "pipeline": re.compile(r"(?i:pipeline)"),
}

PER_WING = "one file a wing, for the wings that have one"
# Reasons that stay. Keys are those of the findings; `*` stands for any letters.
OWED: dict[str, dict[str, str]] = {
    "words": {
        "recoup/__init__.py: *": "the public names",
        "recoup/wings.py: *": "the wings there are",
        "recoup/cli/demo.py: *": "the demo's chapters are chosen by hand",
        "recoup/formats/spec.py: lba": "Float.lba is the name of a number format",
        "recoup/search/narrow.py: lba": "a search for narrow accumulators alone, until searches go over all wings",
        "recoup/study/measures/__init__.py: pipeline": "the studies that there are beside a recipe's, a line each",
        "recoup/grammar.py: lba": "the same in the grammar of configs",
        "recoup/kernels/llvm.py: pipeline": "LLVM's own pipeline of passes",
        "recoup/training/*.py: pipeline": "training as a pipeline does is one of its two loops",
        "recoup/cli/train.py: pipeline": "the option of that loop",
        **{
            f"recoup/{room}/{wing}.*: {wing}": PER_WING
            for wing in WINGS
            for room in ("study/measures", "report/chapters", "plots")
        },
    },
    "libraries": {
        "recoup/pipeline/schedule.py: matplotlib": "rc.pipeline.gantt draws its figure itself, and imports it then",
    },
    "long functions": {
        "recoup/cli/train.py:train": "a parameter an option, each with its help",
    },
}


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree.of_folder(FOLDER)


def judged(
    rule: str,
    found: Findings,
    owed: Mapping[str, Mapping[str, str]] = OWED,
    known: Mapping[str, frozenset[str]] = KNOWN,
) -> list[str]:
    """What is neither owed nor known, and the entries of both that are no longer found."""
    reasons, debts = owed.get(rule, {}), known.get(rule, frozenset())
    left = {key: place for key, place in found.items() if not any(fnmatchcase(key, pattern) for pattern in reasons)}
    new = [f"{place} [{rule}]" for key, place in left.items() if key not in debts]
    stale = [f"{key} is mended: strike it out of KNOWN[{rule!r}]" for key in sorted(debts - left.keys())]
    needless = [
        f"{pattern} is not found: strike it out of OWED[{rule!r}]"
        for pattern, reason in reasons.items()
        if reason != PER_WING and not any(fnmatchcase(key, pattern) for key in found)
    ]
    return new + stale + needless


def settle(rule: str, found: Findings) -> None:
    """Fail with all that `judged` has to say, a line each."""
    left = judged(rule, found)
    assert not left, "\n" + "\n".join(left)


def test_every_room_has_a_floor_and_arrows_point_down(tree: Tree):
    settle("floors", unlisted(tree, FLOORS))
    settle("arrows", upward(tree, FLOORS))


def test_a_room_is_on_one_floor():
    rooms = [room for floor in FLOORS for room in floor]
    assert len(rooms) == len(set(rooms))


def test_a_wing_never_imports_another(tree: Tree):
    settle("wings", between_wings(tree, WINGS))


def test_there_are_no_circles(tree: Tree):
    settle("circles", circles(tree.edges))
    settle("circles of rooms", circles(room_edges(tree)))


def test_libraries_are_imported_by_their_users_alone(tree: Tree):
    settle("libraries", misplaced(tree, LIBRARIES, EVERYONE))


def test_importing_recoup_loads_no_extras_and_nothing_of_one_command_alone(tree: Tree):
    settle("loaded", loaded_at_once(tree, "recoup", frozenset(LIBRARIES) - AT_ONCE))


def test_no_name_hides_a_module(tree: Tree):
    settle("hidden", hidden_modules(tree))


def test_nobody_outside_a_wing_asks_for_its_classes(tree: Tree):
    settle("chains", chains(tree, WINGS))


def test_nobody_outside_a_wing_speaks_of_it(tree: Tree):
    settle("words", wing_words(tree, WORDS) | template_words(FOLDER, WORDS))


def test_files_and_functions_can_be_seen_whole(tree: Tree):
    settle("long files", long_files(tree, LONGEST_FILE))
    settle("long functions", long_functions(tree, LONGEST_FUNCTION))


def test_every_room_has_tests(tree: Tree):
    settle("tests", untested_rooms(tree, Path(__file__).parent))


def test_every_module_says_its_job(tree: Tree):
    settle("jobs", without_a_job(tree))


def test_every_wing_has_its_words(tree: Tree):
    """A new wing is added to all three tables: WINGS, WORDS, FLOORS."""
    assert set(WORDS) == WINGS
    assert WINGS in FLOORS
    assert len(tree) > 150  # the folder was found


def test_judgement():
    owed, known = {"r": {"a/*: x": "a reason", "z/*: x": PER_WING}}, {"r": frozenset({"b", "c"})}
    assert judged("r", {"a/1: x": "a/1:5: x", "b": "b:1: b", "c": "c:1: c"}, owed, known) == []
    assert judged("r", {"a/1: y": "a/1:5: y", "c": "c:1: c"}, owed, known) == [
        "a/1:5: y [r]",
        "b is mended: strike it out of KNOWN['r']",
        "a/*: x is not found: strike it out of OWED['r']",
    ]
    assert judged("s", {"a/1: x": "a/1:5: x"}, owed, known) == ["a/1:5: x [s]"]
