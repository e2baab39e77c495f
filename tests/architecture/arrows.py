"""Who may import whom: floors, wings, circles."""

import ast
from collections.abc import Mapping, Sequence

from tests.architecture.tree import ROOT, Findings, Function, Tree, room_of


def unlisted(tree: Tree, floors: Sequence[frozenset[str]]) -> Findings:
    """Rooms that are on no floor."""
    listed = frozenset().union(*floors)
    return {
        source.room: f"{source.path}: '{source.room}' is on no floor: list it in FLOORS of tests/test_architecture.py"
        for source in tree.values()
        if source.room not in listed
    }


def upward(tree: Tree, floors: Sequence[frozenset[str]]) -> Findings:
    """Imports that point up, by file and target."""
    height = {room: number for number, rooms in enumerate(floors) for room in rooms}
    faults = {}
    for found in tree.imports:
        here, there = height.get(found.source.room, 0), height.get(room_of(found.target), 0)
        if found.target.split(".")[0] == ROOT and there > here:
            faults[found.key] = f"{found.place}: imports {found.target}, which lies {there - here} floors up"
    return faults


def between_wings(tree: Tree, wings: frozenset[str]) -> Findings:
    """Wings that import another wing, by file and target."""
    return {
        found.key: f"{found.place}: a wing imports another, {found.target}"
        for found in tree.imports
        if found.source.room in wings and found.target.split(".")[0] == ROOT
        if room_of(found.target) in wings - {found.source.room}
    }


def circles(edges: Mapping[str, set[str]]) -> Findings:
    """Groups of nodes that reach each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: Findings = {}

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(edges.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                key = " <-> ".join(sorted(group))
                found[key] = f"a circle: {key}"

    for node in edges:
        if node not in index:
            visit(node)
    return found


def room_edges(tree: Tree) -> dict[str, set[str]]:
    """Which rooms each room imports."""
    edges: dict[str, set[str]] = {source.room: set() for source in tree.values()}
    for name, targets in tree.edges.items():
        edges[room_of(name)] |= {room_of(target) for target in targets} - {room_of(name)}
    return edges


def hidden_modules(tree: Tree) -> Findings:
    """Names of a package that hide the module of that name: ``import recoup.lba.plan as m`` would give the function."""
    faults = {}
    for package in (source for source in tree.values() if source.package):
        for name, target, line in _bound(tree, package.name):
            module = f"{package.name}.{name}"
            if module in tree and target != module:
                faults[module] = f"{package.path}:{line}: '{name}' hides the module {module}"
    return faults


def _bound(tree: Tree, package: str) -> list[tuple[str, str | None, int]]:
    """The names that a package's ``__init__`` binds, the module if it is one, and the line."""
    bound = [
        (found.bound, found.target if found.name is None else None, found.line)
        for found in tree.imports
        if found.source.name == package and found.eager
    ]
    for node in tree[package].tree.body:
        if isinstance(node, Function | ast.ClassDef):
            bound.append((node.name, None, node.lineno))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound += [(target.id, None, node.lineno) for target in targets if isinstance(target, ast.Name)]
    return bound
