"""The tensor core's card: what the rest of recoup knows about multi-operand adders."""

import torch
from torch import nn

from recoup.errors import RecoupError
from recoup.network.sites import FLOAT_BITS, Site, Spent, array_cycles
from recoup.network.systolic import Array
from recoup.network.wing import Card
from recoup.recalibrate import AVERAGE, PAIRED
from recoup.tensorcore.attention_layers import ATTENTION
from recoup.tensorcore.config import TensorCore
from recoup.tensorcore.hugging_face import adapted
from recoup.tensorcore.layers import LAYERS
from recoup.tensorcore.ops import matmul
from recoup.tensorcore.repair import GAIN, GAIN_PAIRED, LAYER_GAIN, ROWS_GAIN

PRESETS = {
    "volta-f16": "volta_f16",
    "turing-f16": "turing_f16",
    "ampere-f16": "ampere_f16",
    "ampere-bf16": "ampere_bf16",
    "ampere-tf32": "ampere_tf32",
    "ada-fp8": "ada_fp8",
    "hopper-f16": "hopper_f16",
    "hopper-bf16": "hopper_bf16",
    "hopper-tf32": "hopper_tf32",
    "hopper-fp8": "hopper_fp8",
    "blackwell-f16": "blackwell_f16",
    "blackwell-bf16": "blackwell_bf16",
    "blackwell-tf32": "blackwell_tf32",
    "blackwell-fp8": "blackwell_fp8",
    "blackwell-mxfp8": "blackwell_mxfp8",
    "blackwell-mxfp4": "blackwell_mxfp4",
    "blackwell-nvfp4": "blackwell_nvfp4",
}

WIDTHS = {"e4m3fn": 8, "e5m2": 8, "e2m1fn": 4, "float16": 16, "bfloat16": 16, "tf32": 32}
"""Bits of an operand in memory: TF32 lies there as float32."""
SCALE_BITS = 8
"""Of a block's scale, in either format."""
ACCUMULATOR_BITS = {"e8m13": 22, "float32": 32, "float16": 16}


def title(config: TensorCore) -> str:
    """Operands, how many are added in how many bits, and what is not usual.

    >>> title(TensorCore.hopper_fp8(promotion=128))
    'e4m3fn, 32 at once in 13 bits, to e8m13, promoted every 128'
    """
    parts = [" x ".join(dict.fromkeys(config.pair)), f"{config.group} at once in {config.fraction} bits"]
    parts.append(f"to {config.output}")
    parts += [f"{config.scale_format} per {config.block}"] if config.block else []
    parts += [f"promoted every {config.promotion}"] if config.promotion else []
    parts += [f"amax {config.amax:g}"] if config.amax else []
    parts += ["calibrated scales"] if config.scale == "calibrated" else []
    parts += [f"order {config.order}"] if config.order != "ckk" else []
    return ", ".join(parts)


def calibrated(config: TensorCore) -> bool:
    """Whether a unit's layers work on activation scales that `recoup.calibrate_` measures."""
    return config.scale == "calibrated"


def cost(site: Site, config: TensorCore, array: Array) -> Spent:
    """One multiplication a cycle and element, as in float: the adder behind it takes what its multipliers give. Numbers
    in as wide as the operands, of an attention the wider, as either product has both, and with block scales a byte more
    for every block of them; outputs as the accumulator leaves the unit: float16, else float32."""
    scales = SCALE_BITS / config.block if config.block else 0
    first, second = (WIDTHS[name] + scales for name in config.pair)
    inputs = first if site.weights else max(first, second)
    out = 16 if config.output == "float16" and config.promotion is None else FLOAT_BITS
    traffic = (site.inputs * inputs + site.weights * second + site.outputs * out) / 8
    steps = sum(p.M * p.N * p.groups * -(-p.C * p.taps // config.group) for p in site.products)
    return Spent(array_cycles(site, array), traffic, ACCUMULATOR_BITS[config.output], steps)


def placed(config: TensorCore, array: Array) -> int:
    """An element is one multiplication a cycle, an adder takes ``group`` of them."""
    return -(-array.rows * array.cols // config.group)


def self_test() -> str:
    """By hand: 1 - 2^-14 is cut to 1 in 13 bits, and kept in 25."""
    a, b = (torch.tensor(t, dtype=torch.float32) for t in ([[1.0, -(2.0**-7)]], [[1.0], [2.0**-7]]))
    units = TensorCore.hopper_fp8(), TensorCore.blackwell_fp8()
    got = [matmul(a, b, unit).item() for unit in units]
    if got != [1.0, 1 - 2.0**-14]:
        raise RecoupError(f"tensorcore.matmul gives {got}, expected [1.0, {1 - 2.0**-14}]")
    return "tensor cores align, cut and add as specified"


def runs(unit: TensorCore, config: TensorCore) -> bool:
    """A unit knows nothing of how operands were scaled, in which order a layer's come, and of training."""
    if unit.pair != config.pair:
        return False
    outside = ("scale", "amax", "order", "backward", "nonfinite")
    return unit.replace(**{name: getattr(config, name) for name in outside}) == config


CARD = Card(
    config=TensorCore,
    layers=LAYERS | ATTENTION,
    adapt=adapted,
    title=title,
    presets={name: getattr(TensorCore, method)() for name, method in PRESETS.items()},
    constructors={
        "TensorCore": TensorCore,
        **{f"TensorCore.{method}": getattr(TensorCore, method) for method in PRESETS.values()},
    },
    example="TensorCore.hopper_fp8(promotion=128)",
    repairs=(LAYER_GAIN, GAIN, ROWS_GAIN, AVERAGE, PAIRED, GAIN_PAIRED),
    default=(AVERAGE.name, PAIRED.name, GAIN.name, ROWS_GAIN.name, GAIN_PAIRED.name),
    quoted=(GAIN_PAIRED.name, PAIRED.name, ROWS_GAIN.name, GAIN.name, LAYER_GAIN.name, AVERAGE.name),
    plan=(GAIN.name, PAIRED.name),
    plan_without_norms=(ROWS_GAIN.name,),
    cost=cost,
    placed=placed,
    runs=runs,
    measure="recoup.study.measures.tensorcore",
    chapter="recoup.report.chapters.tensorcore",
    self_test=self_test,
    rtl="recoup.tensorcore.rtl",
    multiplies=True,
    float_only=(nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.MultiheadAttention),
    float_only_note="MultiheadAttention: its inner products",
    trains=True,
    scaled=calibrated,
)
