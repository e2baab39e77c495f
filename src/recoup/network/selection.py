"""Which layers of a model a request speaks of: maps from names and regular expressions, first match wins."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from recoup.errors import RecoupError

UNMATCHED = object()
"""What `Selection.of` returns for a name that no key matches."""


class Selection:
    """A layer map such as ``{"layer1.0.conv1": None, "re:layer3.*": NBSMT(threads=4)}``.

    Keys are exact names, or ``re:`` and a regular expression that must match the whole name. The first key that
    matches a name decides.

    Args:
        layers: the map; None or empty selects nothing.
        names: the layers there are.
        purpose: what the caller does; heads the errors.
        others: all modules by name, to say what a key names that is no layer.

    Raises:
        RecoupError: a key that matches no layer, or no valid regular expression.
    """

    def __init__(
        self,
        layers: Mapping[str, Any] | None,
        names: Iterable[str],
        purpose: str,
        others: Mapping[str, nn.Module] | None = None,
    ) -> None:
        if layers is not None and not isinstance(layers, Mapping):
            raise RecoupError(f"{purpose}: layers must be a map from names to values; got {type(layers).__name__}")
        names = list(names)
        self._keys = list(layers or {})
        self._rules = [(compiled(key, purpose), value) for key, value in (layers or {}).items()]
        for key, (pattern, _) in zip(self._keys, self._rules, strict=True):
            if not any(pattern.fullmatch(name) for name in names):
                raise RecoupError(
                    f"{purpose}: the layer map's key {key!r} matches no layer{_hint(key, names, others or {})}"
                )

    def of(self, name: str) -> Any:
        """The value of the first matching key, or UNMATCHED."""
        return next((value for pattern, value in self._rules if pattern.fullmatch(name)), UNMATCHED)

    def keys(self, name: str) -> list[str]:
        """The keys that match a name; the first one decides."""
        return [key for key, (pattern, _) in zip(self._keys, self._rules, strict=True) if pattern.fullmatch(name)]


def compiled(key: Any, purpose: str) -> re.Pattern[str]:
    """A key's pattern, or an error headed by the purpose."""
    if not isinstance(key, str):
        raise RecoupError(f"{purpose}: a layer map's keys are names or 're:...' strings; got {key!r}")
    try:
        return re.compile(key.removeprefix("re:") if key.startswith("re:") else re.escape(key))
    except re.error as error:
        raise RecoupError(f"{purpose}: {key!r} is no regular expression: {error}") from None


def _kind(kind: type[nn.Module]) -> str:
    """Its name; of a subclass also torch's class, which a key may have meant."""
    torchs = next(base for base in kind.__mro__ if base.__module__.startswith("torch.nn."))
    if torchs in (kind, nn.Module):
        return kind.__name__
    return f"{kind.__name__}, a subclass of {torchs.__name__} that may compute something else"


def _hint(key: str, names: list[str], others: Mapping[str, nn.Module]) -> str:
    if key in others and next(others[key].children(), None) is None:
        return f" that can be chosen; it is a {_kind(type(others[key]))}"
    if any(name.startswith(key + ".") for name in names):
        return f"; it is a container, did you mean 're:{re.escape(key)}\\..*'?"
    close = difflib.get_close_matches(key, names, 3) or names[:8]
    return f"; of {len(names)} there are {', '.join(map(repr, close))}" if names else "; there are none"
