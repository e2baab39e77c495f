"""Real operands for energy: what a network's emulated layers multiply."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.network.batches import call, prepared
from recoup.network.emulated import emulated_layers
from recoup.network.modes import evaluating
from recoup.silicon.generate import generator_of


@torch.no_grad()
def capture(model: nn.Module, images: Any, layers: Sequence[str] | None = None) -> dict[str, tuple[np.ndarray, ...]]:
    """The operands of every emulated layer whose hardware there is, as its generator's ``feed`` takes them.

    Args:
        model: an emulated network; it runs once, in eval mode.
        images: a batch as in `recoup.network.batches`.
        layers: names; None: all.

    Returns:
        By layer, for NB-SMT: x uint8 (signed: int8) [M, T, S] and w int8 [T, S, N] (output positions, threads, slots,
        channels).

    Raises:
        RecoupError: no such layer, or none at all.
    """
    there = emulated_layers(model)
    for name in layers or ():
        if name not in there:
            raise RecoupError(f"silicon.capture: {name!r} is no emulated layer; there are {', '.join(there) or 'none'}")
    chosen: dict[str, Any] = {name: layer for name, layer in there.items() if layers is None or name in layers}
    takers = {name: getattr(generator_of(layer.config), "capture", None) for name, layer in chosen.items()}
    found: dict[str, tuple[np.ndarray, ...]] = {}

    def record(name: str, taker: Any) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x: Tensor = args[0] if args else kwargs["input"]
            found[name] = taker(module, x)

        return hook

    hooks = [
        layer.register_forward_pre_hook(record(name, takers[name]), with_kwargs=True)
        for name, layer in chosen.items()
        if takers[name] is not None
    ]
    try:
        with evaluating(model):
            for batch, _ in prepared(model, [images], "silicon.capture"):
                call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise RecoupError("silicon.capture: no layer of hardware that takes operands ran; emulate_ the model first")
    return found


def steps_of(config: Any, operands: tuple[np.ndarray, ...]) -> int:
    """The clocks in which one module of a config's hardware computes all of a captured layer's outputs.

    Raises:
        RecoupError: its generator has no ``steps(operands)`` beside its ``capture``.
    """
    steps = getattr(generator_of(config), "steps", None)
    if steps is None:
        raise RecoupError(f"silicon: the generator of {config!r} does not say how many steps a layer has")
    return steps(operands)
