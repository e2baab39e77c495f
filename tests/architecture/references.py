"""What a document says about the code: the files, folders and ``file:name`` that it quotes, and whether they are there.

A quotation in backticks is a reference where it is a path: it has a slash or one of `SUFFIXES`, and no space. A path
starts at the repository, or at src/recoup; one that starts with ``..`` lies outside, and is none of ours. `{a,b}` and
`<wing>` stand for several: all of the first, at least one of the second.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SUFFIXES = (".py", ".md", ".j2", ".toml", ".txt", ".json", ".yaml")
QUOTED = re.compile(r"`([^`\n]+)`")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"(?P<path>[\w./{},<>*-]+?)(?::(?P<name>[\w.]+))?")


def references(text: str) -> Iterator[tuple[str, str | None]]:
    """The paths that a Markdown text quotes, and the names within them."""
    for quoted in QUOTED.findall(FENCED.sub("", text)):
        match = PATH.fullmatch(quoted)
        if match and not quoted.startswith("..") and ("/" in match["path"] or match["path"].endswith(SUFFIXES)):
            yield match["path"], match["name"]


def missing(text: str, root: Path, placeholders: dict[str, tuple[str, ...]]) -> list[str]:
    """The references of a text that lead nowhere in the repository at ``root``."""
    faults = []
    for path, name in references(text):
        quoted = path if name is None else f"{path}:{name}"
        found = [[_found(root, each) for each in _spread(one)] for one in _filled(path, placeholders)]
        files = [file for each in found if None not in each for file in each if file is not None]
        if not files:
            faults.append(f"{quoted}: no such file or folder")
        elif name is not None and not any(name in names_in(file) for file in files):
            faults.append(f"{quoted}: the file defines no {name}")
    return faults


@cache
def names_in(file: Path) -> frozenset[str]:
    """All names that a file defines: functions, classes, their methods and fields, constants."""
    if file.suffix != ".py":
        return frozenset()
    return frozenset(_names(ast.parse(file.read_text("utf-8")), ""))


def _names(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in getattr(node, "body", []):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name
        elif isinstance(child, ast.ClassDef):
            yield prefix + child.name
            yield from _names(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.Assign | ast.AnnAssign):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


def _filled(path: str, placeholders: dict[str, tuple[str, ...]]) -> list[str]:
    """A path with every placeholder in its place, such as ``<wing>``."""
    paths = [path]
    for placeholder, values in placeholders.items():
        paths = [
            one.replace(placeholder, value) for one in paths for value in (values if placeholder in one else ("",))
        ]
    return paths


def _spread(path: str) -> list[str]:
    """``a/{b,c}.py`` as two paths."""
    match = re.search(r"\{([^}]*)\}", path)
    if match is None:
        return [path]
    return [
        each for part in match[1].split(",") for each in _spread(path[: match.start()] + part + path[match.end() :])
    ]


def _found(root: Path, path: str) -> Path | None:
    for base in (root, root / "src" / "recoup"):
        if "*" in path:
            first = next(iter(sorted(base.glob(path))), None)
            if first is not None:
                return first
        elif (base / path).exists():
            return base / path
    return None
