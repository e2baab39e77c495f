"""Hardware configurations as text: a preset's name or a configuration's repr, read without running anything."""

import ast
import warnings
from collections.abc import Callable
from typing import Any

from recoup.errors import RecoupError, RecoupWarning
from recoup.formats import Float, Int
from recoup.wings import cards, is_config

Config = Any
"""A config object of any registered wing."""

FORMATS: dict[str, Callable[..., Any]] = {
    "Float": Float,
    "Float.lba": Float.lba,
    "Float.ieee": Float.ieee,
    "Float.parse": Float.parse,
    "Int": Int,
}
"""The number formats that a config's text may call, whatever its wing."""
LONGEST, DEEPEST = 1000, 4  # characters and calls; Python's parser is not meant for hostile depth


def presets() -> dict[str, Config]:
    """Every wing's presets by name."""
    return {name: config for card in cards().values() for name, config in card.presets.items()}


def config_calls() -> dict[str, Callable[..., Any]]:
    """What the text of a configuration, as a whole, may call: the wings' constructors."""
    return {name: call for card in cards().values() for name, call in card.callables.items()}


def constructors() -> dict[str, Callable[..., Any]]:
    """What a configuration's text may call, and nothing else: the wings' constructors and the number formats."""
    return config_calls() | FORMATS


def examples() -> str:
    """One config text a wing, for errors and help."""
    texts = [card.example or next(map(repr, card.presets.values()), "") for card in cards().values()]
    named = [text for text in texts if text]
    return f"{', '.join(named[:-1])} or {named[-1]}" if len(named) > 1 else "".join(named)


def _legal() -> str:
    known = f"a preset ({', '.join(presets())}) or a repr such as {examples()}"
    return f"{known}; hardware of your own is known once its module is imported (--wing package.module)"


def parse_config(text: str) -> Config:
    """The configuration that ``text`` names: a preset, or the repr of a config object.

    Only the constructors of configurations and formats are called, with plain values.

    Raises:
        RecoupError: anything else, and values the config itself refuses.

    >>> parse_config("nbsmt-4t")
    NBSMT(threads=4, policy='S+A', rounding='nearest', pairing='halves')
    >>> parse_config("LightNorm(forward=Float.parse('bfloat16'))").forward.bits
    16
    >>> parse_config("LBA(accumulator=Float.lba(4, 5, bias=10), chunk=None)").accumulator.bits
    10
    """
    if not isinstance(text, str):
        raise RecoupError(f"config {text!r}: must be a text: a preset, or the repr of a config")
    name = text.strip()
    former = {old: new for card in cards().values() for old, new in card.renamed.items()}
    if name in former:
        warnings.warn(f"config {name!r} is called {former[name]!r} now: write that", RecoupWarning, stacklevel=2)
    if (name := former.get(name, name)) in (known := presets()):
        return known[name]
    config = _built(_tree(name), text, DEEPEST)
    if not is_config(config):
        raise RecoupError(f"config {_short(text)}: must be {_legal()}")
    return config


def parse_format(text: str) -> Any:
    """The number format or config that ``text`` calls by its constructor.

    >>> parse_format("Float.parse('bfloat16')").bits
    16
    """
    return _built(_tree(text.strip()), text, DEEPEST)


def written(config: Config, purpose: str) -> str:
    """A config's text, where it is to be read back: in recipes, files and rows of results.

    Raises:
        RecoupError: text that `parse_config` does not read, or reads as another config.
    """
    text = repr(config)
    try:
        read = parse_config(text)
    except RecoupError:
        read = None
    if type(read) is not type(config) or read != config:
        became = "cannot be read back" if read is None else f"would be read back as {_short(repr(read))}, not as it is"
        calls = ", ".join(name for name, call in constructors().items() if call is type(config)) or "its constructors"
        raise RecoupError(
            f"{purpose}: the text of this config, {_short(text)}, {became}; its repr must name every field in a call "
            f"of what its wing's card registers ({calls}), with plain values, as a dataclass of a module does"
        )
    return text


def as_config(value: Any) -> Config:
    """A configuration from itself or its text; for recipes."""
    if is_config(value):
        return value
    if isinstance(value, str):
        return parse_config(value)
    raise RecoupError(f"config {_short(repr(value))}: must be {_legal()}")


def _tree(text: str) -> ast.expr:
    if len(text) > LONGEST:
        raise RecoupError(f"config {_short(text)}: longer than {LONGEST} characters; must be {_legal()}")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise RecoupError(f"config {_short(text)}: must be {_legal()}{_unclosed(text)}") from None
    if not isinstance(tree, ast.Call):
        raise RecoupError(f"config {_short(text)}: must be {_legal()}")
    return tree


def _built(node: ast.expr, text: str, depth: int) -> Any:
    """The value of an expression of constructors and plain values, or of a tuple of them."""
    if isinstance(node, ast.Tuple) and depth > 0:
        return tuple(_built(each, text, depth - 1) for each in node.elts)
    if not isinstance(node, ast.Call):
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError):
            raise RecoupError(f"config {_short(text)}: arguments must be plain numbers or quoted strings") from None
    constructor = constructors().get(ast.unparse(node.func))
    if constructor is None or depth == 0:
        inner = "arguments must be plain numbers or quoted strings, or formats such as Float.lba(4, 7, bias=10)"
        raise RecoupError(f"config {_short(text)}: {inner if depth < DEEPEST else 'must be ' + _legal()}")
    keywords = [keyword.arg for keyword in node.keywords]
    if None in keywords or len(set(keywords)) < len(keywords):
        raise RecoupError(f"config {_short(text)}: arguments must be given once, as name=value")
    positional = [_built(value, text, depth - 1) for value in node.args]
    named = {str(keyword.arg): _built(keyword.value, text, depth - 1) for keyword in node.keywords}
    try:
        return constructor(*positional, **named)
    except RecoupError:
        raise
    except (TypeError, ValueError) as error:  # an unknown or doubled argument, or a value that no field takes
        raise RecoupError(f"config {_short(text)}: {str(error).replace('.__init__', '')}") from None


def _unclosed(text: str) -> str:
    split = text.count("(") != text.count(")")
    return "; in a YAML list in brackets put it in double quotes, or the comma splits it" if split else ""


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
