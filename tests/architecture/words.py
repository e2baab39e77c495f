"""Words that belong to one wing, in files that are for all of them.

Looked at are identifiers, imports, and strings that are no docstrings: what a program says and does. Docstrings and
comments may name a wing, an example needs one. Templates are looked at whole.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.architecture.tree import Findings, Function, Source, Tree

Words = Mapping[str, re.Pattern[str]]


def wing_words(tree: Tree, words: Words) -> Findings:
    """``path: wing`` -> where a file outside the wing's folder speaks of it."""
    found: Findings = {}
    for source in tree.values():
        for text, line in _said(source):
            for wing, pattern in words.items():
                if source.room != wing and (word := pattern.search(text)):
                    place = f"{source.path}:{line}: says {word[0]!r}, which is {wing}'s"
                    found.setdefault(f"{source.path}: {wing}", place)
    return found


def template_words(folder: Path, words: Words, suffixes: tuple[str, ...] = (".j2", ".css")) -> Findings:
    """The same of the text files of a package, whose root is ``folder``."""
    found: Findings = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix not in suffixes:
            continue
        name = path.relative_to(folder.parent).as_posix()
        for number, text in enumerate(path.read_text("utf-8").splitlines(), 1):
            for wing, pattern in words.items():
                if word := pattern.search(text):
                    place = f"{name}:{number}: says {word[0]!r}, which is {wing}'s"
                    found.setdefault(f"{name}: {wing}", place)
    return found


def _said(source: Source) -> Iterator[tuple[str, int]]:
    """Every identifier, module and string of a file with its line, docstrings left out."""
    silent = _docstrings(source)
    for node, _ in source.nodes:
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield node.id, line
        elif isinstance(node, ast.Attribute):
            yield node.attr, line
        elif isinstance(node, ast.alias):
            yield f"{node.name} {node.asname or ''}", line
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", line
        elif isinstance(node, Function | ast.ClassDef):
            yield node.name, line
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg or "", line
        elif isinstance(node, ast.MatchAs | ast.MatchStar):
            yield node.name or "", line
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            yield node.value, line


def _docstrings(source: Source) -> set[int]:
    """The nodes of all docstrings, those under attributes and constants included: strings that are statements."""
    return {
        id(node.value)
        for node, _ in source.nodes
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
