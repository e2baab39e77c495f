"""Which libraries are used, by whom, and which of them importing the package already loads."""

import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase

from tests.architecture.tree import ROOT, Findings, Tree

Users = Mapping[str, tuple[str, ...]]


def misplaced(tree: Tree, users: Users, everyone: frozenset[str]) -> Findings:
    """Imports of libraries by modules that are not their users, and libraries that nobody has listed.

    ``users`` holds the rooms or modules below the root that use a library, ``*`` for any letters; ``everyone`` the
    libraries that all may use.
    """
    faults = {}
    for found in tree.imports:
        library, key = found.target.split(".")[0], f"{found.source.path}: {found.target.split('.')[0]}"
        if library == ROOT or library in everyone or library in sys.stdlib_module_names:
            continue
        if library not in users:
            faults[key] = f"{found.place}: {library} is not listed: add it to LIBRARIES of tests/test_architecture.py"
        elif not any(inside(found.source.name, owner) for owner in users[library]):
            faults[key] = f"{found.place}: {library} is for {', '.join(users[library]) or 'nobody'}"
    return faults


def loaded_at_once(tree: Tree, start: str, libraries: frozenset[str]) -> Findings:
    """What of ``libraries`` importing the module ``start`` loads, by file."""
    eager: dict[str, list[tuple[str, str]]] = {name: [] for name in tree}
    for found in tree.imports:
        if found.eager:
            eager[found.source.name].append((found.target, found.place))
    faults: Findings = {}
    waiting, seen = [start], {start}
    while waiting:
        module = waiting.pop()
        for target, place in eager[module]:
            if (library := target.split(".")[0]) in libraries:
                key = f"{tree[module].path}: {library}"
                faults[key] = f"{place}: {library} is loaded by `import {start}`; import it where it is used"
            new = [name for name in _with_packages(tree, target) if name not in seen]
            seen.update(new)
            waiting += new
    return faults


def inside(name: str, owner: str) -> bool:
    """Whether a module is ``owner``, a room or module below the root, or lies in it."""
    below = name.removeprefix(f"{ROOT}.")
    return fnmatchcase(below, owner) or fnmatchcase(below, f"{owner}.*")


def _with_packages(tree: Tree, target: str) -> list[str]:
    """A module and the packages around it, which Python imports first."""
    parts = target.split(".")
    names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return [name for name in names if name in tree]
