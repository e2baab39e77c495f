"""What frozen values are made of: checks of their fields, copies with changes, plain values; and hardware's configs."""

import json
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any, Self, TypeGuard

from recoup.errors import RecoupError

__all__ = ["Config", "Value", "boolean", "choice", "finite", "integer", "is_number", "location", "number"]


def integer(owner: str, name: str, value: Any, legal: tuple[int, int], note: str = "") -> int:
    """``value`` as an int within the legal range, or an error that names the field and the range."""
    low, high = legal
    try:
        index = operator.index(value)
    except (TypeError, RuntimeError):  # the latter of tensors without values
        index = None
    if index is not None and not isinstance(value, bool) and low <= index <= high:
        return index
    raise RecoupError(f"{owner}({name}={value!r}): {name} must be an integer from {low} to {high}{note}")


def choice(owner: str, name: str, value: Any, legal: tuple[str, ...]) -> None:
    """An error that lists the legal words unless ``value`` is one of them."""
    if not isinstance(value, str) or value not in legal:
        raise RecoupError(f"{owner}({name}={value!r}): {name} must be one of {', '.join(map(repr, legal))}")


def number(owner: str, name: str, value: Any, legal: tuple[float, float]) -> float:
    """``value`` as a float within the legal range, or an error; NaN lies in none."""
    low, high = legal
    if is_number(value) and low <= value <= high:
        return float(value)
    raise RecoupError(f"{owner}({name}={value!r}): {name} must be a number from {low:g} to {high:g}")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is a real number; a bool is none, nor is a tensor."""
    return isinstance(value, Real) and not isinstance(value, bool)


def finite(owner: str, name: str, value: Any, note: str = "") -> float:
    """``value`` as a float that is neither NaN nor infinite, or an error."""
    if is_number(value) and -math.inf < value < math.inf:
        return float(value)
    raise RecoupError(f"{owner}({name}={value!r}): {name} must be a number{note}")


def location(owner: str, name: str, value: Any) -> Path:
    """``value`` as a path, or an error."""
    if isinstance(value, str | os.PathLike):
        return Path(value)
    raise RecoupError(f"{owner}({name}={value!r}): {name} must be a path")


def boolean(owner: str, name: str, value: Any) -> None:
    """An error unless ``value`` is a bool: what is merely true may be a mistaken argument."""
    if not isinstance(value, bool):
        raise RecoupError(f"{owner}({name}={value!r}): {name} must be True or False")


class Value:
    """A frozen dataclass that can be copied with changes and become plain values for YAML and JSON."""

    __slots__ = ()

    @classmethod
    def inner(cls) -> tuple[type["Value"], ...]:
        """The classes of the values among its fields, for classes that have such fields."""
        return ()

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        self._check_names(changes)
        return replace(self, **changes)  # type: ignore[type-var]

    @classmethod
    def _check_names(cls, values: Iterable[str]) -> None:
        known = [f.name for f in fields(cls) if f.init]  # type: ignore[arg-type]
        for name in values:
            if name not in known:
                raise RecoupError(f"{cls.__name__}: unknown field {name!r}; the fields are {', '.join(known)}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values; a value among them is its own fields, under its class's name if `inner` has
        several; of a tuple that holds such values each is, in a list."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}  # type: ignore[arg-type]
        return {name: self._written(value) for name, value in values.items()}

    @classmethod
    def _written(cls, value: Any) -> Any:
        inner = cls.inner()
        if isinstance(value, tuple) and any(isinstance(each, inner) for each in value):
            return [cls._written(each) for each in value]
        if not isinstance(value, inner):
            return value
        return value.to_dict() if len(inner) == 1 else {type(value).__name__: value.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; an unknown field is an error that names it."""
        if not isinstance(values, Mapping):
            raise RecoupError(f"{cls.__name__}.from_dict: expected a map from fields to values; got {values!r}")
        cls._check_names(values)
        for f in fields(cls):  # type: ignore[arg-type]
            if f.init and f.default is MISSING and f.default_factory is MISSING and f.name not in values:
                raise RecoupError(f"{cls.__name__}.from_dict: the field {f.name!r} is missing")
        kinds = {kind.__name__: kind for kind in cls.inner()}
        return cls(**{name: cls._read(value, kinds) for name, value in values.items()})

    @classmethod
    def _read(cls, value: Any, kinds: dict[str, type["Value"]]) -> Any:
        if kinds and isinstance(value, list):
            return tuple(cls._read(each, kinds) for each in value)
        if not kinds or not isinstance(value, dict):
            return value
        if len(kinds) == 1:
            return next(iter(kinds.values())).from_dict(value)
        if len(value) != 1 or next(iter(value)) not in kinds:
            raise RecoupError(
                f"{cls.__name__}: {value!r} is no format; expected its fields under one of {', '.join(kinds)}"
            )
        name, inside = next(iter(value.items()))
        return kinds[name].from_dict(inside)

    def _changed(self, short: Callable[[Any], str] = repr) -> str:
        """A repr of what differs from the defaults; ``short`` writes a field's value."""
        told = ((f.name, getattr(self, f.name), f.default) for f in fields(self) if f.init)  # type: ignore[arg-type]
        named = [f"{name}={short(value)}" for name, value, default in told if value != default]
        return f"{type(self).__name__}({', '.join(named)})"

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True)
class Config(Value):
    """A hardware idea: a value that validates itself (`_check`) and that an operator takes as a string, its ``code``.

    A subclass is a frozen dataclass with slots:

        @dataclass(frozen=True, slots=True)
        class Truncation(Config):
            bits: int = 8

            def _check(self) -> None:
                self._set("bits", integer("Truncation", "bits", self.bits, (1, 16)))

    Attributes:
        code: `to_dict` as JSON. It is made once, with the config: compilers trace it as a plain string.

    Raises:
        RecoupError: whatever `_check` refuses.
    """

    code: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check()
        self._set("code", json.dumps(self.to_dict()))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made of values by name: by place, as slots make them, they end with a new field."""
        return type(self).from_dict, (self.to_dict(),)

    def _check(self) -> None:
        """Refuse what is not legal, and bring fields into their own types."""

    @classmethod
    def from_code(cls, code: str) -> Self:
        """The config of a ``code``; one object for all calls with it."""
        return _decoded(cls, code)


@lru_cache(maxsize=1024)
def _decoded(kind: type[Config], code: str) -> Any:
    return kind.from_dict(json.loads(code))
