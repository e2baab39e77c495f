"""Docstrings are true: their examples run, and the names they quote exist.

What counts as a name is decided by the quotes. Single back-quotes refer: what stands between them and has the form of
a Python name, dotted or not (`Float.lba`, `quantize`, `recoup.nbsmt.cost`), must exist. Other text between them
(`recoup train`) is none. Double back-quotes are code, with values, parameters and file names of its own; of those only
names that begin with ``recoup.`` or ``rc.`` are looked up.

A name is looked up from where its docstring stands, outwards: in the classes around it, in its module, in each package
around that up to ``recoup``; a dotted one at last as another library's. ``recoup.`` and ``rc.`` begin at the package.
Every part after the first is an attribute, a field or a submodule of what the parts before it name. What a class has is
read from its source too, since annotations and what ``__init__`` assigns are no attributes of the class.
"""

import ast
import doctest
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

import pytest

import recoup

QUOTED = re.compile(r"(?<!`)(`{1,2})([^`\n]+)\1(?!`)")
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
ABSOLUTE = ("recoup.", "rc.")
NOT_IMPORTED = {"recoup.__main__": "importing it runs the command line"}
EXTRAS = {"triton": "the extra recoup[gpu] is not installed"}  # modules whose import may fail, and then why

FOUND = pkgutil.walk_packages(recoup.__path__, "recoup.")
MODULES = ["recoup", *(module.name for module in FOUND if module.name not in NOT_IMPORTED)]
MISSING = object()


@cache
def source(name: str) -> str:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        pytest.skip(EXTRAS[error.name])


@pytest.mark.parametrize("name", [name for name in MODULES if ">>>" in source(name)])
def test_every_example_runs(name: str) -> None:
    result = doctest.testmod(module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted
    assert not result.failed


def docstrings(tree: ast.Module) -> Iterator[tuple[list[str], str]]:
    """Every docstring, with the names of the classes around it, outermost first."""

    def inside(node: ast.AST, classes: list[str]) -> Iterator[tuple[list[str], str]]:
        if isinstance(node, ast.ClassDef):
            classes = [*classes, node.name]
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield classes, ast.get_docstring(node) or ""
        for child in ast.iter_child_nodes(node):
            yield from inside(child, classes)

    yield from inside(tree, [])


def quoted_names(docstring: str) -> Iterator[str]:
    for quotes, text in QUOTED.findall(docstring):
        name = text.removesuffix("()")
        if NAME.fullmatch(name) and (len(quotes) == 1 or name.startswith(ABSOLUTE)):
            yield name


def is_assigned_to_self(node: ast.AST) -> TypeGuard[ast.Attribute]:
    if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Store):
        return False
    return isinstance(node.value, ast.Name) and node.value.id == "self"


@cache
def assigned(owner: type) -> set[str]:
    """What a class of recoup and its bases annotate, and assign to ``self``."""
    found = set()
    for base in owner.__mro__:
        found |= set(vars(base).get("__annotations__", ()))
        if base.__module__.split(".")[0] != "recoup":
            continue
        for node in ast.walk(ast.parse(source(base.__module__))):
            if isinstance(node, ast.ClassDef) and node.name == base.__name__:
                found |= {part.attr for part in ast.walk(node) if is_assigned_to_self(part)}
    return found


def member(owner: Any, name: str) -> Any:
    """An attribute, field or submodule; `MISSING` if there is none, None if it exists only in instances."""
    if hasattr(owner, name):
        return getattr(owner, name)
    if isinstance(owner, ModuleType) and hasattr(owner, "__path__"):
        full = f"{owner.__name__}.{name}"
        if importlib.util.find_spec(full):
            return module(full)
    if isinstance(owner, type) and name in assigned(owner):
        return None
    return MISSING


def follow(owner: Any, parts: list[str]) -> Any:
    for part in parts:
        owner = member(owner, part)
        if owner is MISSING:
            return MISSING
    return owner


def places(name: str, classes: list[str]) -> Iterator[Any]:
    """Where a name of this module's docstrings is looked up, from the inside out."""
    here = module(name)
    for depth in range(len(classes), 0, -1):
        owner = follow(here, classes[:depth])
        if owner is not MISSING:
            yield owner
    yield here
    while "." in name:
        name = name.rpartition(".")[0]
        yield module(name)


def exists(quoted: str, name: str, classes: list[str]) -> bool:
    first, *others = quoted.split(".")
    if quoted.startswith(ABSOLUTE):
        return follow(recoup, others) is not MISSING
    if any(follow(place, [first, *others]) is not MISSING for place in places(name, classes)):
        return True
    return bool(others) and importlib.util.find_spec(first) is not None and follow(module(first), others) is not MISSING


@pytest.mark.parametrize("name", MODULES)
def test_every_quoted_name_exists(name: str) -> None:
    tree = ast.parse(source(name))
    cited = [(quoted, classes) for classes, docstring in docstrings(tree) for quoted in quoted_names(docstring)]
    wrong = [(quoted, ".".join(classes)) for quoted, classes in cited if not exists(quoted, name, classes)]
    assert not wrong


@pytest.mark.parametrize(
    ("quoted", "name", "classes", "expected"),
    [
        ("Float.lba", "recoup.formats.spec", [], True),
        ("lba", "recoup.formats.reference", [], True),  # the wing, from the package
        ("ieee", "recoup.formats.reference", [], False),
        ("ieee", "recoup.formats.reference", ["Float"], True),
        ("largest", "recoup.formats.spec", ["Float"], True),  # a field
        ("largest", "recoup.formats.spec", [], False),
        ("Float.smallest", "recoup.formats.spec", [], False),
        ("constants.kernel_dtype", "recoup.formats.cpu", [], True),
        ("constants.kernel_dtype", "recoup.nbsmt.cpu", [], False),
        ("formats.constants.kernel_dtype", "recoup.nbsmt.cpu", [], True),
        ("recoup.formats.quantize", "recoup.lba.ops", [], True),
        ("recoup.formats.quantise", "recoup.lba.ops", [], False),
        ("rc.formats.nothing.quantize", "recoup.lba.ops", [], False),
        ("torch.autograd.Function", "recoup.version", [], True),
        ("torch.autograd.Funktion", "recoup.version", [], False),
        ("json", "recoup.version", [], False),  # a single word is not looked for in other libraries
    ],
)
def test_what_exists(quoted: str, name: str, classes: list[str], expected: bool) -> None:
    assert exists(quoted, name, classes) == expected


def test_which_names_are_quoted() -> None:
    docstring = (
        "`Float.lba()` of `recoup train`, ``config.gradient``, ``recoup.a.b`` and ``rc.c``; ```x```, `1.5`, `_d`"
    )
    assert list(quoted_names(docstring)) == ["Float.lba", "recoup.a.b", "rc.c", "_d"]
