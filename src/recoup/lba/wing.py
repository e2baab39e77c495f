"""LBA's card: what the rest of recoup knows about narrow accumulators."""

import torch
from torch import nn

from recoup.errors import RecoupError
from recoup.formats import Float, Int
from recoup.lba.attention_layers import ATTENTION
from recoup.lba.config import LBA
from recoup.lba.exponents import EXPONENTS
from recoup.lba.hugging_face import adapted, take_back
from recoup.lba.layers import LAYERS
from recoup.lba.ops import matmul
from recoup.lba.repair import CHUNKS, GAIN, GAIN_PAIRED, LAYER_GAIN, ROWS_GAIN, set_underflow_
from recoup.network.sites import FLOAT_BITS, Site, Spent, array_cycles, unit_steps
from recoup.network.systolic import Array
from recoup.network.wing import Card, Phase
from recoup.recalibrate import AVERAGE, PAIRED


def title(config: LBA) -> str:
    """The accumulator's width, and what differs from the defaults.

    >>> title(LBA.biased(5, 5, chunk=64))
    'M5E5 (11 bits), chunk 64'
    """
    total = config.accumulator
    if isinstance(total, Int):
        parts = [f"int{total.bits}, {'wraps' if total.overflow == 'wrap' else 'saturates'}"]
    else:
        exponent = (total.max_exponent - total.min_exponent).bit_length()
        parts = [f"M{total.mantissa}E{exponent} ({total.bits} bits)"]
        parts += [f"rounding {total.rounding}"] if total.rounding != "zero" else []
        expected = LBA.biased(total.mantissa, min(max(exponent, 1), 8), -total.min_exponent, chunk=config.chunk)
        parts += ["fused"] if config.product is None else []
        parts += ["own product format"] if config.product not in (None, expected.product) else []
    parts.append("no chunks" if config.chunk is None else f"chunk {config.chunk}")
    parts += ["without underflow"] if not config.underflow else []
    parts += ["promoted"] if config.promotion is not None else []
    if config.operands is not None:
        activations, weights = (_short(form) for form in config.pair if form is not None)
        both = f"W/A {weights}" if activations == weights else f"W {weights}, A {activations}"
        each = ", W per channel" if config.weight_scale == "channel" else ""
        parts.append(both + each + (", A calibrated" if config.activation_scale == "calibrated" else ""))
    return ", ".join(parts)


def _short(form: Float | Int) -> str:
    """A format in tables: int8, uint8, FP8."""
    if isinstance(form, Int):
        return f"{'int' if form.signed else 'uint'}{form.bits}"
    return f"FP{form.bits}"


def calibrated(config: LBA) -> bool:
    """Whether a unit's layers work on activation scales that `recoup.calibrate_` measures."""
    return config.activation_scale == "calibrated"


def cost(site: Site, config: LBA, array: Array) -> Spent:
    """One multiply-accumulate a cycle and element, and one cycle for each chunk's sum (one adder, used for both);
    numbers as wide as the operands, outputs as the activations that they become, float32 where they are not quantised.
    """
    a, w = (FLOAT_BITS if form is None else form.bits for form in config.pair)
    a = a if site.weights else max(a, w)  # of an attention either product has both
    traffic = ((site.inputs + site.outputs) * a + site.weights * w) / 8
    cycles, steps = array_cycles(site, array, chunk=config.chunk), unit_steps(site, chunk=config.chunk)
    return Spent(cycles, traffic, config.accumulator.bits, steps)


def runs(unit: LBA, config: LBA) -> bool:
    """A unit does not count the terms of a chunk, and knows nothing of training and of what operands may hold; one
    without chunks has no outer addition."""
    if unit.operands != config.operands:
        return False
    outside = ("gradient", "backward", "nonfinite", "weight_scale", "activation_scale")
    same = {name: getattr(config, name) for name in outside}
    if unit.chunk is not None and config.chunk is not None:
        same["chunk"] = config.chunk
    return unit.replace(**same) == config


def self_test() -> str:
    """Sums of M7E4 by hand: twice 2^-8 behind a 1 is lost, before it not; 75 saturates; 2^-13 is no product."""
    small = 2.0**-8
    a = torch.tensor(
        [[1, small, small, 0, 0], [small, small, 1, 0, 0], [15.0] * 5, [2.0**-13] * 5], dtype=torch.float32
    )
    got = matmul(a, torch.ones(5, 1, dtype=torch.float32), LBA.m7e4()).flatten().tolist()
    expected = [1.0, 1 + 2.0**-7, 63.75, 0.0]
    if got != expected:
        raise RecoupError(f"lba.matmul gives {got}, expected {expected}")
    return "12-bit accumulators sum up as specified"


CARD = Card(
    config=LBA,
    layers=LAYERS | ATTENTION,
    adapt=adapted,
    take_back=take_back,
    title=title,
    presets={
        "lba-m7e4": LBA.m7e4(),
        "lba-m10e5": LBA.m10e5(),
        "lba-fp32": LBA.fp32(),
        "lba-sequential14": LBA.sequential14(),
        "lba-int16": LBA.int16(operands=Int(8)),
        "lba-int12": LBA.int12(operands=Int(4)),
    },
    renamed={"lba-hopper": "lba-sequential14"},
    constructors={
        "LBA": LBA,
        **{
            f"LBA.{name}": getattr(LBA, name)
            for name in ("biased", "m7e4", "m10e5", "fp32", "sequential14", "hopper", "int16", "int12")
        },
    },
    example="LBA.biased(7, 4)",
    repairs=(CHUNKS, EXPONENTS, LAYER_GAIN, GAIN, ROWS_GAIN, AVERAGE, PAIRED, GAIN_PAIRED),
    default=(AVERAGE.name, PAIRED.name, GAIN.name, ROWS_GAIN.name, GAIN_PAIRED.name),
    quoted=(GAIN_PAIRED.name, PAIRED.name, ROWS_GAIN.name, GAIN.name, LAYER_GAIN.name, AVERAGE.name, CHUNKS.name),
    plan=(GAIN.name, PAIRED.name),
    plan_without_norms=(ROWS_GAIN.name,),
    multiplies=True,
    float_only=(nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.MultiheadAttention),
    float_only_note="MultiheadAttention: its inner products",
    trains=True,
    scaled=calibrated,
    cost=cost,
    runs=runs,
    phases=(
        Phase("without underflow", lambda model: set_underflow_(model, False)),
        Phase("with underflow", lambda model: set_underflow_(model, True)),
    ),
    self_test=self_test,
    measure="recoup.study.measures.lba",
    chapter="recoup.report.chapters.lba",
    rtl="recoup.lba.rtl",
    usual={"operands": Float.lba(3, 4, bias=3)},  # the paper's FP8; the presets' are float32
)
