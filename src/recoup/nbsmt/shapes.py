"""What was made for input shapes, kept while it takes little memory."""

from typing import Any

KEPT = 4
"""Shapes kept whatever they take: enough to switch between a few."""

BYTES = 1 << 24
"""What more of them may take, with those: sentences have dozens of lengths, and packing a weight for one takes several
times as long as the product."""

LEAST = 1 << 10
"""What is counted for one at least: its key."""

MISSING = object()
"""What is got for a shape that nothing was made for: what was made may be None."""


class Shapes(dict[tuple, Any]):
    """What was made for input shapes, by shape; the oldest go first."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes: dict[tuple, int] = {}

    def keep(self, key: tuple, made: Any, size: int) -> None:
        """Keep what was made, of ``size`` bytes. Several threads may."""
        size = max(size, LEAST)
        while len(self) >= KEPT and sum(list(self._bytes.values())) + size > BYTES:
            for oldest in list(self)[:1]:
                self.pop(oldest, None)
                self._bytes.pop(oldest, None)
        self[key], self._bytes[key] = made, size
