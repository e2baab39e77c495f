"""The 8-bit integer baseline: activation scales from calibration data.

One scale and one zero per layer, code = clip(round(x / scale) + zero, 0, 255), ties to even:

    unsigned  zero = 0,   scale = (mean over the calibration images of the image's largest activation) / 255
    signed    zero = 128, scale = (mean over the calibration images of the image's largest |activation|) / 127

Weights are symmetric per output channel and need no data (`recoup.nbsmt.weights.quantize_weight`). Source: the authors'
later public code for unsigned codes; signed ones are our definition.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import nn

from recoup.errors import RecoupError, RecoupWarning
from recoup.fields import choice, integer
from recoup.network import ledger
from recoup.network.attention import AttentionUnit
from recoup.network.attention_scales import OperandRanges, emulable, is_heard, measuring_operands
from recoup.network.batches import call, count, prepared
from recoup.network.checks import is_module
from recoup.network.emulated import Emulated, running
from recoup.network.images import first_images, keep_images
from recoup.network.modes import evaluating
from recoup.network.multipliers import multipliers
from recoup.network.saturation import watching_sums
from recoup.network.scales import SIGNED, Scaled
from recoup.network.selection import UNMATCHED, Selection
from recoup.wings import cards, wing_of

M = TypeVar("M", bound=nn.Module)
Negative = Literal["error", "float"]
Activations = Literal["auto", "unsigned", "signed"]


def calibrate_(
    model: M,
    batches: Iterable[Any],
    layers: Mapping[str, Any] | None = None,
    *,
    activations: Activations = "auto",
    negative: Negative = "error",
    keep: int = 1024,
    progress: bool = False,
) -> M:
    """Measure activation scales and store them on the layers; the model computes as before until `emulate_`.

    One pass in eval mode without gradients, in float also where the model is emulated already. By default every
    Conv1d, Conv2d and Linear is calibrated but the first and the last layer that run and multiply (the first
    convolution and the classifier, of whatever class: also a subclass, a transposed convolution, an LSTM), which stay
    in float [our definition for networks that do not start with a convolution]. Layers on hardware with calibrated
    scales are always calibrated; a bias correction or gain of theirs goes with the old scale.

    So is every attention whose products hardware takes (`models.attention.AttentionProducts`, attention modules of
    transformers that ask its interface for sdpa or eager), with a scale for each operand: q times the attention's own
    scale, k and v by their largest magnitude / 127, the probabilities by their largest / 255, whatever
    ``activations`` says.

    Args:
        model: any module.
        batches: the calibration data; about 2,000 images are customary. Labels are not needed.
        layers: ``{"name" or "re:...": True or None}``: calibrate a layer or leave it in float, first match wins;
            layers it does not mention follow the default.
        activations: the codes of the layers' inputs. ``auto``: unsigned where no calibration input is negative, else
            signed, as behind GELU or a norm; ``unsigned`` and ``signed``: in all layers [ours].
        negative: what becomes of layers whose inputs are negative under ``activations="unsigned"``, which would clip
            them. ``error``: refuse; ``float``: leave them in float, and say which. Elsewhere it has no say [ours].
        keep: how many of the input images to copy and keep on the model for `correct_bias_`.
        progress: whether to show a progress bar.

    Returns:
        The same model; its calibrated layers have ``activation_scale`` (a float32 value) and ``activation_zero``, its
        attentions ``operand_scales`` (those of q, k, the probabilities and v).

    Raises:
        RecoupError: no or bad batches; layers whose inputs are negative under ``unsigned``, or on hardware whose codes
            have no sign (all of them in the error's ``layers``), NaN, infinite or all zero; a key that matches nothing;
            nothing left to calibrate. No scale is changed then.

    Warns:
        RecoupWarning: the layers that ``negative="float"`` leaves in float, or those it does not, under other
            ``activations``; attentions that have what no hardware emulates, such as a soft cap, which stay in float.
    """
    is_module(model, "calibrate_")
    choice("calibrate_", "activations", activations, get_args(Activations))
    choice("calibrate_", "negative", negative, get_args(Negative))
    integer("calibrate_", "keep", keep, (0, 1 << 62))
    measured = _Measured.of(model, batches, layers, keep, progress)
    codes = measured.codes(activations, negative)
    scales = {name: seen.scales(name) for name, seen in measured.products.items()}
    ledger.begin_structure(model, "calibrate_")
    measured.write(codes, scales)
    keep_images(model, measured.kept)
    return model


@dataclass
class _Measured:
    """What a pass in float found.

    Attributes:
        candidates: the layers that hardware of scales is for; ``layers``: they, and the first and the last that run.
        attentions: those whose scales are to be set anew.
        selected, products: what is to be calibrated of both.
        kept: the first images.
    """

    candidates: dict[str, nn.Module]
    layers: dict[str, nn.Module]
    attentions: dict[str, nn.Module]
    selected: dict[str, "_Range"]
    products: dict[str, OperandRanges]
    kept: list[Any]

    @classmethod
    def of(
        cls, model: nn.Module, batches: Iterable[Any], layers: Mapping[str, Any] | None, keep: int, progress: bool
    ) -> "_Measured":
        """One pass."""
        candidates, attentions = _candidates(model)
        chosen = Selection(layers, candidates | attentions, "calibrate_")
        weighty = {name: found.module for name, found in multipliers(model).items()} | candidates
        heard = {name: module for name, module in attentions.items() if is_heard(module)}
        with measuring_operands(heard) as operands:
            ranges, ran, kept = _passed(model, batches, weighty, candidates, keep, progress)
        ends = _ends(ran)
        wanted = {name: seen for name, seen in operands.items() if chosen.of(name) is UNMATCHED or chosen.of(name)}
        products = emulable(wanted)
        selected = _selected(chosen, candidates, ranges, ends, alone=not products)
        # An emulated attention that did not run keeps its scales.
        anew = {n: module for n, module in heard.items() if n in operands or not isinstance(module, Emulated)}
        return cls(candidates, candidates | {end: weighty[end] for end in ends}, anew, selected, products, kept)

    def codes(self, activations: Activations, negative: Negative) -> dict[str, tuple[float, int]]:
        """Scale and zero of every layer that is calibrated."""
        selected = _heard(self.selected, self.candidates, activations, negative)
        words: dict[str, Activations] = {name: _words(activations, self.candidates[name]) for name in selected}
        return {name: seen.codes(name, words[name]) for name, seen in selected.items()}

    def write(self, codes: Mapping[str, tuple[float, int]], scales: Mapping[str, tuple[float, ...]]) -> None:
        """Leave them on the modules; what is not calibrated has none."""
        for name, module in self.layers.items():
            module.activation_scale, module.activation_zero = codes.get(name, (None, None))  # type: ignore[assignment]
            if isinstance(module, Emulated):
                module.rescaled()
        for name, module in self.attentions.items():
            module.operand_scales = scales.get(name)  # type: ignore[assignment]


def _heard(
    selected: dict[str, "_Range"], candidates: Mapping[str, nn.Module], activations: Activations, negative: Negative
) -> dict[str, "_Range"]:
    """What is left of the layers by ``negative``, which has a say under unsigned codes only."""
    _refuse_signs(selected, candidates)
    if activations == "unsigned":
        return _without_negative(selected, candidates, negative)
    if negative == "float":
        _tell_unheard(selected, activations)
    return selected


def _passed(
    model: nn.Module,
    batches: Iterable[Any],
    weighty: Mapping[str, nn.Module],
    candidates: Mapping[str, nn.Module],
    keep: int,
    progress: bool,
) -> tuple[dict[str, "_Range"], dict[str, None], list[Any]]:
    """One pass in float: what the candidates' inputs were, what ran in which order, the first images."""
    ranges: dict[str, _Range] = {}
    ran: dict[str, None] = {}
    kept: list[Any] = []
    hooks = [
        *(module.register_forward_pre_hook(_note(name, ran)) for name, module in weighty.items()),
        *(m.register_forward_pre_hook(_observe(name, ranges), with_kwargs=True) for name, m in candidates.items()),
    ]
    try:
        watched = watching_sums(model, "calibrate_ (in float)", in_float=True)
        with evaluating(model), running(model, "float"), watched, torch.no_grad():
            for inputs, _ in prepared(model, batches, "calibrate_", progress):
                call(model, inputs)
                if keep > (held := sum(map(count, kept))):
                    kept.append(first_images(inputs, keep - held))
    finally:
        for hook in hooks:
            hook.remove()
    return ranges, ran, kept


def _candidates(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The layers, and the attentions, that hardware of calibrated scales stands in for, or has taken."""
    found = [card for card in cards().values() if not card.seedless]
    layers: dict[str, nn.Module] = {}
    attentions: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if _scaled(module):
            layers[name] = module
        elif isinstance(module, AttentionUnit) and not wing_of(module.config, "calibrate_").seedless:
            attentions[name] = module
        elif isinstance(module, Emulated):
            continue
        # A layer that `emulate_` will refuse for methods set on it is measured all the same: it is told there.
        elif kinds := [kind for card in found if (kind := card.for_class(type(module))) is not None]:
            kept = attentions if all(issubclass(kind, AttentionUnit) for kind in kinds) else layers
            kept[name] = module
    return layers, attentions


def _scaled(module: nn.Module) -> bool:
    """Whether a layer is emulated on hardware that works on activation scales; attentions scale their operands."""
    if not isinstance(module, Emulated) or isinstance(module, AttentionUnit):
        return False
    return wing_of(module.config, "calibrate_").works_on_scales(module.config)


def _words(activations: Activations, module: nn.Module) -> Activations:
    if _without_sign(module):
        return "unsigned"
    return "auto" if _by_magnitude(module) else activations


def _without_sign(module: nn.Module) -> bool:
    """Whether a layer's hardware takes no negative activations at all."""
    return _scaled(module) and isinstance(module, Scaled) and module.without_sign


def _by_magnitude(module: nn.Module) -> bool:
    """Whether a scaled layer's operands are signed by themselves, so that a scale is all that it needs."""
    signed = isinstance(module, Emulated) and _scaled(module) and not _without_sign(module)
    return signed and wing_of(module.config, "calibrate_").seedless


@dataclass
class _Range:
    """What a layer's inputs were: the sums over images of their largest activation and magnitude; the least of all."""

    shape: list[int]
    largest: float = 0.0
    magnitude: float = 0.0
    images: int = 0
    least: float = float("inf")

    def add(self, x: torch.Tensor) -> None:
        """Count the images of a batch."""
        over = tuple(range(1, x.dim()))
        peak_N, least_N = (x.amax(over), x.amin(over)) if over else (x, x)
        self.largest += float(peak_N.double().sum())
        self.magnitude += float(torch.maximum(peak_N, -least_N).double().sum())
        self.images += peak_N.numel()
        self.least = min(self.least, float(least_N.min()))  # NaN shows in the sums

    def codes(self, name: str, activations: Activations) -> tuple[float, int]:
        """The scale and the zero of the codes, where ``name`` is the layer's."""
        signed = activations == "signed" or (activations == "auto" and self.least < 0)
        total, steps = (self.magnitude, 127) if signed else (self.largest, 255)
        if not np.isfinite(total):
            raise RecoupError(f"calibrate_: the input {self.shape} of layer {name!r} holds NaN or infinity")
        if total <= 0:
            raise RecoupError(
                f"calibrate_: layer {name!r} {self.shape} saw only zeros, so its scale is unknown: calibrate on other "
                'data or leave it in float with layers={"name": None} (of emulate_, where it is emulated already)'
            )
        return float(np.float32(total / self.images / steps)), SIGNED if signed else 0


def _note(name: str, ran: dict[str, None]) -> Any:
    def hook(_: nn.Module, __: tuple) -> None:
        ran.setdefault(name)  # a dict keeps the order of first execution

    return hook


def _ends(ran: Iterable[str]) -> tuple[str, ...]:
    """The first and the last module that ran and multiplies, of whatever class; a block is no layer besides its own."""
    order = list(ran)
    layers = [name for name in order if not any(_within(other, name) for other in order)]
    return (layers[0], layers[-1]) if layers else ()


def _within(name: str, block: str) -> bool:
    return name != block and (not block or name.startswith(block + "."))


def _observe(name: str, ranges: dict[str, _Range]) -> Any:
    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        if not x.numel():
            return
        ranges.setdefault(name, _Range(list(x.shape))).add(x)

    return hook


def _selected(
    chosen: Selection,
    candidates: Mapping[str, nn.Module],
    ranges: dict[str, _Range],
    ends: tuple[str, ...],
    *,
    alone: bool,
) -> dict[str, _Range]:
    """The layers to calibrate; ``alone``: there is nothing else."""
    out = {}
    for name in candidates:
        wanted = chosen.of(name)
        if wanted is UNMATCHED:
            inner = name in ranges and name not in ends
            wanted = inner or (name in ranges and _scaled(candidates[name]))
        elif wanted and name not in ranges:
            raise RecoupError(f"calibrate_: layer {name!r} is to be calibrated, but the model never ran it")
        if wanted:
            out[name] = ranges[name]
    if not out and alone:
        raise RecoupError(
            f"calibrate_: nothing to calibrate: of {len(ranges)} layers that ran, the first and the last stay in float "
            'by default; name layers to calibrate with layers={"name": True}'
        )
    return out


def _without_negative(
    ranges: dict[str, _Range], candidates: Mapping[str, nn.Module], negative: Negative
) -> dict[str, _Range]:
    """What can be calibrated. Layers with negative inputs stay in float if asked, unless they are emulated already."""
    below = {name: seen for name, seen in ranges.items() if seen.least < 0 and not _by_magnitude(candidates[name])}
    fixed = [name for name in below if _scaled(candidates[name])]
    if below and (negative == "error" or fixed or len(below) == len(ranges)):
        named = "; ".join(f"{name!r} {seen.shape} down to {seen.least:.4g}" for name, seen in below.items())
        python, options = _remedies(below, ranges, fixed)
        raise RecoupError(
            f"calibrate_: {len(below)} layers have negative inputs, which unsigned 8-bit activations would clip "
            f"silently: {named}. ",
            layers=tuple(below),
            remedy=python,
            options=options,
        )
    if below:
        warnings.warn(
            f"calibrate_: {len(below)} of {len(ranges)} layers have negative inputs, which unsigned 8-bit activations "
            f"would clip, and stay in float: {', '.join(below)}",
            RecoupWarning,
            stacklevel=5,
        )
    return {name: seen for name, seen in ranges.items() if name not in below}


def _refuse_signs(ranges: Mapping[str, _Range], candidates: Mapping[str, nn.Module]) -> None:
    """Refuse negative inputs of hardware whose activations have no sign, whatever the word about codes is."""
    below = {name: seen for name, seen in ranges.items() if seen.least < 0 and _without_sign(candidates[name])}
    if below:
        named = "; ".join(f"{name!r} {seen.shape} down to {seen.least:.4g}" for name, seen in below.items())
        raise RecoupError(
            f"calibrate_: {len(below)} layers have negative inputs, and their hardware's activations have no sign: "
            f"{named}. ",
            layers=tuple(below),
            remedy="restore_ the model and emulate_ it with signed operands in these layers (layers={name: config})",
            options="--layers NAME=CONFIG gives these layers hardware with signed operands",
        )


def _tell_unheard(ranges: dict[str, _Range], activations: Activations) -> None:
    """Warn where layers that were to stay in float get signed codes."""
    below = [name for name, seen in ranges.items() if seen.least < 0]
    if below:
        warnings.warn(
            f'calibrate_: negative="float" has a say under activations="unsigned" only; under {activations!r} layers '
            f"with negative inputs get signed codes: {', '.join(below)}",
            RecoupWarning,
            stacklevel=5,
        )


def _remedies(below: Mapping[str, _Range], ranges: Mapping[str, _Range], fixed: list[str]) -> tuple[str, str]:
    """What to do about negative inputs, in Python and on the command line."""
    first, signed = next(iter(below)), "auto gives them signed codes"
    if fixed:
        rest = "; or restore_ the model first: layers that are emulated already cannot stay in float"
        return f'activations="auto" gives them signed codes{rest}', f"--activations {signed}{rest}"
    if len(below) == len(ranges):
        rest = ". No other layer is to be calibrated, so none may stay in float"
        return f'activations="auto" gives them signed codes{rest}', f"--activations {signed}{rest}"
    python = (
        'activations="auto" gives them signed codes, negative="float" leaves all of them in float, '
        f'layers={{"{first}": None}} one of them'
    )
    return python, (
        f"--activations {signed}, --negative float leaves all of them in float, --layers {first}=float one of them"
    )
