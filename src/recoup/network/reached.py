"""Which layers the batches of a pass reached: what is converted and never runs is said."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from recoup.errors import RecoupError, RecoupWarning, users_level

WHY = (
    "the model computes without calling them: functional calls such as F.linear(x, layer.weight), a branch that was "
    "not taken, traced, scripted or compiled code"
)


@contextmanager
def watching(
    layers: Mapping[str, nn.Module], purpose: str, *, refuse: bool = True, kind: str = "emulated layers"
) -> Iterator[None]:
    """Watch layers while batches run; afterwards say which of them never ran.

    Args:
        layers: by name.
        purpose: what the caller does; heads warning and error.
        refuse: whether it is an error if none of them ran, because the caller then measured nothing.
        kind: what they are.

    Raises:
        RecoupError: none of the layers ran.

    Warns:
        RecoupWarning: some of them never ran.
    """
    missed = dict(layers)

    def called(name: str) -> Any:
        def hook(_: nn.Module, __: tuple) -> None:
            missed.pop(name, None)

        return hook

    hooks = [layer.register_forward_pre_hook(called(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    say_missed(missed, len(layers), purpose, refuse=refuse, kind=kind)


def say_missed(
    missed: Mapping[str, nn.Module],
    of: int,
    purpose: str,
    *,
    refuse: bool = True,
    kind: str = "emulated layers",
) -> None:
    """Warn of layers that no batch reached, out of ``of``; where that is all of them, refuse."""
    if not missed:
        return
    if refuse and len(missed) == of:
        raise RecoupError(f"{purpose}: none of the model's {of} {kind} ran, so nothing was measured; {WHY}")
    warnings.warn(
        f"{purpose}: {len(missed)} of {of} {kind} never ran: {', '.join(missed)}; {WHY}",
        RecoupWarning,
        stacklevel=users_level(),
    )
