"""Hardware configurations as text: a preset's name or a configuration's repr, read without running anything."""

import ast
from typing import Any

from recoup.errors import RecoupError
from recoup.nbsmt.config import NBSMT

PRESETS: dict[str, NBSMT] = {"nbsmt-2t": NBSMT(threads=2), "nbsmt-4t": NBSMT(threads=4)}
CLASSES: dict[str, type[NBSMT]] = {"NBSMT": NBSMT}
LONGEST = 500  # characters; far beyond any configuration, and Python's parser is not meant for hostile depth

_LEGAL = f"a preset ({', '.join(PRESETS)}) or a repr such as NBSMT(threads=4, policy='S+A')"


def parse_config(text: str) -> NBSMT:
    """The configuration that ``text`` names: a preset, or the repr of a config object with literal arguments only.

    Raises:
        RecoupError: anything else, and values the config itself refuses.

    >>> parse_config("nbsmt-4t")
    NBSMT(threads=4, policy='S+A', rounding='nearest', pairing='halves')
    >>> parse_config("NBSMT(2, policy='S+Aw')").policy
    'S+Aw'
    """
    name = text.strip()
    if name in PRESETS:
        return PRESETS[name]
    kind, call = _call(name)
    keywords = [keyword.arg for keyword in call.keywords]
    try:
        positional = [ast.literal_eval(value) for value in call.args]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, TypeError):
        raise RecoupError(f"config {_short(text)}: arguments must be plain numbers or quoted strings") from None
    if None in keywords or len(set(keywords)) < len(keywords):
        raise RecoupError(f"config {_short(text)}: arguments must be given once, as name=value")
    try:
        return kind(*positional, **named)
    except TypeError as error:  # an unknown or doubled argument, or a value of a type no field takes
        raise RecoupError(f"config {_short(text)}: {str(error).replace('.__init__', '')}") from None


def as_config(value: Any) -> NBSMT:
    """A configuration from itself or its text; for recipes."""
    if isinstance(value, NBSMT):
        return value
    if isinstance(value, str):
        return parse_config(value)
    raise RecoupError(f"config {_short(repr(value))}: must be {_LEGAL}")


def title(config: NBSMT) -> str:
    """How tables call a configuration: threads and policy, and what differs from the defaults.

    >>> title(NBSMT(4, "S+Aw", "half_up"))
    '4 threads, S+Aw, rounding half_up'
    """
    plain = NBSMT()
    fields = [f for f in ("rounding", "pairing") if getattr(config, f) != getattr(plain, f)]
    extra = [f"{field} {getattr(config, field)}" for field in fields]
    threads = f"{config.threads} thread{'s' if config.threads > 1 else ''}"
    return ", ".join([threads, config.policy, *extra])


def _call(text: str) -> tuple[type[NBSMT], ast.Call]:
    if len(text) > LONGEST:
        raise RecoupError(f"config {_short(text)}: longer than {LONGEST} characters; must be {_LEGAL}")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise RecoupError(f"config {_short(text)}: must be {_LEGAL}{_unclosed(text)}") from None
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.func.id not in CLASSES:
        raise RecoupError(f"config {_short(text)}: must be {_LEGAL}")
    return CLASSES[tree.func.id], tree


def _unclosed(text: str) -> str:
    split = text.count("(") != text.count(")")
    return "; in a YAML list in brackets put it in double quotes, or the comma splits it" if split else ""


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
