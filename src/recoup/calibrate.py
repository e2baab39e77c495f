"""The 8-bit integer baseline: activation scales from calibration data.

Activations are unsigned, one scale per layer: scale = (mean over the calibration images of the image's largest
activation) / 255, code = clip(round(x / scale), 0, 255), ties to even. Weights are symmetric per output channel and
need no data (`recoup.nbsmt.weights.quantize_weight`). Source: the authors' later public code.
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
from recoup.network.batches import call, count, prepared
from recoup.network.checks import is_module
from recoup.network.emulated import Emulated, running
from recoup.network.images import first_images, keep_images
from recoup.network.modes import evaluating
from recoup.network.multipliers import multipliers
from recoup.network.saturation import watching_sums
from recoup.network.selection import UNMATCHED, Selection
from recoup.wings import cards, wing_of

M = TypeVar("M", bound=nn.Module)
Negative = Literal["error", "float"]


def calibrate_(
    model: M,
    batches: Iterable[Any],
    layers: Mapping[str, Any] | None = None,
    *,
    negative: Negative = "error",
    keep: int = 1024,
    progress: bool = False,
) -> M:
    """Measure activation scales and store them on the layers; the model computes as before until `emulate_`.

    One pass in eval mode without gradients, in float also where the model is emulated already. By default every
    Conv1d, Conv2d and Linear is calibrated but the first and the last layer that run and multiply (the first
    convolution and the classifier, of whatever class: also a subclass, a transposed convolution, an LSTM), which stay
    in float [our definition for networks that do not start with a convolution]. Layers that
    are NB-SMT layers already are always calibrated; a bias correction of theirs belonged to the old scale and goes.

    Args:
        model: any module.
        batches: the calibration data; about 2,000 images are customary. Labels are not needed.
        layers: ``{"name" or "re:...": True or None}``: calibrate a layer or leave it in float, first match wins;
            layers it does not mention follow the default.
        negative: what becomes of layers whose inputs are negative, as behind GELU or a norm: unsigned codes would clip
            them. ``error``: refuse; ``float``: leave them in float, and say which [ours].
        keep: how many of the input images to copy and keep on the model for `correct_bias_`.
        progress: whether to show a progress bar.

    Returns:
        The same model, with ``activation_scale`` (a float32 value) on the calibrated layers.

    Raises:
        RecoupError: no or bad batches; layers whose inputs are negative (all of them in the error's ``layers``), NaN,
            infinite or all zero; a key that matches nothing; nothing left to calibrate. No scale is changed then.

    Warns:
        RecoupWarning: the layers that ``negative="float"`` leaves in float.
    """
    is_module(model, "calibrate_")
    choice("calibrate_", "negative", negative, get_args(Negative))
    integer("calibrate_", "keep", keep, (0, 1 << 62))
    candidates = _candidates(model)
    chosen = Selection(layers, candidates, "calibrate_")
    weighty = {name: found.module for name, found in multipliers(model).items()} | candidates
    ranges, ran, kept = _passed(model, batches, weighty, candidates, keep, progress)
    ends = _ends(ran)
    selected = _without_negative(_selected(chosen, candidates, ranges, ends), candidates, negative)
    scales = _scales(selected)
    ledger.begin_structure(model, "calibrate_")
    for name, module in (candidates | {end: weighty[end] for end in ends}).items():
        module.activation_scale = scales.get(name)  # type: ignore[assignment]
        if isinstance(module, Emulated):
            module.rescaled()
    keep_images(model, kept)
    return model


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


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """What hardware that works on activation scales stands in for, or has taken."""
    kinds = {kind for card in cards().values() if not card.seedless for kind in card.layers}
    return {name: module for name, module in model.named_modules() if type(module) in kinds or _scaled(module)}


def _scaled(module: nn.Module) -> bool:
    """Whether a layer is emulated on hardware that works on activation scales."""
    return isinstance(module, Emulated) and not wing_of(module.config, "calibrate_").seedless


@dataclass
class _Range:
    """What a layer's inputs were: the sum over images of their largest activation, and the least of all."""

    shape: list[int]
    largest: float = 0.0
    images: int = 0
    least: float = float("inf")


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
        seen = ranges.setdefault(name, _Range(list(x.shape)))
        peak_N = x.amax(tuple(range(1, x.dim()))) if x.dim() > 1 else x
        seen.largest += float(peak_N.double().sum())
        seen.images += peak_N.numel()
        seen.least = min(seen.least, float(x.min()))  # NaN shows in `largest`

    return hook


def _selected(
    chosen: Selection, candidates: Mapping[str, nn.Module], ranges: dict[str, _Range], ends: tuple[str, ...]
) -> dict[str, _Range]:
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
    if not out:
        raise RecoupError(
            f"calibrate_: nothing to calibrate: of {len(ranges)} layers that ran, the first and the last stay in float "
            'by default; name layers to calibrate with layers={"name": True}'
        )
    return out


def _without_negative(
    ranges: dict[str, _Range], candidates: Mapping[str, nn.Module], negative: Negative
) -> dict[str, _Range]:
    """What can be calibrated. Layers with negative inputs stay in float if asked, unless they are emulated already."""
    below = {name: seen for name, seen in ranges.items() if seen.least < 0}
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
            stacklevel=3,
        )
    return {name: seen for name, seen in ranges.items() if name not in below}


def _remedies(below: Mapping[str, _Range], ranges: Mapping[str, _Range], fixed: list[str]) -> tuple[str, str]:
    """What to do about negative inputs, in Python and on the command line."""
    first = next(iter(below))
    if fixed:
        both = "restore_ the model first: layers that are emulated already cannot stay in float"
        return both, both
    if len(below) == len(ranges):
        both = "No other layer is to be calibrated, so this hardware has no work here"
        return both, both
    python = f'negative="float" leaves all of them in float, layers={{"{first}": None}} one of them'
    return python, f"--negative float leaves all of them in float, --layers {first}=float one of them"


def _scales(ranges: Mapping[str, _Range]) -> dict[str, float]:
    bad = {name: seen for name, seen in ranges.items() if not np.isfinite(seen.largest)}
    if bad:
        name, seen = next(iter(bad.items()))
        raise RecoupError(f"calibrate_: the input {seen.shape} of layer {name!r} holds NaN or infinity")
    dead = [name for name, seen in ranges.items() if seen.largest <= 0]
    if dead:
        raise RecoupError(
            f"calibrate_: layer {dead[0]!r} {ranges[dead[0]].shape} saw only zeros, so its scale is unknown: calibrate "
            'on other data or leave it in float with layers={"name": None}'
        )
    return {name: float(np.float32(seen.largest / seen.images / 255)) for name, seen in ranges.items()}
