"""Weights that lie in place: a graph's saved tensors lead to the newest version, wherever the forward's lay.

A large weight is not copied: its parameter's data is a row of a ring. What a graph saves of it is kept as a place, and
opened in the backward pass as the same view of the row that is the newest then. Saved-tensor hooks do that, around the
forward passes of the modules that own such weights, and around the loss; they switch autograd's check of tensors that
were written to off, so it is done here. A weight that is saved outside of them is not silently stale: its version
counter moves before the backward pass, so that autograd refuses it.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Rows:
    """The rows of one stage that large weights may be saved from.

    Args:
        size: elements of a row.
        starts: where its large parameters begin, in order.
        indices: their numbers.
    """

    def __init__(self, size: int, starts: Sequence[int], indices: Sequence[int]) -> None:
        self.size, self.starts, self.indices = size, list(starts), list(indices)

    def find(self, offset: int) -> tuple[int, int] | None:
        """The parameter at an offset of the storage, and the offset in it; None: a small one."""
        column = offset % self.size
        at = bisect_right(self.starts, column) - 1
        return None if at < 0 else (self.indices[at], column - self.starts[at])


class Saved:
    """Hooks for the graph's saved tensors.

    Args:
        model: whose modules' forward passes are watched.
        now: a reference to: index of a parameter -> its weights for the backward pass that runs.
    """

    def __init__(self, model: nn.Module, now: Callable[[], Callable[[int], Tensor] | None]) -> None:
        self._modules = dict(model.named_modules())
        self._now, self._rows = now, {}
        self._owners: dict[int, str] = {}

    def watch(self, storage: int, rows: Rows) -> None:
        """Let a storage's rows be watched."""
        self._rows[storage] = rows

    def own(self, index: int, module: str) -> None:
        """Let a parameter be found where a module runs."""
        self._owners[index] = module

    def disown(self, index: int) -> None:
        """The parameter is copied from now on."""
        self._owners.pop(index, None)

    @property
    def active(self) -> bool:
        """Whether there is anything to watch."""
        return bool(self._owners)

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """For a pass within which weights may be saved."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Within it, modules that own weights in place run under the hooks."""
        changed: list[tuple[dict[str, Any], Any]] = []
        try:
            for name in dict.fromkeys(self._owners.values()):
                module = self._modules[name]
                changed.append((module.__dict__, module.__dict__.get("forward")))
                module.__dict__["forward"] = self._wrapped(module.forward)
            yield
        finally:
            for own, before in reversed(changed):
                if before is None:
                    own.pop("forward", None)
                else:
                    own["forward"] = before

    def _wrapped(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            with self.hooks():
                return forward(*arguments, **options)

        return run

    def _pack(self, tensor: Tensor) -> Any:
        rows = self._rows.get(tensor.untyped_storage().data_ptr())
        found = None if rows is None else rows.find(tensor.storage_offset())
        if found is None or found[0] not in self._owners:
            return tensor, tensor._version
        return found[0], found[1], tensor.size(), tensor.stride()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed[0], Tensor):
            tensor, version = packed
            if tensor._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{tensor.dtype} {list(tensor.shape)} is at version {tensor._version}; expected version {version}"
                )
            return tensor
        index, offset, size, stride = packed
        now = self._now()
        if now is None:
            raise RuntimeError("the pipeline whose weights this graph saved is gone")
        newest = now(index)
        return newest.as_strided(size, stride, newest.storage_offset() + offset)
