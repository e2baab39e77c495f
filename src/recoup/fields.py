"""Checks of a format's fields, and what every format can do: copy itself with changes, become plain values."""

import operator
from dataclasses import fields, replace
from typing import Any, Self

from recoup.errors import RecoupError

__all__ = ["Format", "boolean", "choice", "integer"]


def integer(owner: str, name: str, value: Any, legal: tuple[int, int], note: str = "") -> int:
    """``value`` as an int within the legal range, or an error that names the field and the range."""
    low, high = legal
    try:
        index = operator.index(value)
    except TypeError:
        index = None
    if index is not None and not isinstance(value, bool) and low <= index <= high:
        return index
    raise RecoupError(f"{owner}({name}={value!r}): {name} must be an integer from {low} to {high}{note}")


def choice(owner: str, name: str, value: Any, legal: tuple[str, ...]) -> None:
    """An error that lists the legal words unless ``value`` is one of them."""
    if value not in legal:
        raise RecoupError(f"{owner}({name}={value!r}): {name} must be one of {', '.join(map(repr, legal))}")


def boolean(owner: str, name: str, value: Any) -> None:
    """An error unless ``value`` is a bool: what is merely true may be a mistaken argument."""
    if not isinstance(value, bool):
        raise RecoupError(f"{owner}({name}={value!r}): {name} must be True or False")


class Format:
    """What the formats share: copies with changes, and plain values for YAML and JSON."""

    __slots__ = ()

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; an unknown field is an error that names it."""
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for name in values:
            if name not in known:
                raise RecoupError(f"{cls.__name__}: unknown field {name!r}; the fields are {', '.join(known)}")
        return cls(**values)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
