"""How long files and functions are, whether a file says its job, and whether a room has tests."""

import ast
from pathlib import Path

from tests.architecture.tree import Findings, Function, Tree

ABBREVIATIONS = ("e.g.", "i.e.", "vs.", "cf.")
FEWEST_WORDS = 3


def long_files(tree: Tree, limit: int) -> Findings:
    """Files of more than ``limit`` lines: path -> finding."""
    counts = {source.path: source.text.count("\n") for source in tree.values()}
    return {path: f"{path}: {count} lines" for path, count in counts.items() if count > limit}


def long_functions(tree: Tree, limit: int) -> Findings:
    """Functions of more than ``limit`` lines, signature and docstring included: ``path:name`` -> finding."""
    faults = {}
    for source in tree.values():
        for name, node in functions(source.tree):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > limit:
                faults[f"{source.path}:{name}"] = f"{source.path}:{node.lineno}: {name} has {lines} lines"
    return faults


def functions(tree: ast.AST, prefix: str = "") -> list[tuple[str, Function]]:
    """All functions with their dotted names, methods and inner ones included."""
    found: list[tuple[str, Function]] = []
    for node in ast.iter_child_nodes(tree):
        name = f"{prefix}{node.name}" if isinstance(node, Function | ast.ClassDef) else ""
        if isinstance(node, Function):
            found.append((name, node))
        found += functions(node, f"{name}." if name else prefix)
    return found


def without_a_job(tree: Tree) -> Findings:
    """Modules whose docstring does not begin with a sentence."""
    faults = {}
    for source in tree.values():
        sentence = _first_sentence(ast.get_docstring(source.tree) or "")
        if not sentence:
            faults[source.path] = f"{source.path}: its docstring must begin with a sentence that says its job"
        elif len(sentence.split()) < FEWEST_WORDS:
            faults[source.path] = f"{source.path}: {sentence!r} does not say its job"
    return faults


def untested_rooms(tree: Tree, tests: Path) -> Findings:
    """Folders with code that have no folder of tests of the same name."""
    folders = {source.path.rpartition("/")[0] for source in tree.values() if not source.package}
    inner = [folder for folder in sorted(folders) if "/" in folder]
    return {
        folder: f"{folder}: has no tests in {tests.name}/{folder.partition('/')[2]}"
        for folder in inner
        if not any((tests / folder.partition("/")[2]).glob("test_*.py"))
    }


def _first_sentence(text: str) -> str:
    """Up to the first full stop, or a colon that ends the first paragraph; '' where there is neither."""
    words = text.partition("\n\n")[0].split()
    for number, word in enumerate(words, 1):
        last = number == len(words)
        if word not in ABBREVIATIONS and (word.endswith((".", "?", "!")) or (last and word.endswith((":", "::")))):
            return " ".join(words[:number])
    return ""
