"""Test images channels last where the hardware's emulation is faster in that layout and the network takes it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from recoup.data.dataset import Batches
from recoup.network.batches import call
from recoup.network.modes import evaluating
from recoup.study.hardware import Hardware

SAME = 0.02
"""Of the largest output: what rounding is far below, in bfloat16 too, and another computation far above."""


def takes_channels_last(model: nn.Module, inputs: Tensor) -> bool:
    """Whether a network runs on such images, and computes the same; one with a ``view`` behind a convolution does not.

    Args:
        model: in float.
        inputs: a few, [N, ...].
    """
    if inputs.dim() != 4:
        return False
    try:
        with evaluating(model), torch.no_grad():
            plain, last = call(model, inputs), call(model, inputs.contiguous(memory_format=torch.channels_last))
    except Exception:  # a network of the user's may fail in any way; then it gets its images as they were
        return False
    return outputs_agree(plain, last)


def outputs_agree(plain: Any, last: Any) -> bool:
    """Whether a network's outputs of both layouts are one but for rounding: a network that reads memory, as by
    ``as_strided``, runs on any layout and computes something else. What is no tensor is not compared."""
    if not isinstance(plain, Tensor) or not isinstance(last, Tensor):
        return True
    size = float(plain.abs().nan_to_num(0.0, 0.0).max()) if plain.numel() else 0.0
    return plain.shape == last.shape and torch.allclose(plain, last, rtol=0, atol=SAME * size, equal_nan=True)


def laid_out(batches: Any, hardware: Hardware) -> Any:
    """Batches of images channels last, if every wing that is present is faster so (`network.wing.Card.channels_last`);
    else as they are. Emulated layers give the same bits; a float layer's last ones may differ."""
    faster = bool(hardware.cards) and all(card.channels_last for card in hardware.cards)
    return replace(batches, channels_last=True) if faster and isinstance(batches, Batches) else batches
