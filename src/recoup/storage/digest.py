"""What a kept result belongs to: digests of networks, batches and files, the same on every machine and device.

What they are made of decides whether a folder is taken up again, so none of it changes between versions.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

SHORT = 16  # hexadecimal digits, 64 bits: against mistakes, not against attacks


def of_model(model: nn.Module) -> str:
    """Of parameters and buffers by name, with those that no state_dict holds (the gains of emulated layers); short."""
    return _of_tensors({**model.state_dict(), **dict(model.named_buffers())}, described=False)[:SHORT]


def of_state(model: nn.Module) -> str:
    """Of what the state_dict holds, by name, type and shape; all 64 digits."""
    return _of_tensors(model.state_dict(), described=True)


def of_batches(batches: Iterable[Any]) -> str:
    """Of batches in their order, inputs and labels; one pass over them; short."""
    digest = hashlib.sha256()
    for batch in batches:
        _feed(digest, batch)
    return digest.hexdigest()[:SHORT]


def of_file(path: Path) -> str:
    """The sha256 of a file's bytes, as ``sha256sum`` prints it.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_tensors(tensors: Mapping[str, Tensor], described: bool) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update((f"{name} {tensor.dtype} {list(tensor.shape)};" if described else name).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(_bytes(value))
    elif isinstance(value, Mapping):
        for name, part in value.items():
            digest.update(repr(name).encode())
            _feed(digest, part)
    elif isinstance(value, tuple | list):
        digest.update(f"{len(value)} of".encode())
        for part in value:
            _feed(digest, part)
    else:
        digest.update(repr(value).encode())


def _copied(tensor: Tensor) -> np.ndarray:
    """The bytes in order, copied: an array over a parameter's own memory would keep its storage from being resized."""
    return tensor.detach().to("cpu", copy=True).contiguous().flatten().view(torch.uint8).numpy()


def _bytes(tensor: Tensor) -> bytes:
    return _copied(tensor).tobytes()


def of_tensors(*tensors: Tensor | None) -> str:
    """xxh3_128 of some tensors' bytes, for what is asked often."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            digest.update(_copied(tensor).data)
    return digest.hexdigest()


class OfSamples:
    """Of samples in their order, added batch by batch: the same however they are cut into batches. xxh3_128."""

    def __init__(self) -> None:
        self._runs: dict[str, list[tuple[str, Any]]] = {}

    def add(self, inputs: Any, label: Any) -> None:
        """A batch: its input, a tensor or a mapping of tensors, and its labels."""
        named = dict(inputs) if isinstance(inputs, Mapping) else {"": inputs}
        for name, tensor in (*named.items(), ("labels", label)):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_meta:
                kind, runs = f"{tensor.dtype} {list(tensor.shape[1:])}", self._runs.setdefault(name, [])
                if not runs or runs[-1][0] != kind:  # samples of another shape
                    runs.append((kind, xxhash.xxh3_128()))
                flat = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg().flatten()
                runs[-1][1].update(flat.view(torch.uint8).numpy().data)

    @property
    def text(self) -> str:
        """Of all that was added."""
        parts = {name: [(kind, digest.hexdigest()) for kind, digest in runs] for name, runs in self._runs.items()}
        return of_text(repr(sorted(parts.items())))


def of_text(text: str) -> str:
    """xxh3_128 of a text."""
    return xxhash.xxh3_128(text.encode()).hexdigest()
