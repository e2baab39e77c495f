"""The newest state of a run in one file: written whole, read back, refused if it is damaged or another run's."""

import io
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError

from recoup.errors import RecoupError
from recoup.storage.files import write_atomically

T = TypeVar("T")
# What readers raise on a file that is cut off, foreign or of another version.
DAMAGE = (
    OSError,
    RuntimeError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
)


class Difference(NamedTuple):
    """One entry of two identities, nested names joined by dots; None where there is no such entry."""

    name: str
    before: Any
    now: Any


@dataclass(frozen=True)
class StateFile:
    """The file that holds the newest state of one run.

    Args:
        path: the file; its folder must exist when something is written.
        identity: what decides the run, as JSON; a file of another is refused.
        encode: the file's content from a state and the identity.
        decode: the state and the identity of a file, in full: whatever it raises means that the file is damaged.
        damaged: the sentence for a file that cannot be read, from its path and the reader's error.
        foreign: the sentence for a file of another run, from its path and all differences, of which there is one.
    """

    path: Path
    identity: Mapping[str, Any]
    encode: Callable[[Any, Mapping[str, Any]], str | bytes]
    decode: Callable[[Path], tuple[Any, Mapping[str, Any]]]
    damaged: Callable[[Path, Exception], str]
    foreign: Callable[[Path, list[Difference]], str]

    def write(self, state: Any) -> None:
        """Keep a state in place of the one before, which stays until this one is whole."""
        write_atomically(self.path, self.encode(state, self.identity))

    def read(self) -> Any:
        """The state that was kept last, None if there is none.

        Raises:
            RecoupError: a damaged file, or another run's.
        """
        kept = readable(self._decoded, lambda error: self.damaged(self.path, error))
        if kept is None:
            return None
        state, identity = kept
        different = differences(identity, json.loads(json.dumps(self.identity)))
        if different:
            raise RecoupError(self.foreign(self.path, different))
        return state

    def _decoded(self) -> tuple[Any, Mapping[str, Any]] | None:
        return self.decode(self.path) if self.path.exists() else None


def readable(read: Callable[[], T], damaged: Callable[[Exception], str]) -> T:
    """What ``read`` returns; an error that a damaged file causes becomes a sentence.

    Raises:
        RecoupError: ``damaged`` of the error, or what ``read`` itself says.
    """
    try:
        return read()
    except RecoupError:
        raise
    except DAMAGE as error:
        raise RecoupError(damaged(error)) from error


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    """Where two identities differ, in the order of ``now``.

    >>> differences({"lr": 0.1, "data": {"images": 4}}, {"lr": 0.1, "data": {"images": 8}})
    [Difference(name='data.images', before=4, now=8)]
    """
    found: list[Difference] = []
    for name in dict.fromkeys([*now, *before]):
        one, other = before.get(name), now.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{prefix}{name}.")
        elif one != other:
            found.append(Difference(f"{prefix}{name}", one, other))
    return found


def kind_and_text(error: Exception) -> str:
    """An error for a sentence: ``KeyError: 'run'``."""
    return f"{type(error).__name__}: {error}"


def torch_bytes(state: Any) -> bytes:
    """Nested plain values and tensors as torch keeps them."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def torch_state(path: Path) -> Any:
    """The inverse of `torch_bytes`, on the CPU; no code in the file is run."""
    return torch.load(path, weights_only=True, map_location="cpu")
