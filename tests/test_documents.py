"""README.md and docs: their Python compiles and names what there is, and their commands are commands that there are.

Nothing of them is run here; tests/test_blocks.py does that. A block of Python is parsed: its imports must lead
somewhere, its `rc.` names must exist, and what it calls by such a name must take the arguments. A command line of a
block goes through the command's own parser; one quoted in a sentence may be a part of one, so only its command and its
options are looked up.
"""

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import recoup
from recoup.cli.main import COMMANDS, app
from recoup.grammar import parse_config
from recoup.study.configs import layer_option
from tests.blocks import blocks
from tests.test_docstrings import MISSING, follow

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in DOCUMENTS}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"`([^`\n]+)`")
PYTHON = [
    (page, block.body)
    for page in TEXTS
    for block in blocks(page)
    if block.language == "python" and block.reason is None
]
SHELL = [(name, body) for name, text in TEXTS.items() for language, body in FENCED.findall(text) if language == "sh"]
USAGE = typer.BadParameter.__mro__[1]  # the error of every parser: click's, or that of typer's own copy of it
OTHERS = {"torchrun", "git", "cd", "."}
"""What a shell block may begin with that is neither ours nor Python's."""


@pytest.mark.parametrize("document", TEXTS)
def test_blocks_say_what_they_are(document):
    """An even number of fences, and on every other one a language."""
    fences = re.findall(r"^```.*$", TEXTS[document], re.MULTILINE)
    assert set(fences[::2]) <= {"```python", "```sh", "```yaml", "```text", "```math"}
    assert set(fences[1::2]) <= {"```"}
    assert len(fences) % 2 == 0


def commands(document: str, language: str) -> list[str]:
    """The lines of code of a document's blocks, without comments."""
    lines = "".join(body for kind, body in FENCED.findall(TEXTS[document]) if kind == language).splitlines()
    return [line for line in (line.partition("#")[0].rstrip() for line in lines) if line]


