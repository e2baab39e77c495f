"""What every reader of images from disk shares: folders that must exist, splits that must be known, what to pick."""

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from recoup.errors import RecoupError

# Given all labels of a split, int64 [N], which images to read: int64 [M] positions. Reading only those saves decoding.
Pick = Callable[[Tensor], Tensor]


class NoSplitError(RecoupError):
    """A split that the data do not have."""


class TooFewError(RecoupError):
    """A split has fewer samples than are asked for: ``available``."""

    def __init__(self, message: str = "", *, available: int = 0) -> None:
        super().__init__(message)
        self.available = available


HELD_OUT = ("test", "validation", "valid", "val")


def folder(source: str, location: str) -> Path:
    """The folder a spec names.

    Raises:
        RecoupError: there is none, or it is a file.
    """
    path = Path(location).expanduser()
    if not path.exists():
        raise RecoupError(f"{source}:{location}: no such folder")
    if not path.is_dir():
        raise RecoupError(f"{source}:{location}: that is a file; {source} needs a folder")
    return path


def choose_split(what: str, asked: str, available: Iterable[str]) -> str:
    """The split that is meant by ``asked``: itself, or for ``"test"`` what the data call their held-out images.

    Raises:
        RecoupError: there is none such; the splits there are are listed.
    """
    names = tuple(available)
    for name in HELD_OUT if asked == "test" else (asked,):
        if name in names:
            return name
    raise NoSplitError(f"{what}: no split {asked!r}; there is {', '.join(names) or 'none'}")
