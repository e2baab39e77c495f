"""A gain per output channel, or per layer: what undoes the shrink of sums that hardware truncates, whatever hardware.

    gain_o = <z_o, y_o> / <y_o, y_o>

with y the unit's output and z that of the same operands summed in float32, both before the bias: the factor that leaves
the least squared error. Under ``weigh="rows"`` both products weigh a row (a token or a place, with all its channels) by
one over its mean z^2, so that all rows count alike: in a transformer a few tokens are several times as large as the
others, and the norm behind the layer takes the size away.

Source: our own; truncation's systematic shrink is measured in docs/lba.md, what weighing is for in
docs/sentence-encoder.md.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError, RecoupWarning
from recoup.fields import choice
from recoup.network import ledger
from recoup.network.batches import call, prepared
from recoup.network.batches import count as images_in
from recoup.network.emulated import Emulated
from recoup.network.modes import evaluating
from recoup.network.reached import watching
from recoup.network.wing import Repair
from recoup.recalibrate import PAIRED

__all__ = ["Gained", "Per", "Weigh", "fit_gains_", "gain_repairs"]

M = TypeVar("M", bound=nn.Module)
Per = Literal["channel", "layer"]
Weigh = Literal["outputs", "rows"]


class Gained(Emulated):
    """An emulated layer with a weight, whose output may be multiplied by a gain.

    Attributes:
        gain: float32 [O], or None.
        of_rows: whether an output's channels are its last dimension, as Linear's, or its second, as a convolution's.
    """

    weight: Tensor
    bias: Tensor | None
    gain: Tensor | None
    of_rows: ClassVar[bool] = False

    extras: ClassVar[tuple[str, ...]] = (*Emulated.extras, "gain")
    travelling: ClassVar[tuple[str, ...]] = ("gain",)
    fitted: ClassVar[tuple[str, ...]] = ("gain",)

    def begin_without_gain(self) -> None:
        """What a wing's ``convert`` calls."""
        self.register_buffer("gain", None, persistent=False)

    @property
    def matrix(self) -> Tensor:
        """The weight as the unit multiplies it, [O, I] or [O, I, ...]."""
        return self.weight

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse to replace the weight under a gain, as folding a batch norm does: it would stay behind."""
        if name == "weight" and self.__dict__.get("_buffers", {}).get("gain") is not None:
            raise RecoupError(
                f"{self.title}: its weight is being replaced (a batch norm folded?), but it has a gain that belongs to "
                "the old one: fold before correct_gain_, or set gain = None and correct_gain_ anew"
            )
        super().register_parameter(name, param)

    def fault(self, name: str, value: Any) -> str | None:
        if name == "gain" and value.shape != self.matrix.shape[:1]:
            return f"has shape {list(value.shape)}"
        return "holds NaN or infinity" if name == "gain" and not bool(value.isfinite().all()) else None


def fit_gains_(
    model: M, layers: Mapping[str, Gained], batches: Iterable[Any], per: Per, weigh: Weigh, progress: bool
) -> M:
    """Fit the gains of some layers, in closed form, in one pass over the batches: a layer's gain is in force as soon as
    it is known, so the layers behind it see repaired inputs, and it is refined with every batch.

    Args:
        model: it runs in eval mode. Gains of an earlier call are replaced.
        layers: of the model.
        batches: inputs as the network will see them.
        per: ``channel`` or ``layer``.
        weigh: ``outputs``, every output's square counts; ``rows``, every row counts alike.
        progress: whether to show a progress bar.

    Raises:
        RecoupError: no layer that ran, no or bad batches, batch norm statistics that were repaired without the gain.
            Gains are then as they were.

    Warns:
        RecoupWarning: channels whose output was zero throughout; they keep gain 1. Outputs that were NaN or infinite,
            which are left out. Layers that never ran.
    """
    choice("correct_gain_", "weigh", weigh, get_args(Weigh))
    if per not in ("channel", "layer"):
        raise RecoupError(f"correct_gain_(per={per!r}): per must be 'channel' or 'layer'")
    ledger.refuse_after_statistics(model, "correct_gain_")
    floating = [name for name, layer in layers.items() if layer.mode != "emulate"]
    if floating:
        raise RecoupError(
            f"correct_gain_: {', '.join(floating[:6])} run in mode {layers[floating[0]].mode!r}, where nothing is "
            "truncated: set mode = 'emulate' first"
        )
    before = {name: {"gain": layer.gain} for name, layer in layers.items()}
    fits = {name: _Fit(layer, per, weigh) for name, layer in layers.items()}
    images = 0
    with ledger.whole(model), _observing(layers, {name: fit.observe for name, fit in fits.items()}):
        for layer in layers.values():
            layer.gain = None
        with watching(layers, "correct_gain_"), evaluating(model), torch.no_grad():
            for inputs, _ in prepared(model, batches, "correct_gain_", progress):
                call(model, inputs)
                images += images_in(inputs)
        fitted = {name: layer for name, layer in layers.items() if fits[name].seen}
        for name, layer in fitted.items():
            layer.gain = fits[name].gain
        _say_dead({name: fits[name].dead for name in fitted if fits[name].dead})
        _say_infinite({name: fits[name].infinite for name in fitted if fits[name].infinite})
        ledger.record(model, fitted, "gain", "correct_gain_", before, images=images)
    return model


def _say_dead(dead: Mapping[str, int]) -> None:
    if dead:
        shown = ", ".join(f"{name} ({count})" for name, count in list(dead.items())[:6])
        warnings.warn(
            f"correct_gain_: {sum(dead.values())} channels of {len(dead)} layers gave only zeros, keep gain 1: {shown}",
            RecoupWarning,
            stacklevel=4,
        )


def _say_infinite(infinite: Mapping[str, int]) -> None:
    if infinite:
        shown = ", ".join(f"{name} ({count})" for name, count in list(infinite.items())[:6])
        warnings.warn(
            f"correct_gain_: {sum(infinite.values())} outputs of {len(infinite)} layers were NaN or infinite and have "
            f"no say in their gains: {shown}",
            RecoupWarning,
            stacklevel=4,
        )


@contextmanager
def _observing(layers: Mapping[str, nn.Module], watch: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """A forward hook on each layer; then none."""
    hooks = [layers[name].register_forward_hook(hook, with_kwargs=True) for name, hook in watch.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Fit:
    """Running sums of one layer, in float64."""

    def __init__(self, layer: Gained, per: Per, weigh: Weigh = "outputs") -> None:
        self.layer, self.per, self.weigh, self.infinite, self.seen = layer, per, weigh, 0, False
        self.cross = self.square = torch.zeros(layer.matrix.shape[0], dtype=torch.float64, device=layer.weight.device)

    def observe(self, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        assert isinstance(layer, Gained)
        mode, layer.mode = layer.mode, "baseline"
        try:
            exact = layer.forward(*args, **kwargs)
        finally:
            layer.mode = mode
        dim = output.dim() - 1 if layer.of_rows else output.dim() - layer.weight.dim() + 1
        shape = [-1 if i == dim else 1 for i in range(output.dim())]
        offset = 0.0 if layer.bias is None else layer.bias.view(shape)
        raw = output - offset  # the layer has no gain until the end
        others = [i for i in range(output.dim()) if i != dim]
        y, z = raw.double(), (exact - offset).double()
        good = y.isfinite() & z.isfinite()
        if not bool(good.all()):
            self.infinite += int((~good).sum())
            y, z = y.where(good, 0.0), z.where(good, 0.0)
        weight = _of_rows(z, dim) if self.weigh == "rows" else 1.0
        self.cross = self.cross + (weight * y * z).sum(others)
        self.square = self.square + (weight * y * y).sum(others)
        self.seen = True
        return raw * self.gain.view(shape) + offset

    @property
    def gain(self) -> Tensor:
        cross, square = self.cross, self.square
        if self.per == "layer":
            cross, square = cross.sum().expand_as(cross), square.sum().expand_as(square)
        return torch.where(square > 0, cross / square, 1.0).float()

    @property
    def dead(self) -> int:
        """Channels that never gave anything but zero."""
        return int((self.square == 0).sum())


def _of_rows(z: Tensor, dim: int) -> Tensor:
    """One over the mean square of each row, with its channels in ``dim``; 0 for a row of zeros."""
    square = z.square().mean(dim, keepdim=True)
    return torch.where(square > 0, 1 / square, 0.0)


def gain_repairs(
    correct: Callable[[nn.Module, Iterable[Any], Per], object],
) -> tuple[Repair, Repair, Repair]:
    """A wing's repairs by ``correct(model, batches, per)``: a gain per layer, one per channel, and that one paired."""
    per_layer = Repair(
        "gain per layer",
        "gain",
        "Every layer's accumulator output times one factor, fitted in closed form: truncation shrinks sums.",
        "a gain per layer",
        lambda model, batches: correct(model, batches, "layer"),
        records=True,
    )
    per_channel = Repair(
        "gain per channel",
        "gain",
        "Every output channel's sum times a factor of its own, fitted in closed form on the calibration images: it "
        "undoes the shrink of truncated sums, and also serves networks without BatchNorm.",
        "a gain per channel",
        lambda model, batches: correct(model, batches, "channel"),
        short="gain",
        records=True,
    )
    paired = Repair.combined(
        "gain + paired",
        "A gain per channel first, then paired recalibration of what remains.",
        "a gain per channel with paired recalibration",
        (per_channel, PAIRED),
    )
    return per_layer, per_channel, paired
