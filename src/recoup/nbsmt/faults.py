"""What can be wrong with a layer's operands, as bits that kernels set, and the error that says so."""

from torch import Tensor

from recoup.errors import RecoupError

NEGATIVE, NOT_FINITE, BAD_WEIGHT = 1, 2, 4
"""An activation below zero; NaN or infinity among the activations; the same among the weights."""


def raise_fault(layer: str, x: Tensor, faults: int) -> None:
    """The error for an input that unsigned 8-bit codes cannot hold."""
    if faults & NOT_FINITE:
        raise RecoupError(f"{layer}: the input {list(x.shape)} holds NaN or infinity")
    raise RecoupError(
        f"{layer}: the input {list(x.shape)} holds negative values (least {float(x.min()):.6g}); its activation codes "
        'are unsigned and clipping them would be silent: calibrate_ it on data that shows them (activations="auto" or '
        '"signed"), put a ReLU before the layer or leave it in float (layers={"name": None})'
    )
