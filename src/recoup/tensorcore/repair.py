"""What wins accuracy back on tensor cores: gains."""

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from recoup.errors import RecoupError
from recoup.gains import Per, Weigh, fit_gains_, gain_repairs
from recoup.network.emulated import emulated_layers
from recoup.tensorcore.attention_layers import TensorCoreAttention
from recoup.tensorcore.layers import TensorCoreLayer

__all__ = ["GAIN", "GAIN_PAIRED", "LAYER_GAIN", "correct_gain_", "tensorcore_modules"]

M = TypeVar("M", bound=nn.Module)


def tensorcore_modules(model: nn.Module, purpose: str) -> dict[str, TensorCoreLayer | TensorCoreAttention]:
    """The layers and attention products on tensor cores by name; an error if there is none."""
    kinds = (TensorCoreLayer, TensorCoreAttention)
    found = {name: module for name, module in emulated_layers(model, purpose).items() if isinstance(module, kinds)}
    if not found:
        raise RecoupError(
            f"{purpose}: the model has no layer on a tensor core: emulate_(model, TensorCore.hopper_fp8()) first"
        )
    return found


def correct_gain_(
    model: M, batches: Iterable[Any], per: Per = "channel", *, weigh: Weigh = "outputs", progress: bool = False
) -> M:
    """Undo the shrink of cut sums by one factor per output channel, or per layer; `recoup.gains` has the equation.

    It is for sums of one sign in 13 bits, which come out several percent too small; signed ones of a few hundred terms
    shrink by less than a thousandth (docs/tensorcore.md).

    Args:
        model: with layers on tensor cores; it runs in eval mode. Gains of an earlier call are replaced.
        batches: inputs as the network will see them.
        per: ``channel`` or ``layer``.
        weigh: ``outputs``, every output's square counts; ``rows``, every row counts alike (a token, a place, with all
            its channels): for transformers, a few of whose tokens are far larger than the others (`recoup.gains`).
        progress: whether to show a progress bar.

    Returns:
        The same model; ``layer.gain = None`` takes a gain back.

    Raises:
        RecoupError: no layer on a tensor core, none that ran, no or bad batches, batch norm statistics that were
            repaired without the gain. Gains are then as they were.

    Warns:
        RecoupWarning: channels whose output was zero throughout; they keep gain 1. Layers that never ran.
    """
    modules = tensorcore_modules(model, "correct_gain_")
    layers = {name: module for name, module in modules.items() if isinstance(module, TensorCoreLayer)}
    return fit_gains_(model, layers, batches, per, weigh, progress)


LAYER_GAIN, GAIN, ROWS_GAIN, GAIN_PAIRED = gain_repairs(correct_gain_)
