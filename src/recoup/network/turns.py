"""Hooks lie on a network, which several threads may run: each hears its own pass, and not that of another thread."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

_now: ContextVar[object | None] = ContextVar("recoup_turn", default=None)


@dataclass(frozen=True, slots=True)
class Turn:
    """A pass, which the thread that began it runs."""

    token: object

    @property
    def here(self) -> bool:
        """Whether the thread that asks began this pass."""
        return _now.get() is self.token

    @property
    def heard(self) -> bool:
        """Whether it began this one or none: a network may have threads of its own."""
        return _now.get() in (self.token, None)


@contextmanager
def turn() -> Iterator[Turn]:
    """A pass for the time, of all who ask on this thread meanwhile."""
    token = _now.get() or object()
    before = _now.set(token)
    try:
        yield Turn(token)
    finally:
        _now.reset(before)
