"""What wins a converted layer or RMS norm's accuracy back without training: a gain a feature."""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.gains import tell
from recoup.lightnorm.rows.layers import LightRows
from recoup.network import ledger
from recoup.network.batches import call, prepared
from recoup.network.batches import count as images_in
from recoup.network.emulated import emulated_layers
from recoup.network.modes import evaluating
from recoup.network.reached import watching
from recoup.network.wing import Repair

M = TypeVar("M", bound=nn.Module)


def correct_gain_(model: M, batches: Iterable[Any], *, progress: bool = False) -> M:
    """Undo what ranges and truncation do to the size of a layer or RMS norm's features, in closed form.

        gain_f = <z_f - beta_f, y_f - beta_f> / <y_f - beta_f, y_f - beta_f>

    with y the unit's output without a gain and z the float norm's, of the same input: the factor that leaves the least
    squared error if it were applied behind the unit. It multiplies gamma xhat before y is first rounded
    (`LightRows.gain`) and is never written into gamma. One pass over the batches: a layer's gain is in force as soon as
    it is known, so the layers behind it see repaired inputs, and it is refined with every batch.

    Args:
        model: with `LightLayerNorm` or `LightRMSNorm` layers; it runs in eval mode. Gains of an earlier call are
            replaced.
        batches: inputs as the network will see them.
        progress: whether to show a progress bar.

    Returns:
        The same model; ``layer.gain = None`` takes a gain back.

    Raises:
        RecoupError: no such layer, none that ran, no or bad batches, batch norm statistics that were repaired without
            the gain. Gains are then as they were.

    Warns:
        RecoupWarning: features whose output was beta throughout, or never finite; they keep gain 1. Layers that never
            ran.

    Source: ours.
    """
    layers = row_layers(model, "lightnorm.correct_gain_")
    if not layers:
        raise RecoupError(
            "lightnorm.correct_gain_: the model has no layer or RMS norm on a LightNorm unit: emulate_(model, "
            "LightNorm()) first; batch norms are repaired by recalibrate_"
        )
    ledger.refuse_after_statistics(model, "lightnorm.correct_gain_")
    before = {name: {"gain": layer.gain} for name, layer in layers.items()}
    fits = {name: _Fit(layer) for name, layer in layers.items()}
    images = 0
    with ledger.whole(model):
        for layer in layers.values():
            layer.gain = None
        hooks = [layers[name].register_forward_hook(fit.observe, with_kwargs=True) for name, fit in fits.items()]
        try:
            with watching(layers, "lightnorm.correct_gain_"), evaluating(model), torch.no_grad():
                for inputs, _ in prepared(model, batches, "lightnorm.correct_gain_", progress):
                    call(model, inputs)
                    images += images_in(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        fitted = {name: layer for name, layer in layers.items() if layer.gain is not None}
        dead = {name: fits[name].dead for name in fitted}
        tell("lightnorm.correct_gain_", dead, "features of {layers} gave only beta, keep gain 1", 2)
        ledger.record(model, fitted, "gain", "lightnorm.correct_gain_", before, images=images)
    return model


def row_layers(model: nn.Module, purpose: str) -> dict[str, LightRows]:
    """The layer and RMS norms of a model on a LightNorm unit, by name."""
    return {name: layer for name, layer in emulated_layers(model, purpose).items() if isinstance(layer, LightRows)}


class _Fit:
    """Running sums of one layer, float64 [D]."""

    def __init__(self, layer: LightRows) -> None:
        self.layer = layer
        self.cross = self.square = torch.zeros(layer.features, dtype=torch.float64)

    def observe(self, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:  # noqa: ARG002
        assert isinstance(layer, LightRows)
        z, _ = self._run("float", args, kwargs), setattr(layer, "gain", None)
        y = self._run("emulate", args, kwargs)
        beta = torch.zeros(()) if layer.shift is None else layer.shift.detach().flatten()
        y, z = (v.detach().reshape(-1, layer.features).double() - beta.to(v.device).double() for v in (y, z))
        known = (y.isfinite() & z.isfinite()).all(1)[:, None]
        y, z = y.where(known, 0.0), z.where(known, 0.0)
        self.cross = self.cross.to(y.device) + (y * z).sum(0)
        self.square = self.square.to(y.device) + (y * y).sum(0)
        layer.gain = torch.where(self.square > 0, self.cross / self.square, 1.0).float()
        return self._run("emulate", args, kwargs)

    def _run(self, mode: Any, args: tuple, kwargs: dict) -> Tensor:
        before, self.layer.mode = self.layer.mode, mode
        try:
            return self.layer.forward(*args, **kwargs)
        finally:
            self.layer.mode = before

    @property
    def dead(self) -> int:
        """Features that never gave anything but beta."""
        return int((self.square == 0).sum())


GAIN = Repair(
    "gain per feature",
    "gain",
    "Every feature of a layer or RMS norm times a factor of its own, fitted in closed form on the calibration images "
    "against the float norm: it undoes what ranges and truncation do to its size.",
    "a gain per feature",
    correct_gain_,
    short="gain",
    records=True,
    applies=lambda model: bool(row_layers(model, "repair_")),
)
