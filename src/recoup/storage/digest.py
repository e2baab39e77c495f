"""What a kept result belongs to: short digests of a model's tensors and of batches."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

LENGTH = 16  # hexadecimal digits, 64 bits: against mistakes, not against attacks


def of_model(model: nn.Module) -> str:
    """Of parameters and buffers by name, with those that no state_dict holds (the gains of emulated layers)."""
    digest = hashlib.sha256()
    for name, tensor in {**model.state_dict(), **dict(model.named_buffers())}.items():
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:LENGTH]


def of_batches(batches: Iterable[Any]) -> str:
    """Of batches in their order, inputs and labels; one pass over them."""
    digest = hashlib.sha256()
    for batch in batches:
        _feed(digest, batch)
    return digest.hexdigest()[:LENGTH]


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


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
