"""Questions of the kind "which wing is this?": tests for a wing's class outside its folder.

A chain of them ends in an *else* that is an old idea, and a new wing gets its answers. Found are ``isinstance`` and
``issubclass``, class patterns of ``match``, comparisons of ``type(x)`` and ``x.__class__``, dictionaries keyed by such
classes, and registrations with a ``singledispatch``, whatever the class is called by then: imported through a package,
renamed, in a union or a tuple with a name of its own.
"""

import ast
from collections.abc import Iterator

from tests.architecture.tree import ROOT, Findings, Source, Tree

Name = tuple[str, str]  # a module and a name in it


def chains(tree: Tree, wings: frozenset[str]) -> Findings:
    """``module: Class`` below the root -> where it asks for that class of a wing that it does not belong to."""
    classes = _classes(tree, wings)
    found: Findings = {}
    for source in tree.values():
        if source.room in wings:
            continue
        scope = _Scope(tree, source, classes)
        for node, _ in source.nodes:
            for asked in _asked(node):
                for name in scope.classes_in(asked):
                    key = f"{source.name.removeprefix(ROOT + '.')}: {name}"
                    found.setdefault(key, f"{source.path}:{asked.lineno}: asks whether something is a {name}")
    return found


def _asked(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions in a node that hold the classes it asks for."""
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in ("isinstance", "issubclass") and len(node.args) == 2:
            yield node.args[1]
        elif called == "register" and node.args and isinstance(node.args[0], ast.Name | ast.Attribute):
            yield node.args[0]
    elif isinstance(node, ast.MatchClass):
        yield node.cls
    elif isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        if any(_is_type_of(side) for side in sides):
            yield from (side for side in sides if not _is_type_of(side))
    elif isinstance(node, ast.Dict):
        yield from (key for key in node.keys if key is not None)
    elif isinstance(node, ast.DictComp):
        yield node.key


def _is_type_of(node: ast.expr) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id == "type" and len(node.args) == 1
    return isinstance(node, ast.Attribute) and node.attr == "__class__"


class _Scope:
    """The names of one module that stand for classes of wings."""

    def __init__(self, tree: Tree, source: Source, classes: dict[Name, frozenset[str]]) -> None:
        self.source, self.classes = source, classes
        imported = tree.imports_of[source.name]
        self.modules = {found.bound: found.target for found in imported if found.name is None}
        self.names = {found.bound: (found.target, found.name) for found in imported if found.name is not None}

    def classes_in(self, node: ast.expr) -> list[str]:
        """The wings' classes that an expression names outside of calls and strings, sorted."""
        found: set[str] = set()
        if isinstance(node, ast.Name):
            found |= self._known((self.source.name, node.id)) | self._known(self.names.get(node.id))
        elif isinstance(node, ast.Attribute):
            module = ast.unparse(node.value)
            found |= self._known((self.modules.get(module, module), node.attr))
        elif isinstance(node, ast.BinOp | ast.Tuple | ast.List | ast.Set | ast.Subscript | ast.Starred):
            for part in ast.iter_child_nodes(node):
                found |= set(self.classes_in(part)) if isinstance(part, ast.expr) else set()
        return sorted(found)

    def _known(self, name: Name | None) -> frozenset[str]:
        return frozenset() if name is None else self.classes.get(name, frozenset())


def _classes(tree: Tree, wings: frozenset[str]) -> dict[Name, frozenset[str]]:
    """Every name in every module that stands for classes that a wing defines, and the names of those."""
    classes: dict[Name, frozenset[str]] = {}
    for source in tree.values():
        if source.room in wings:
            for node in source.tree.body:
                if isinstance(node, ast.ClassDef):
                    classes[source.name, node.name] = frozenset([node.name])
    before: dict[Name, frozenset[str]] = {}
    while before != classes:
        before = dict(classes)
        for found in tree.imports:  # through packages, and under other names
            if found.name is not None and (found.target, found.name) in classes:
                classes[found.source.name, found.bound] = classes[found.target, found.name]
        for source in tree.values():
            _add_unions(_Scope(tree, source, classes), classes)
    return classes


def _add_unions(scope: _Scope, classes: dict[Name, frozenset[str]]) -> None:
    """``Config = NBSMT | LBA`` and ``KINDS = (NBSMT, LBA)``: the name stands for all of them."""
    for node in scope.source.tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        named = frozenset(scope.classes_in(node.value))
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            if named and isinstance(target, ast.Name):
                classes[scope.source.name, target.id] = named
