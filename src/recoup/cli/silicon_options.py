"""Options of generators as `recoup silicon --set NAME=VALUE` takes them: read, and given to those that have them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer

from recoup.cli.common import distinct, pair
from recoup.errors import RecoupError


def values_of(changes: Iterable[str]) -> dict[str, Any]:
    """The options by name.

    Raises:
        RecoupError: no NAME=VALUE, or one name twice.
    """
    return distinct(map(_change, changes), "--set")


def chosen_of(
    values: Mapping[str, Any], names: Sequence[str], legal: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Of some values those that each generator has as options; what one leaves out is said by the config's name.

    Raises:
        RecoupError: an option that none of the generators has.
    """
    for name, value in values.items():
        lacking = [text for text, options in zip(names, legal, strict=True) if name not in options]
        if len(lacking) == len(legal):
            known = ", ".join(dict.fromkeys(option for options in legal for option in options)) or "none"
            raise RecoupError(f"silicon: {name}={value!r}: no such option; legal are {known}")
        for text in lacking:
            typer.echo(f"{text}: {name} is no option of its generator and is left out", err=True)
    return [{name: value for name, value in values.items() if name in options} for options in legal]


def _change(text: str) -> tuple[str, Any]:
    """An option's name and value: a format by its constructor, else plain YAML."""
    from recoup.grammar import parse_format

    name, value = pair(text, "--set")
    return name, parse_format(value) if isinstance(value, str) and "(" in value else value
