"""A package as source text: its modules, and every import in them, those inside functions and for type checkers too."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = "recoup"
Findings = dict[str, str]  # what is wrong, by a key that does not change when lines move; and where it is
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file: ``recoup.lba.config``; a package's ``__init__`` has the package's name."""

    name: str
    text: str
    package: bool = False

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed file; ``cached_property`` writes past the frozen dataclass."""
        return ast.parse(self.text, self.name)

    @cached_property
    def nodes(self) -> tuple[tuple[ast.AST, bool], ...]:
        """Every node, and whether it runs when the module is imported."""
        return tuple(_walk(self.tree, eager=True))

    @property
    def path(self) -> str:
        """Where it lies below src, for messages."""
        return self.name.replace(".", "/") + ("/__init__.py" if self.package else ".py")

    @property
    def room(self) -> str:
        """The first part below the root: a folder, or a module of the top level; the root is its own."""
        return room_of(self.name)


@dataclass(frozen=True)
class Import:
    """One name that one module takes from another.

    Attributes:
        source: the file that imports.
        target: the module, as deep as it is one: ``from recoup import data`` and ``import recoup.data`` are
            ``recoup.data``.
        name: what is taken out of the target, None for the module itself.
        bound: what it is called here.
        line: where.
        eager: whether importing the file runs it: neither in a function nor for type checkers only.
    """

    source: Source
    target: str
    name: str | None
    bound: str
    line: int
    eager: bool

    @property
    def place(self) -> str:
        """File and line, for messages."""
        return f"{self.source.path}:{self.line}"

    @property
    def key(self) -> str:
        """File and target, which stay when lines move."""
        return f"{self.source.path} -> {self.target}"


class Tree(Mapping[str, Source]):
    """The modules of a package by dotted name."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = dict(sources)

    @classmethod
    def of_folder(cls, folder: Path) -> "Tree":
        """Of the package in ``folder``."""
        found = {}
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if package else parts)
            found[name] = Source(name, path.read_text("utf-8"), package)
        return cls(found)

    @classmethod
    def of_texts(cls, texts: Mapping[str, str]) -> "Tree":
        """Of source texts by module name below the root; missing packages are empty ones."""
        found = {ROOT: Source(ROOT, "", package=True)}
        for name in texts:
            parts = name.split(".")
            for end in range(1, len(parts)):
                package = ".".join([ROOT, *parts[:end]])
                found[package] = Source(package, texts.get(".".join(parts[:end]), ""), package=True)
        for name, text in texts.items():
            full = f"{ROOT}.{name}" if name else ROOT
            found[full] = Source(full, text, package=full in found)
        return cls(found)

    def __getitem__(self, name: str) -> Source:
        return self._sources[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        """All imports of all modules."""
        return tuple(found for source in self.values() for found in self._imports(source))

    @cached_property
    def imports_of(self) -> dict[str, list[Import]]:
        """The imports of each module."""
        return {name: [found for found in self.imports if found.source.name == name] for name in self}

    @cached_property
    def edges(self) -> dict[str, set[str]]:
        """Which modules of the package each one imports."""
        edges: dict[str, set[str]] = {name: set() for name in self}
        for found in self.imports:
            if found.target in self and found.target != found.source.name:
                edges[found.source.name].add(found.target)
        return edges

    def _imports(self, source: Source) -> Iterator[Import]:
        for node, eager in source.nodes:
            line = getattr(node, "lineno", 0)
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(source, alias.name, None, alias.asname or alias.name, line, eager)
            elif isinstance(node, ast.ImportFrom):
                base = _base(source, node)
                for alias in node.names:
                    bound, full = alias.asname or alias.name, f"{base}.{alias.name}"
                    deeper = full in self
                    yield Import(source, full if deeper else base, None if deeper else alias.name, bound, line, eager)
            elif (name := _imported_by_call(node)) is not None:
                yield Import(source, name, None, name, line, eager)


def room_of(name: str) -> str:
    """The room of a module: ``recoup.lba.config`` is in ``lba``, ``recoup.emulate`` in ``emulate``."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def _walk(node: ast.AST, eager: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, eager
        inside = isinstance(child, Function | ast.Lambda) or (isinstance(child, ast.If) and _for_checkers(child.test))
        yield from _walk(child, eager and not inside)


def _for_checkers(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in ast.unparse(test)


def _base(source: Source, node: ast.ImportFrom) -> str:
    """The module of ``from ... import``, dots resolved."""
    if not node.level:
        return node.module or ""
    parts = source.name.split(".")
    kept = parts[: len(parts) - node.level + source.package]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _imported_by_call(node: ast.AST) -> str | None:
    """The module of ``importlib.import_module("...")`` or ``__import__("...")``."""
    if not isinstance(node, ast.Call) or not node.args:
        return None
    named = ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__")
    first = node.args[0]
    return first.value if named and isinstance(first, ast.Constant) and isinstance(first.value, str) else None