def test_the_readme_and_start_say_the_same():
    """Start's commands and Python are README's, whose extras and Start's are those that there are."""
    assert set(commands("docs/index.md", "sh")) <= set(commands("README.md", "sh"))
    assert set(commands("docs/index.md", "python")) <= set(commands("README.md", "python"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = set(project["optional-dependencies"]) - {"dev"}
    assert set(re.findall(r"^\| `\.\[(\w+)\]`", TEXTS["docs/index.md"], re.MULTILINE)) == extras
    (listed,) = re.findall(r"extras: '\.\[([\w,]+)\]'", TEXTS["README.md"])
    assert set(listed.split(",")) == extras


def sentences(text: str) -> str:
    return FENCED.sub("", text)


def dotted(node: ast.AST) -> str | None:
    """``rc.lba.matmul`` of such an expression."""
    text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
    return text if re.fullmatch(r"rc(\.\w+)+", text) else None


def faults_of_python(body: str) -> Iterator[str]:
    """What is wrong with a block of Python, as far as that can be told without running it."""
    for node in ast.walk(ast.parse(body)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != "recoup":
            yield from [node.module or "."] if importlib.util.find_spec(node.module or ".") is None else []
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            yield from (f"{node.module}.{one.name}" for one in node.names if follow(module, [one.name]) is MISSING)
        elif isinstance(node, ast.Import):
            yield from (one.name for one in node.names if importlib.util.find_spec(one.name) is None)
        elif name := dotted(node):
            if follow(recoup, name.split(".")[1:]) is MISSING:
                yield name
        elif isinstance(node, ast.Call) and (name := dotted(node.func)):
            yield from refused(name, node)


def refused(name: str, call: ast.Call) -> Iterator[str]:
    """The call, where what it names exists and does not take such arguments."""
    function = follow(recoup, name.split(".")[1:])
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    if function is MISSING or any(isinstance(given, ast.Starred) for given in call.args):
        return
    try:
        inspect.signature(function).bind(*call.args, **keywords)
    except TypeError as error:
        yield f"{ast.unparse(call)}: {error}"


@pytest.mark.parametrize(("document", "body"), PYTHON, ids=[name for name, _ in PYTHON])
def test_python_blocks_name_what_there_is(document, body):
    assert not list(faults_of_python(body))


@pytest.mark.parametrize("document", TEXTS)
def test_yaml_blocks_are_yaml(document):
    for language, body in FENCED.findall(TEXTS[document]):
        assert language != "yaml" or isinstance(yaml.safe_load(body), dict)


@pytest.mark.parametrize("document", TEXTS)
def test_names_in_sentences_exist(document):
    names = [
        match
        for quoted in QUOTED.findall(sentences(TEXTS[document]))
        for match in re.findall(r"\b(?:rc|recoup)(?:\.\w+)+", quoted)
    ]
    names = [name for name in names if not name.endswith(".safetensors")]  # files
    assert [name for name in names if follow(recoup, name.split(".")[1:]) is MISSING] == []


@cache
def command(name: str) -> Any:
    """A command with its options, as a call gets it."""
    return recoup_command().resolve_command(typer.Context(recoup_command()), [name])[1]


@cache
def recoup_command() -> Any:
    return typer.main.get_command(app)


def parsed(words: list[str]) -> None:
    """Parse a whole command line; what stands for hardware in it must be hardware."""
    if words[1].startswith("-"):
        recoup_command().make_context("recoup", words[1:], resilient_parsing=True)
        return
    values = command(words[1]).make_context(words[1], words[2:]).params
    configs = values.get("config") or []
    for config in [configs] if isinstance(configs, str) else configs:
        parse_config(config)
    for layer in values.get("layers") or []:
        layer_option(layer)


def shell_lines(body: str) -> Iterator[list[str]]:
    """The command lines of a block, without comments."""
    for line in body.replace("\\\n", " ").splitlines():
        for part in line.split(" && "):
            if words := shlex.split(part, comments=True):
                yield words


def check_line(words: list[str]) -> None:
    """A line of a block is a command of ours, a target of the Makefile, a script that is there, or one of OTHERS."""
    first = words[0].rpartition("/")[2]
    if first == "recoup" or words[:3] == ["python", "-m", "recoup"]:
        parsed(words if first == "recoup" else words[2:])
    elif first == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif first in ("python", "python3", "pip"):
        assert all((ROOT / word).exists() for word in words[1:] if word.endswith((".py", ".txt")))
    else:
        assert first in OTHERS, f"{words}: what is this?"


@pytest.mark.parametrize(("document", "body"), SHELL, ids=[name for name, _ in SHELL])
def test_shell_blocks_hold_commands_that_parse(document, body):
    for words in shell_lines(body):
        check_line(words)


@pytest.mark.parametrize("document", TEXTS)
def test_commands_in_sentences_exist(document):
    """Whole command lines parse; of parts, the command and the options are there."""
    for quoted in QUOTED.findall(sentences(TEXTS[document])):
        words = quoted.split()
        if words[0] == "recoup" and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in COMMANDS, quoted
            known = {option for one in command(words[1]).params for option in (*one.opts, *one.secondary_opts)}
            assert {word for word in words[2:] if word.startswith("--")} <= known, quoted
        elif re.fullmatch(r"python (benchmarks|examples|scripts)/\w+\.py", quoted):
            assert (ROOT / words[1]).exists(), quoted
        elif words[0] == "make" and len(words) == 2:
            check_line(words)


def test_the_checks_find_faults():
    wrong = (
        "import recoup as rc\nrc.nothing\nrc.LBA.biased(mantis=3)\nrc.evaluate(model)\nfrom recoup.search import widest"
    )
    assert len(list(faults_of_python(wrong))) == 4
    for line in ("recoup evaluate --modle x", "recoup evaluate --model x", "recoup judge"):
        with pytest.raises(USAGE):
            parsed(shlex.split(line))
    with pytest.raises(recoup.RecoupError):
        parsed(shlex.split("recoup evaluate --model x --data digits --config LBA.biased(99,4)"))
    with pytest.raises(AssertionError):
        check_line(["make", "nonsense"])
