"""Names of tensors in a file and in a network, which may differ by one common prefix."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from recoup.errors import RecoupError, RecoupWarning


@dataclass(frozen=True, slots=True)
class Rename:
    """From a file's names to a network's: take ``gone`` away in front, put ``put`` there."""

    gone: str = ""
    put: str = ""

    def __call__(self, name: str) -> str:
        """The network's name of a tensor."""
        return self.put + name.removeprefix(self.gone)

    def module(self, name: str) -> str:
        """The network's name of a module; "" is the network itself."""
        return self(f"{name}.").removesuffix(".") if name else self.put.removesuffix(".")


def renamed(theirs: Mapping[str, Tensor], own: Mapping[str, Tensor], purpose: str) -> Rename:
    """How a file's names become a network's.

    Raises:
        RecoupError: names that differ by more than a prefix, or shapes that differ; the first of each is named.

    Warns:
        RecoupWarning: names that differ by a prefix.
    """
    found = next((rename for rename in _candidates(theirs, own) if {rename(n) for n in theirs} == own.keys()), None)
    if found is None:
        missing = [name for name in own if name not in theirs][:1]
        unknown = [name for name in theirs if name not in own][:1]
        said = [f"it lacks {name!r}" for name in missing] + [
            f"it has {name!r}, which the model lacks" for name in unknown
        ]
        raise RecoupError(f"{purpose} is of another architecture: {'; '.join(said)}")
    for name, value in theirs.items():
        if value.shape != own[found(name)].shape:
            shapes = f"{list(value.shape)} in the file, {list(own[found(name)].shape)} in the model"
            raise RecoupError(f"{purpose} is of another architecture: {found(name)!r} is {shapes}")
    if found != Rename():
        change = f"without {found.gone!r}" if found.gone else f"with {found.put!r} before them"
        warnings.warn(f"{purpose}: its names fit the model's {change}", RecoupWarning, stacklevel=3)
    return found


def _candidates(theirs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[Rename]:
    """The renamings that the first name allows."""
    first = next(iter(theirs), "")
    longer = [Rename(put=name.removesuffix(first)) for name in own if name.endswith(f".{first}")]
    shorter = [Rename(gone=first.removesuffix(name)) for name in own if first.endswith(f".{name}")]
    return [Rename(), *longer, *shorter]
