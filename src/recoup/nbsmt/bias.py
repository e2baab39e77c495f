"""The mean half of NB-SMT's harm, in closed form: a bias correction per output channel.

Legend: see `recoup.nbsmt.tally`; A activation operands (of `recoup.nbsmt.groups`), J channels padded to whole slots.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn

from recoup.fields import choice
from recoup.kernels.arrays import array
from recoup.nbsmt import reference
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.groups import Activation
from recoup.nbsmt.observe import Layer, Seen, hooked, in_mode, nbsmt_layers
from recoup.nbsmt.operand import operands
from recoup.nbsmt.reference import quantize_activation
from recoup.nbsmt.tally import Taps
from recoup.nbsmt.weights import weight_operand
from recoup.network import ledger
from recoup.network.batches import call, count, prepared
from recoup.network.images import kept_images
from recoup.network.modes import evaluating
from recoup.network.reached import watching

M = TypeVar("M", bound=nn.Module)
Weigh = Literal["outputs", "rows"]
LEAST = 0.1  # of the median row's mean square: rows below count as that [ours]


@torch.no_grad()
def correct_bias_(
    model: M, batches: Iterable[Any] | None = None, *, weigh: Weigh = "outputs", progress: bool = False
) -> M:
    """Cancel the mean shift of NB-SMT: every layer gets back what it loses on average, per output channel.

    With one weight per channel and tap, the expected loss is a product of expectations, E[y8 - y] = E[P] Q: only the
    mean activation operands are measured (borders and padding included), and no second convolution is run (but under an
    accumulator, which has no such form). The correction is added to the layer's output in ``emulate`` mode. It works
    for networks without batch norm; in one with batch norm it is the alternative to `recalibrate_`, or comes before it:
    after it, the stored means already hold the shift and would be corrected twice.

    Every layer sees inputs that earlier layers produced with their own corrections. Within a pass a batch is corrected
    by its own mean; the stored correction is the mean over all batches, each weighted by its output positions. With a
    single batch it is exact: the mean output of a layer over that batch equals the 8-bit result for the same input.

    Under ``weigh="rows"`` the mean, then measured, weighs a row (a token or a place, with all its channels) by one over
    its mean y8^2: a few tokens of a transformer are far larger than the others, and would decide it alone.

    Args:
        model: a model after `emulate_`.
        batches: calibration data, 10^2 images or more; None: the images that `calibrate_` kept.
        weigh: ``outputs``, every position's loss counts; ``rows``, relative to the position's size.
        progress: whether to show a progress bar.

    Returns:
        The same model, with ``bias_correction`` (float32 [O]) on its layers; None on layers that run one thread, with
        exact sums, or never ran. An earlier correction is replaced. After an error or an interrupt it is as before.

    Raises:
        RecoupError: no NB-SMT layer, none that ran, no or bad batches, no kept images, another ``weigh``.

    Warns:
        RecoupWarning: layers that never ran.

    Source: ours; it rests on the linearity of the loss in the activations.
    """
    choice("correct_bias_", "weigh", weigh, get_args(Weigh))
    layers = nbsmt_layers(model, "correct_bias_")
    ledger.refuse_after_statistics(model, "correct_bias_")
    batches = kept_images(model) if batches is None else batches
    before = {name: layer.bias_correction for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.bias_correction = None
        corrections, images = _measured(model, layers, batches, weigh, progress)
    except BaseException:
        for name, layer in layers.items():
            layer.bias_correction = before[name]
        raise
    for name, layer in layers.items():
        layer.bias_correction = corrections.get(name)
    _record(model, {name: layers[name] for name in corrections}, before, images)
    return model


def _measured(
    model: nn.Module, layers: dict[str, Layer], batches: Iterable[Any], weigh: Weigh, progress: bool
) -> tuple[dict[str, Tensor], int]:
    """The corrections of the layers that lose something, float32 [O], and of how many images."""
    lost, images = dict[str, _Mean](), 0

    def correct(name: str, seen: Seen, output: Tensor) -> Tensor | None:
        if (config := seen.layer.active_config) == config.eight_bit:
            return None
        mean_O, weight = mean_relative_loss(seen) if weigh == "rows" else (mean_loss(seen), float(output.numel()))
        lost.setdefault(name, _Mean(mean_O, 0.0)).add(mean_O, weight)
        return output + mean_O.float().view(-1, *[1] * (seen.layer.weight.dim() - 2))

    watch = watching(layers, "correct_bias_")
    with watch, evaluating(model), in_mode(layers, "emulate"), hooked(layers, correct, "correct_bias_"):
        for inputs, _ in prepared(model, batches, "correct_bias_", progress):
            call(model, inputs)
            images += count(inputs)
    return {name: mean.value.float() for name, mean in lost.items()}, images


def _record(model: nn.Module, corrected: Mapping[str, Any], before: Mapping[str, Any], images: int) -> None:
    """Enter into the ledger which layers were corrected, and what they had before."""
    undone = {name: {"bias_correction": before[name]} for name in corrected}
    ledger.record(model, corrected, "bias", "correct_bias_", undone, images=images)


def mean_loss(seen: Seen) -> Tensor:
    """Mean of (8-bit output - NB-SMT output) over images and output positions, per output channel: float64 [O].

    The sums are exact integers; the mean is rounded once, then multiplied by the layer's float32 scales. The closed
    form knows sharing alone: an accumulator's loss is measured, from both outputs as they are.
    """
    layer, config, geometry = seen.layer, seen.layer.active_config, seen.geometry
    if config.accumulator is not None:
        lost = seen.product(config.eight_bit, None).double() - seen.product(config, layer.order).double()
        return lost.mean((0, 2, 3))
    weight, scale_O = seen.weight_codes()
    weight = weight if layer.order is None else weight[:, layer.order]
    operand = weight_operand(weight, config, seen.zero)
    sum_AJkl = _operand_sums(seen, (Activation(), *operand.activations), config)
    exact_Jkl, operand_AJkl = sum_AJkl[0], sum_AJkl[1:]
    exact_O = weight.double().flatten(1) @ exact_Jkl[: weight.shape[1]].flatten()
    nbsmt_O = operand.weight_OGJkk.double().flatten(1) @ operand_AJkl.flatten()
    positions = len(seen.x) * Taps.of((seen.x.shape[2], seen.x.shape[3]), geometry).outputs
    return (exact_O - nbsmt_O) / positions * (scale_O * seen.scale).double()


def mean_relative_loss(seen: Seen) -> tuple[Tensor, float]:
    """The mean of (8-bit output - NB-SMT output), each position weighed by one over the mean square of its 8-bit output
    before the bias, or over a tenth of the median of these squares where it is smaller, so that a nearly blank place
    does not decide alone, float64 [O]; and the sum of the weights. Positions without any output have no say."""
    layer, config = seen.layer, seen.layer.active_config
    exact = seen.product(config.eight_bit, None).double()
    lost, square = exact - seen.product(config, layer.order).double(), exact.square().mean(1, keepdim=True)
    some = square[square > 0]
    floor = LEAST * float(some.median()) if len(some) else 1.0
    weight = torch.where(square > 0, 1 / square.clamp_min(floor), 0.0)
    total = float(weight.sum())
    return (weight * lost).sum((0, 2, 3)) / (total or 1.0), total


def _operand_sums(seen: Seen, activations: tuple[Activation, ...], config: NBSMT) -> Tensor:
    """What each activation operand adds up to, over all images and output positions: float64 [A, J, k, l], exact."""
    x = seen.x if seen.layer.order is None else seen.x[:, seen.layer.order]
    if x.is_cpu:
        x_NHWC = x.permute(0, 2, 3, 1).contiguous()
        bytes_PJ, _ = operands(x_NHWC.view(-1, x.shape[1]), seen.scale, config, activations, zero=seen.zero)
        bytes_NHWJ = array(bytes_PJ.view(*x_NHWC.shape[:3], -1))  # whose sum takes torch ten times as long
        sum_HWJ = torch.from_numpy(bytes_NHWJ.sum(0, dtype=np.int64)) - len(x) * seen.zero
    else:
        code = quantize_activation(x, seen.scale, seen.zero)
        sum_HWJ = reference.activation_operand(code, activations, config).sum(0, dtype=torch.int64).permute(1, 2, 0)
    sum_AJkl = Taps.of((x.shape[2], x.shape[3]), seen.geometry).sums(sum_HWJ.double())
    return sum_AJkl.unflatten(0, (len(activations), -1))


@dataclass(slots=True)
class _Mean:
    """A weighted mean of vectors."""

    value: Tensor
    weight: float

    def add(self, value: Tensor, weight: float) -> None:
        self.weight += weight
        if weight:
            self.value = self.value + (value - self.value) * (weight / self.weight)
