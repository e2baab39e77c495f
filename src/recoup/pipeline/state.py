"""What belongs to a model beside its trained weights, kept and put back: buffers and random generators."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError


class Buffers:
    """A model's buffers as they are now.

    They are found once, by the place where a module keeps them: walking through a model costs more than a small step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = [(module._buffers, name) for module in model.modules() for name in module._buffers]
        self._kept: list[tuple[Tensor | None, Tensor | None]] = []

    def keep(self) -> None:
        """Remember them."""
        if self._places:
            now = [home.get(name) for home, name in self._places]
            self._kept = [(buffer, None if buffer is None else buffer.clone()) for buffer in now]

    @torch.no_grad()
    def put_back(self) -> None:
        """Make them what they were at `keep`, also those that a module has replaced."""
        for (home, name), (buffer, kept) in zip(self._places, self._kept, strict=False):
            home[name] = buffer
            if buffer is not None and kept is not None:
                buffer.copy_(kept)


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Put buffers back, whatever passes within did to them: written, replaced or created."""
    homes = [module._buffers for module in model.modules()]
    kept = [{name: (b, None if b is None else b.clone()) for name, b in home.items()} for home in homes]
    try:
        yield
    finally:
        with torch.no_grad():
            for home, buffers in zip(homes, kept, strict=True):
                home.clear()
                for name, (buffer, value) in buffers.items():
                    home[name] = buffer
                    if buffer is not None and value is not None:
                        buffer.copy_(value)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of torch's default generators: the CPU's, and the device's."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def refuse_unlike(ours: Any, theirs: Any, place: str = "the state") -> None:
    """Raise unless a state has the structure of another: the same keys and lengths, tensors of one shape and dtype.

    Raises:
        RecoupError: naming the first place that differs.
    """
    if isinstance(ours, Tensor):
        if not isinstance(theirs, Tensor) or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise RecoupError(f"pipeline: {place} is {_kind(theirs)}; it must be {_kind(ours)}")
    elif isinstance(ours, dict):
        if not isinstance(theirs, dict) or set(ours) != set(theirs):
            keys = sorted(set(ours) ^ set(theirs)) if isinstance(theirs, dict) else _kind(theirs)
            raise RecoupError(f"pipeline: {place} is of another run or incomplete; it differs in {keys}")
        for name, value in ours.items():
            refuse_unlike(value, theirs[name], f"{place}[{name!r}]")
    elif isinstance(ours, list):
        if not isinstance(theirs, list) or len(ours) != len(theirs):
            raise RecoupError(f"pipeline: {place} must be a list of {len(ours)}; it is {_kind(theirs)}")
        for index, (value, other) in enumerate(zip(ours, theirs, strict=True)):
            refuse_unlike(value, other, f"{place}[{index}]")
    elif type(ours) is not type(theirs):
        raise RecoupError(f"pipeline: {place} is {_kind(theirs)}; it must be {_kind(ours)}")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return f"a list of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"
