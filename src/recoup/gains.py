"""A gain per output channel, or per layer: what undoes the shrink of what hardware truncates, whatever hardware.

    gain_o = <z_o - (y_o - p_o), p_o> / <p_o, p_o>

with y the unit's output without a gain, p the part of it that the gain multiplies and z what the output should be: the
factor that leaves the least squared error. Of sums p is the output before the bias, y - bias, so that z - (y - p) is
z - bias, z being that of the same operands summed in float32; of norms over features p is gamma xhat.
Under ``weigh="rows"`` both products weigh a row (a token or a place, with all its channels) by one over its mean z^2,
so that all rows count alike: in a transformer a few tokens are several times as large as the others, and the norm
behind the layer takes the size away.

Source: our own; truncation's systematic shrink is measured in docs/lba.md, what weighing is for in
docs/sentence-encoder.md.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError, RecoupWarning
from recoup.fields import choice
from recoup.network import ledger
from recoup.network.batches import call, prepared
from recoup.network.batches import count as images_in
from recoup.network.emulated import Emulated, Mode
from recoup.network.modes import evaluating
from recoup.network.norms import has_norms
from recoup.network.own import watching_forward
from recoup.network.passes import measured, state
from recoup.network.reached import say_missed
from recoup.network.wing import Repair
from recoup.recalibrate import PAIRED

__all__ = ["Gained", "Per", "Seen", "Weigh", "fit_gains_", "gain_repair", "gain_repairs", "tell"]

M = TypeVar("M", bound=nn.Module)
Per = Literal["channel", "layer"]
Weigh = Literal["outputs", "rows"]


class Seen(NamedTuple):
    """One call of a layer without a gain.

    Attributes:
        multiplied: p, what a gain multiplies.
        wanted: z - (y - p), what it should have been.
        dim: the dimension of their channels.
    """

    multiplied: Tensor
    wanted: Tensor
    dim: int


class Gained(Emulated):
    """An emulated layer whose output, or a part of it, may be multiplied by a gain.

    Attributes:
        gain: float32 [O], or None.
        of_rows: whether an output's channels are its last dimension, as Linear's, or its second, as a convolution's.
        exact_mode: the mode in which it computes what the gain is fitted to.
        rounds_gained: whether it rounds behind the gain, so that the factor may leave a larger error than none does.
        gained_as: what messages call its channels, and those of which the gain multiplies nothing but zeros.
    """

    weight: Tensor
    bias: Tensor | None
    gain: Tensor | None
    of_rows: ClassVar[bool] = False
    exact_mode: ClassVar[Mode] = "baseline"
    rounds_gained: ClassVar[bool] = False
    gained_as: ClassVar[tuple[str, str]] = ("channels", "gave only zeros")

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

    @property
    def channels(self) -> int:
        """How many numbers a gain has."""
        return self.matrix.shape[0]

    def seen(self, output: Tensor, args: tuple, kwargs: dict) -> Seen:
        """What a gain would multiply in an output without one, and what that should have been."""
        dim, offset = self._offset(output)
        return Seen(output - offset, self._exact(args, kwargs) - offset, dim)

    def gained(self, gain: Tensor, seen: Seen, output: Tensor, args: tuple, kwargs: dict) -> Tensor:  # noqa: ARG002
        """The output under a gain."""
        dim, offset = self._offset(output)
        shape = [-1 if i == dim else 1 for i in range(output.dim())]
        return seen.multiplied * gain.view(shape) + offset

    def _exact(self, args: tuple, kwargs: dict) -> Tensor:
        mode, self.mode = self.mode, self.exact_mode
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.mode = mode

    def _offset(self, output: Tensor) -> tuple[int, Tensor | float]:
        """The dimension of an output's channels, and the bias along it."""
        dim = output.dim() - 1 if self.of_rows else output.dim() - self.weight.dim() + 1
        shape = [-1 if i == dim else 1 for i in range(output.dim())]
        return dim, 0.0 if self.bias is None else self.bias.view(shape)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse to replace the weight under a gain, as folding a batch norm does: it would stay behind."""
        if name == "weight" and self.__dict__.get("_buffers", {}).get("gain") is not None:
            raise RecoupError(
                f"{self.title}: its weight is being replaced (a batch norm folded?), but it has a gain that belongs to "
                "the old one: fold before correct_gain_, or set gain = None and correct_gain_ anew"
            )
        super().register_parameter(name, param)

    def fault(self, name: str, value: Any) -> str | None:
        if name == "gain" and tuple(value.shape) != (self.channels,):
            return f"has shape {list(value.shape)}"
        return "holds NaN or infinity" if name == "gain" and not bool(value.isfinite().all()) else None


def fit_gains_(
    model: M,
    layers: Mapping[str, Gained],
    batches: Iterable[Any],
    per: Per,
    weigh: Weigh,
    progress: bool,
    verb: str = "correct_gain_",
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
        verb: what messages and the ledger call it.

    Raises:
        RecoupError: layers that do not run in mode ``emulate``, no layer that ran, no or bad batches, batch norm
            statistics that were repaired without the gain. Gains are then as they were.

    Warns:
        RecoupWarning: channels whose output was zero throughout; they keep gain 1. Outputs that were NaN or infinite,
            which are left out. Layers that never ran.
    """
    choice("correct_gain_", "weigh", weigh, get_args(Weigh))
    if per not in ("channel", "layer"):
        raise RecoupError(f"{verb}(per={per!r}): per must be 'channel' or 'layer'")
    ledger.refuse_after_statistics(model, verb)
    floating = [name for name, layer in layers.items() if layer.mode != "emulate"]
    if floating:
        raise RecoupError(
            f"{verb}: {', '.join(floating[:6])} run in mode {layers[floating[0]].mode!r}, where nothing is "
            "truncated: set mode = 'emulate' first"
        )
    before = {name: {"gain": layer.gain} for name, layer in layers.items()}
    with ledger.whole(model):
        for layer in layers.values():
            layer.gain = None
        found, images = _fits(model, layers, batches, per, weigh, progress, verb)
        say_missed({name: layer for name, layer in layers.items() if name not in found}, len(layers), verb)
        fitted = {name: layer for name, layer in layers.items() if name in found}
        for name, layer in fitted.items():
            layer.gain = found[name].gain.clone()
        dead, infinite = ({name: getattr(found[name], kind) for name in fitted} for kind in ("dead", "infinite"))
        channels, gave = next(iter(layers.values())).gained_as
        tell(verb, dead, f"{channels} of {{layers}} {gave}, keep gain 1", 3)
        tell(verb, infinite, "outputs of {layers} were NaN or infinite and have no say in their gains", 3)
        ledger.record(model, fitted, "gain", verb, before, images=images)
    return model


