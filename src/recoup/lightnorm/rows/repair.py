"""What wins a converted layer or RMS norm's accuracy back without training: a gain a feature."""

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from recoup.errors import RecoupError
from recoup.gains import fit_gains_, gain_repair
from recoup.lightnorm.rows.layers import LightRows
from recoup.network.emulated import emulated_layers

M = TypeVar("M", bound=nn.Module)


def correct_gain_(model: M, batches: Iterable[Any], *, progress: bool = False) -> M:
    """Undo what ranges and truncation do to the size of a layer or RMS norm's features, in closed form.

        gain_f = <z_f - (y_f - p_f), p_f> / <p_f, p_f>,    p = F(gamma) xhat,    y = B(F(gain p + F(beta)))

    with z the float norm's output, of the same input, and y the unit's without a gain, roundings, blocks and F(beta)
    included: z - (y - p) is what p should have been, and the gain the factor of least squared error as long as the
    roundings behind it stay what they are. They do not quite: a feature on which y with its gain left no smaller
    squared error than without one keeps gain 1. So does one whose F(gamma) is zero, which gives beta whatever its gain.

    The gain multiplies gamma xhat before y is first rounded (`LightRows.gain`) and is never written into gamma. One
    pass over the batches: a layer's gain is in force as soon as it is known, so the layers behind it see repaired
    inputs, and it is refined with every batch; errors are summed over the batches with the gain of each.

    Args:
        model: with `LightLayerNorm` or `LightRMSNorm` layers; it runs in eval mode. Gains of an earlier call are
            replaced.
        batches: inputs as the network will see them.
        progress: whether to show a progress bar.

    Returns:
        The same model; ``layer.gain = None`` takes a gain back.

    Raises:
        RecoupError: no such layer, layers that do not run in mode ``emulate``, none that ran, no or bad batches, batch
            norm statistics that were repaired without the gain. Gains are then as they were.

    Warns:
        RecoupWarning: features that gave only beta; they keep gain 1. Outputs that were NaN or infinite, which are left
            out. Layers that never ran.

    Source: ours.
    """
    layers = row_layers(model, "lightnorm.correct_gain_")
    if not layers:
        raise RecoupError(
            "lightnorm.correct_gain_: the model has no layer or RMS norm on a LightNorm unit: emulate_(model, "
            "LightNorm()) first; batch norms are repaired by recalibrate_"
        )
    return fit_gains_(model, layers, batches, "channel", "outputs", progress, "lightnorm.correct_gain_")


def row_layers(model: nn.Module, purpose: str) -> dict[str, LightRows]:
    """The layer and RMS norms of a model on a LightNorm unit, by name."""
    return {name: layer for name, layer in emulated_layers(model, purpose).items() if isinstance(layer, LightRows)}


GAIN = gain_repair(
    "feature",
    "Every feature of a layer or RMS norm times a factor of its own, fitted in closed form on the calibration images "
    "against the float norm: it undoes what ranges and truncation do to its size.",
    correct_gain_,
    short="gain",
    applies=lambda model: bool(row_layers(model, "repair_")),
)
