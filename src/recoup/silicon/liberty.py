"""Reads Liberty text: groups, attributes and their lines. `recoup.silicon.cells` says what they mean.

A cell is parsed when it is asked for: a library has hundreds and a netlist some forty. Source: the Liberty User Guide.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recoup.errors import RecoupError

_TOKEN = re.compile(r'\s+|/\*.*?\*/|//[^\n]*|\\\n|"((?:[^"\\]|\\.|\\\n)*)"|([(){}:;,])|([^\s(){}:;,"]+)', re.DOTALL)
_CELL = re.compile(r'^\s*cell\s*\(\s*"?([^")\s]+)"?\s*\)\s*\{', re.MULTILINE)
_BRACES = re.compile(r'"(?:[^"\\]|\\.)*"|/\*.*?\*/|[{}]', re.DOTALL)


@dataclass(slots=True)
class Group:
    """A group of Liberty: ``kind (args) { name : value; name (values); group ... }``."""

    kind: str
    args: tuple[str, ...]
    values: dict[str, Any] = field(default_factory=dict)
    groups: list["Group"] = field(default_factory=list)

    def all(self, kind: str) -> list["Group"]:
        """The groups of a kind."""
        return [group for group in self.groups if group.kind == kind]

    def one(self, kind: str) -> "Group | None":
        """The first group of a kind."""
        return next((group for group in self.groups if group.kind == kind), None)

    def number(self, name: str, default: float | None = None) -> float:
        """A value as a number.

        Raises:
            RecoupError: it is missing (without a default) or no number.
        """
        value = self.values.get(name, default)
        try:
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise RecoupError(f"liberty: {self.kind} {'/'.join(self.args)}: {name} is {value!r}, no number") from None


def tokens(text: str, path: str, line: int = 1) -> Iterator[tuple[str, str, int]]:
    """Words, strings and marks with their lines."""
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise RecoupError(f"liberty: {path}, line {line}: cannot read {text[place : place + 20]!r}")
        string, mark, word = match.groups()
        if mark or word:
            yield ("mark" if mark else "word"), mark or word, line
        elif string is not None:
            yield "word", re.sub(r"\\\s*\n", "", string), line
        line += match.group().count("\n")
        place = match.end()


class _Reader:
    """Reads one group from tokens."""

    def __init__(self, text: str, path: str, line: int = 1) -> None:
        self.path = path
        self.stream = tokens(text, path, line)
        self.line = line
        self.back: tuple[str, str, int] | None = None

    def next(self) -> tuple[str, str]:
        """The next token.

        Raises:
            RecoupError: the text ends within a group.
        """
        token = self.back or next(self.stream, None)
        self.back = None
        if token is not None:
            self.line = token[2]
            return token[:2]
        raise RecoupError(f"liberty: {self.path}: ends within a group that is open in line {self.line}")

    def wrong(self, text: str) -> RecoupError:
        """The error of an unexpected token."""
        return RecoupError(f"liberty: {self.path}, line {self.line}: {text!r} is unexpected")

    def arguments(self) -> tuple[str, ...]:
        """What stands in parentheses, after the opening one."""
        words = []
        while True:
            kind, text = self.next()
            if (kind, text) == ("mark", ")"):
                return tuple(words)
            if kind == "word":
                words.append(text)
            elif text not in (",", ":"):
                raise self.wrong(text)

    def body(self, group: Group) -> Group:
        """Everything up to the closing brace."""
        while True:
            kind, name = self.next()
            if kind == "mark":
                if name == "}":
                    return group
                if name == ";":
                    continue
                raise self.wrong(name)
            _, mark = self.next()
            if mark == ":":
                group.values[name] = self.value()
            elif mark == "(":
                self.complex(group, name)
            else:
                raise self.wrong(mark)

    def value(self) -> str:
        """A simple attribute's value, to the semicolon or the end of its line."""
        words = [self.next()[1]]
        line = self.line
        for token in self.stream:
            kind, text, here = token
            if (kind, text) == ("mark", ";"):
                return " ".join(words)
            if here != line or text == "}":
                self.back = token
                return " ".join(words)
            words.append(text)
        raise RecoupError(f"liberty: {self.path}: ends after line {self.line}")

    def complex(self, group: Group, name: str) -> None:
        """``name (args);`` or ``name (args) { ... }``."""
        args = self.arguments()
        _, mark = self.next()
        if mark == "{":
            group.groups.append(self.body(Group(name, args)))
        elif mark == ";":
            if name == "fanout_length":  # the one attribute of its kind that repeats
                group.values[name] = (*group.values.get(name, ()), args)
            else:
                group.values.setdefault(name, args)
        else:
            raise self.wrong(mark)


class File:
    """One library file: its head is parsed at once, a cell when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise RecoupError(f"liberty: {str(path)!r} cannot be read: {error}") from error
        if not re.search(r"^\s*library\s*\(", self.text, re.MULTILINE):
            raise RecoupError(f"liberty: {path.name}: has no library group: is it a Liberty file?")
        self.places = self._cells()
        if not self.places:
            raise RecoupError(f"liberty: {path.name}: the library has no cell")
        first = min(start for start, _ in self.places.values())
        reader = _Reader(self.text[:first] + "\n}", path.name)
        _ = reader.next(), reader.next()  # the word and its parenthesis
        name = reader.arguments()
        reader.next()
        self.head = reader.body(Group("library", name))

    def _cells(self) -> dict[str, tuple[int, int]]:
        """Where every cell's group begins, and where it ends at the latest.

        Raises:
            RecoupError: a brace is missing or left over.
        """
        if self.text.count("{") != self.text.count("}"):
            self._look_for_the_brace()
        found = [(match.group(1), match.start()) for match in _CELL.finditer(self.text)]
        ends = [start for _, start in found[1:]] + [len(self.text)]
        return {name: (start, end) for (name, start), end in zip(found, ends, strict=True)}

    def _look_for_the_brace(self) -> None:
        """The error of braces that do not match, with its place."""
        depth, cell = 0, "its head"
        starts = {match.end() - 1: match.group(1) for match in _CELL.finditer(self.text)}
        for match in _BRACES.finditer(self.text):
            if match.start() in starts:
                line = self.text.count("\n", 0, match.start()) + 1
                if depth != 1:
                    raise RecoupError(f"liberty: {self.path.name}: before line {line}, in {cell}: a brace is missing")
                cell = f"cell {starts[match.start()]} (line {line})"
            depth += {"{": 1, "}": -1}.get(match.group(), 0)
        raise RecoupError(f"liberty: {self.path.name}: a brace is missing or left over in {cell}")

    def cell(self, name: str) -> Group:
        """A cell's group, parsed."""
        start, end = self.places[name]
        line = self.text.count("\n", 0, start) + 1
        reader = _Reader(self.text[start:end], self.path.name, line)
        _ = reader.next(), reader.next()  # the word and its parenthesis
        args = reader.arguments()
        reader.next()
        return reader.body(Group("cell", args))