def _fits(
    model: nn.Module,
    layers: Mapping[str, Gained],
    batches: Iterable[Any],
    per: Per,
    weigh: Weigh,
    progress: bool,
    verb: str,
) -> tuple[dict[str, "_Fitted"], int]:
    """What belongs to the layers that ran, and how many images that took; see `fit_gains_`."""

    def make(_wanted: Sequence[int]) -> list[tuple[dict[str, _Fitted], int]]:
        fits = {name: _Fit(layer, per, weigh) for name, layer in layers.items()}
        images = 0
        with watching_forward(layers, {name: fit.observe for name, fit in fits.items()}, verb):
            for inputs, _ in prepared(model, batches, verb, progress):
                call(model, inputs)
                images += images_in(inputs)
        return [({n: _Fitted(fit.gain, fit.dead, fit.infinite) for n, fit in fits.items() if fit.seen}, images)]

    with evaluating(model), torch.no_grad():
        wanted = state(model, "gains", per, weigh, tuple(layers))
        return measured([wanted], make, lambda: state(model))[0]


def tell(purpose: str, counts: Mapping[str, int], what: str, above: int) -> None:
    """Warn of what some layers have, counted by layer; layers that have none are not named.

    Args:
        purpose: what the caller does; heads the warning.
        counts: layer -> how many.
        what: they are, with the word ``layers`` in braces where how many layers there are is to stand.
        above: how many calls above this one the user's is.
    """
    found = {name: count for name, count in counts.items() if count}
    if found:
        shown = ", ".join(f"{name} ({count})" for name, count in list(found.items())[:6])
        said = what.replace("{layers}", f"{len(found)} layers")
        warnings.warn(f"{purpose}: {sum(found.values())} {said}: {shown}", RecoupWarning, stacklevel=1 + above)


class _Fitted(NamedTuple):
    """A layer's gain, its channels of which it multiplied nothing but zeros, and outputs that were not finite."""

    gain: Tensor
    dead: int
    infinite: int


