"""Boolean expressions of Liberty as tuples: ("and", a, b), ("or", ...), ("xor", ...), ("not", a), names, 0, 1."""

import re

from recoup.errors import RecoupError

Logic = str | int | tuple
"""A name, 0 or 1, or an operator with its operands."""

_TOKEN = re.compile(r"\s*([A-Za-z_][\w\[\]]*|[01()!'&*|+^])")
_NAMES = {"&": "and", "*": "and", "|": "or", "+": "or", "^": "xor"}


def parse(text: str) -> Logic:
    """An expression: ``!``, postfix ``'``, then ``^``, then ``&``, ``*`` or nothing, then ``|`` or ``+``.

    Raises:
        RecoupError: it is none.

    >>> parse("!(A B + C')")
    ('not', ('or', ('and', 'A', 'B'), ('not', 'C')))
    """
    tokens, place = [], 0
    text = text.strip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise RecoupError(f"liberty: {text!r} is no expression")
        tokens.append(match.group(1))
        place = match.end()
    tokens.append("")
    tree, rest = _sum(tokens, 0)
    if tokens[rest] or not text:
        raise RecoupError(f"liberty: {text!r} is no expression")
    return tree


def _sum(tokens: list[str], place: int) -> tuple[Logic, int]:
    left, place = _product(tokens, place)
    while tokens[place] in ("|", "+"):
        right, place = _product(tokens, place + 1)
        left = ("or", left, right)
    return left, place


def _product(tokens: list[str], place: int) -> tuple[Logic, int]:
    left, place = _difference(tokens, place)
    while tokens[place] and tokens[place] not in ("|", "+", ")", "'", "^"):
        right, place = _difference(tokens, place + (tokens[place] in ("&", "*")))
        left = ("and", left, right)
    return left, place


def _difference(tokens: list[str], place: int) -> tuple[Logic, int]:
    left, place = _factor(tokens, place)
    while tokens[place] == "^":
        right, place = _factor(tokens, place + 1)
        left = ("xor", left, right)
    return left, place


def _factor(tokens: list[str], place: int) -> tuple[Logic, int]:
    word = tokens[place]
    if word == "!":
        inner, place = _factor(tokens, place + 1)
        return ("not", inner), place
    if word == "(":
        inner, place = _sum(tokens, place + 1)
        if tokens[place] != ")":
            raise RecoupError(f"liberty: {' '.join(tokens)!r}: a parenthesis is not closed")
        place += 1
    elif word in ("0", "1"):
        inner, place = int(word), place + 1
    elif word and (word[0].isalpha() or word[0] == "_"):
        inner, place = word, place + 1
    else:
        raise RecoupError(f"liberty: {' '.join(tokens)!r} is no expression")
    while tokens[place] == "'":
        inner, place = ("not", inner), place + 1
    return inner, place


def names(tree: Logic) -> tuple[str, ...]:
    """The names in an expression, each once, in order."""
    if isinstance(tree, str):
        return (tree,)
    if isinstance(tree, int):
        return ()
    return tuple(dict.fromkeys(name for part in tree[1:] for name in names(part)))


def value(tree: Logic, given: dict[str, bool]) -> bool:
    """An expression's value."""
    if isinstance(tree, str):
        return given[tree]
    if isinstance(tree, int):
        return bool(tree)
    parts = [value(part, given) for part in tree[1:]]
    if tree[0] == "not":
        return not parts[0]
    return {"and": parts[0] and parts[-1], "or": parts[0] or parts[-1], "xor": parts[0] != parts[-1]}[tree[0]]
