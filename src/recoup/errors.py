"""The one exception and the one warning of recoup."""

import sys

BETWEEN = ("recoup", "torch", "contextlib")
"""Whose code may stand between a user's line and a warning."""


class RecoupError(ValueError):
    """A request recoup cannot honour.

    The message names what was asked, what is legal and, inside a network, the layer and its shape::

        RecoupError: NBSMT(threads=3): threads must be 1, 2 or 4

    Args:
        message: what is wrong.
        layers: the names of all layers that it is about, for programs that go on without them.
        remedy: what to do, in Python; it ends the message.
        options: the same in words of the command line, which says it instead.
    """

    def __init__(self, message: str = "", *, layers: tuple[str, ...] = (), remedy: str = "", options: str = "") -> None:
        super().__init__(message + remedy)
        self.message = message
        self.layers = layers
        self.on_command_line = message + (options or remedy)

    def advising(self, remedy: str) -> "RecoupError":
        """The same error with what to do where it is met: not all that calls a function has its arguments."""
        return RecoupError(self.message, layers=self.layers, remedy=remedy)


class RecoupWarning(UserWarning):
    """Something runs otherwise than the request may suggest, and correctly: a grouped convolution on one thread."""


def users_level() -> int:
    """The ``stacklevel`` with which a warning of who asks is told of the user's line: the nearest that is none of
    recoup's, nor of the decorators and context managers between."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in BETWEEN:
        level, frame = level + 1, frame.f_back
    return level
