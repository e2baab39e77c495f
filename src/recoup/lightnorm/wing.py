"""LightNorm's card: what the rest of recoup knows about norms by ranges."""

from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from recoup.errors import RecoupError
from recoup.formats import Float
from recoup.lightnorm import layers
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.cost import block_bits
from recoup.lightnorm.ops import train
from recoup.lightnorm.rows import layers as rows
from recoup.lightnorm.rows.repair import GAIN
from recoup.network.emulated import emulated_layers
from recoup.network.row_norms import looks_like_norm
from recoup.network.sites import Site, Spent
from recoup.network.systolic import Array
from recoup.network.wing import Card
from recoup.recalibrate import AVERAGE, PAIRED


def title(config: LightNorm) -> str:
    """Formats and blocks, and what differs from the defaults.

    >>> title(LightNorm(block=8, shared="max"))
    'LightNorm, FP10 1-5-4, blocks of 8, largest exponent shared'
    """
    plain = LightNorm()
    parts = ["LightNorm", _format_title(config.forward)]
    usual = plain.backward if config.forward == plain.forward else config.forward
    parts += [f"gradients {_format_title(config.backward)}"] if config.backward != usual else []
    expected = None if config.forward is None else plain.statistics
    parts += [f"statistics {_format_title(config.statistics)}"] if config.statistics != expected else []
    parts += [] if config.difference is None else [f"x - mu {_format_title(config.difference)}"]
    if config.block is not None:
        parts.append(f"blocks of {config.block}")
        parts += ["largest exponent shared"] if config.shared == "max" else []
    parts += [f"{config.chunks} chunk{'s' * (config.chunks > 1)}"] if config.chunks != plain.chunks else []
    parts += [f"scale {config.scale}"] if config.scale != plain.scale else []
    parts += ["non-finite values refused"] if config.nonfinite == "error" else []
    return ", ".join(parts)


def _format_title(form: Float | None) -> str:
    """A width, exponent and mantissa, and what is not usual in them: FP10 1-5-4."""
    if form is None:
        return "float"
    text = f"FP{form.bits} 1-{form.bits - 1 - form.mantissa}-{form.mantissa}"
    usual = form.min_exponent + form.max_exponent == 1
    text += "" if usual else f" 2^{form.min_exponent}..2^{form.max_exponent}"
    text += " to nearest" if form.rounding == "nearest" else ""
    text += " with subnormals" if form.subnormals else ""
    return text + (f" up to {form.largest_value:g}" if form.largest is not None else "")


RANGES = replace(
    AVERAGE,
    meaning=f"{AVERAGE.meaning} LightNorm layers store what they would in training: the range's estimate.",
)

MOMENTS = replace(PAIRED, applies=lambda model: any(map(_is_batch_norm, emulated_layers(model).values())))
"""A batch norm left in float beside a layer norm on the unit has nothing to be paired with."""


def _is_batch_norm(layer: nn.Module) -> bool:
    return isinstance(layer, layers.LightNormLayer)


def adapted(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The LightNorm class for a class that `CARD` does not list: of batch norms, else of norms over features."""
    return layers.adapted(kind) or rows.adapted(kind)


ROWS_APART = (
    "layer and RMS norms run on units of their own (`recoup silicon area lightnorm --set unit=layer` or unit=rms), "
    "which sums over a network leave out"
)


def cost(site: Site, config: LightNorm, array: Array) -> Spent:  # noqa: ARG001 -- norms run beside the array
    """A feature map read and written once, in the blocks of the forward pass."""
    along = site.places if config.axis == "place" else site.channels
    traffic = (site.inputs + site.outputs) * block_bits(config.forward_blocks, config.forward, along) / 8
    return Spent(0, traffic, 0, None, ROWS_APART) if site.rows else Spent(0, traffic, 0, _steps(site, config))


def _steps(site: Site, config: LightNorm) -> int:
    """Two passes over a batch norm's feature map, a block of channels a cycle. The few cycles a channel in which ranges
    are folded and mu and 1/s divided are not in it."""
    return 2 * (site.inputs // max(site.channels, 1)) * -(-site.channels // (config.block or 1))


def self_test() -> str:
    """A batch by hand, forward and backward.

    Chunks of one -1 and one 1 have the range 2, so s = C(2) 2 = sqrt(pi), and 1 / s = 0.564 is 0.5625 in FP10. Its
    products with gamma share the exponent of the second largest, whose last place is 1/64: 9/512 becomes 1/64. The
    gradient of a sum is zero: a batch norm takes every mean away.
    """
    x = torch.tensor([-1.0, 1.0], dtype=torch.float32).repeat(8)[:, None].expand(16, 4).contiguous().requires_grad_()
    y = train(
        x,
        torch.tensor([1, 1 / 2, 1 / 4, 1 / 32], dtype=torch.float32),
        torch.zeros(4, dtype=torch.float32),
        LightNorm().code,
        0.0,
        "self-test",
    )[0]
    (slope,) = torch.autograd.grad(y.sum(), x)
    got, expected = y[1].tolist(), [9 / 16, 9 / 32, 9 / 64, 1 / 64]
    if got != expected or not torch.equal(y[0::2], -y[1::2]) or slope.any():
        raise RecoupError(f"LightNorm gives {got} and a gradient up to {slope.abs().max()}, expected {expected} and 0")
    return "range batch norm in FP10 gives the bits specified, forward and backward"


CARD = Card(
    config=LightNorm,
    layers=layers.LAYERS | rows.LAYERS,
    adapt=adapted,
    kin=looks_like_norm,
    float_only=(_BatchNorm,),
    float_only_note="SyncBatchNorm in several processes: emulate_ batch norms instead, then lightnorm.synchronize_",
    title=title,
    presets={
        "lightnorm": LightNorm(),
        "lightnorm-fp10": LightNorm.fp10(),
        "lightnorm-range": LightNorm.range(),
    },
    constructors={"LightNorm": LightNorm, "LightNorm.range": LightNorm.range, "LightNorm.fp10": LightNorm.fp10},
    example="LightNorm(block=8)",
    repairs=(GAIN, RANGES, MOMENTS),
    default=(GAIN.name, RANGES.name, MOMENTS.name),
    quoted=(MOMENTS.name, RANGES.name, GAIN.name),
    plan=(GAIN.name, MOMENTS.name),
    plan_without_norms=(GAIN.name,),
    needs_norms=True,
    trains=True,
    cost=cost,
    self_test=self_test,
    measure="recoup.study.measures.lightnorm",
    chapter="recoup.report.chapters.lightnorm",
    rtl="recoup.lightnorm.rtl",
)
