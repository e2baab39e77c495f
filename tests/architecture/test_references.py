"""What a document quotes is found, and what is not there is told."""

from pathlib import Path

import pytest

from tests.architecture.references import missing, references

WINGS = {"<wing>": ("one", "two")}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    code = "LIMIT = 3\nwidth: int = 4\n\ndef run(x): ...\n\nclass A:\n    field: int\n    def step(self): ...\n"
    for name in ("src/recoup/one/ops.py", "src/recoup/two/rtl.py", "tests/one/test_ops.py", "Makefile"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    return tmp_path


@pytest.mark.parametrize(
    "quoted",
    [
        "`one/ops.py`",
        "`src/recoup/one/ops.py`",
        "`one/`",
        "`tests/one/test_ops.py:run`",
        "`one/ops.py:A.step`",
        "`one/ops.py:A.field`",
        "`one/ops.py:LIMIT`",
        "`one/ops.py:width`",
        "`<wing>/rtl.py`",
        "`<wing>/ops.py:run`",
        "`{one/ops,two/rtl}.py`",
        "`tests/*/test_ops.py`",
        "`make test` and `a / b` and `rc.evaluate`",
        "`NBSMT(threads=4)`, `Card.measure`, `../shared/data`",
        "```\n`gone/file.py`\n```",
    ],
)
def test_what_is_there(root: Path, quoted: str):
    assert missing(f"See\n{quoted}\n", root, WINGS) == []


@pytest.mark.parametrize(
    ("quoted", "told"),
    [
        ("gone/ops.py", "gone/ops.py: no such file or folder"),
        ("gone.py", "gone.py: no such file or folder"),
        ("gone/", "gone/: no such file or folder"),
        ("one/ops.py:gone", "one/ops.py:gone: the file defines no gone"),
        ("one/ops.py:step", "one/ops.py:step: the file defines no step"),
        ("one/ops.py:A.gone", "one/ops.py:A.gone: the file defines no A.gone"),
        ("one/:run", "one/:run: the file defines no run"),
        ("<wing>/gone.py", "<wing>/gone.py: no such file or folder"),
        ("<wing>/ops.py:gone", "<wing>/ops.py:gone: the file defines no gone"),
        ("{one,two}/ops.py", "{one,two}/ops.py: no such file or folder"),
        ("tests/*/test_gone.py", "tests/*/test_gone.py: no such file or folder"),
    ],
)
def test_what_is_missing(root: Path, quoted: str, told: str):
    assert missing(f"See `{quoted}`, and `one/ops.py`.", root, WINGS) == [told]


def test_the_references_of_a_text():
    text = "1. `a/b.py:f` calls `c.md`\n2. `x` and `y z/w`, `pyproject.toml`\n"
    assert list(references(text)) == [("a/b.py", "f"), ("c.md", None), ("pyproject.toml", None)]