class _Fit:
    """Running sums of one layer, in float64."""

    def __init__(self, layer: Gained, per: Per, weigh: Weigh = "outputs") -> None:
        self.layer, self.per, self.weigh, self.infinite, self.seen = layer, per, weigh, 0, False
        place = next((parameter.device for parameter in layer.parameters()), None)  # a norm may have none
        zeros = torch.zeros(layer.channels, dtype=torch.float64, device=place)
        self.cross = self.square = self.bare = self.repaired = zeros

    def observe(self, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        assert isinstance(layer, Gained)
        seen = layer.seen(output, args, kwargs)  # the layer has no gain until the end
        p, z = seen.multiplied.double(), seen.wanted.double()
        good = (
            None if bool((p.sum() + z.sum()).isfinite()) else p.isfinite() & z.isfinite()
        )  # no sum of floats overflows
        if good is not None:
            self.infinite += int((~good).sum())
            p, z = p.where(good, 0.0), z.where(good, 0.0)
        others = [i for i in range(p.dim()) if i != seen.dim % p.dim()]
        weighed = p if self.weigh == "outputs" else _of_rows(z, seen.dim) * p
        self.cross = self.cross.to(p.device) + (weighed * z).sum(others)
        self.square = self.square.to(p.device) + (weighed * p).sum(others)
        self.seen = True
        y = layer.gained(self._factor.float(), seen, output, args, kwargs)
        if layer.rounds_gained:
            error, moved = z - p, (y - output).double().reshape(p.shape)
            moved = moved if good is None else moved.where(good, 0.0)
            self.bare = self.bare.to(p.device) + (error * error).sum(others)
            self.repaired = self.repaired.to(p.device) + (error - moved).square().sum(others)
            y = layer.gained(self.gain, seen, output, args, kwargs)
        return y

    @property
    def gain(self) -> Tensor:
        """The factor; 1 where, rounded, it left no smaller error on what was seen than none would have left."""
        factor = self._factor
        if self.layer.rounds_gained:
            factor = torch.where(self.repaired < self.bare, factor, 1.0)
        return factor.float()

    @property
    def _factor(self) -> Tensor:
        cross, square = self.cross, self.square
        if self.per == "layer":
            cross, square = cross.sum().expand_as(cross), square.sum().expand_as(square)
        return torch.where(square > 0, cross / square, 1.0)

    @property
    def dead(self) -> int:
        """Channels of which the gain never multiplied anything but zero."""
        return int((self.square == 0).sum())


def _of_rows(z: Tensor, dim: int) -> Tensor:
    """One over the mean square of each row, with its channels in ``dim``; 0 for a row of zeros."""
    square = z.square().mean(dim, keepdim=True)
    return torch.where(square > 0, 1 / square, 0.0)


def gain_repair(
    unit: str,
    meaning: str,
    apply: Callable[[nn.Module, Iterable[Any]], object],
    short: str = "",
    applies: Callable[[nn.Module], bool] = lambda _: True,
) -> Repair:
    """A repair of the stage ``gain``, one factor per ``unit``, that writes down itself what it did."""
    return Repair(
        f"gain per {unit}", "gain", meaning, f"a gain per {unit}", apply, records=True, short=short, applies=applies
    )


def _without_norms(model: nn.Module) -> bool:
    return not has_norms(model)


def gain_repairs(correct: Callable[..., object]) -> tuple[Repair, Repair, Repair, Repair]:
    """A wing's repairs by ``correct(model, batches, per, weigh=...)``: a gain per layer; one per channel; that one with
    rows counted alike, for networks without batch norm statistics; one per channel, then paired."""
    per_layer = gain_repair(
        "layer",
        "Every layer's accumulator output times one factor, fitted in closed form: truncation shrinks sums.",
        lambda model, batches: correct(model, batches, "layer"),
    )
    per_channel = gain_repair(
        "channel",
        "Every output channel's sum times a factor of its own, fitted in closed form on the calibration images: it "
        "undoes the shrink of truncated sums, and also serves networks without BatchNorm.",
        lambda model, batches: correct(model, batches, "channel"),
        short="gain",
    )
    rows = replace(
        per_channel,
        name="gain per channel, rows alike",
        meaning="The same with every row (a token, a place) counted alike: a few tokens of a transformer are far "
        "larger than the others, saturate, and would decide the factors alone.",
        sentence="a gain per channel that counts rows alike",
        apply=lambda model, batches: correct(model, batches, "channel", weigh="rows"),
        short="gain rows",
        applies=_without_norms,
    )
    paired = Repair.combined(
        "gain + paired",
        "A gain per channel first, then paired recalibration of what remains.",
        "a gain per channel with paired recalibration",
        (per_channel, PAIRED),
    )
    return per_layer, per_channel, rows, paired
