"""Public calls with good arguments, and the wrong ones that `test_bad_input.py` puts in their place."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import recoup as rc
from recoup import (
    data,
    formats,
    lba,
    lightnorm,
    models,
    nbsmt,
    pipeline,
    search,
    silicon,
    study,
    tensorcore,
    training,
    wings,
)
from recoup.lba.wing import CARD
from recoup.policy import Policy

PACKAGES = (
    rc,
    formats,
    lba,
    nbsmt,
    lightnorm,
    search,
    models,
    data,
    training,
    wings,
    study,
    pipeline,
    tensorcore,
    silicon,
)
U8, I8 = torch.tensor([[100, 3]], dtype=torch.uint8), torch.tensor([[1], [1]], dtype=torch.int8)
A, B = torch.tensor([[0.5, 1.0, -2.0]]), torch.tensor([[1.0], [0.25], [3.0]])
X = torch.linspace(0, 1, 4 * 2 * 16).view(4, 2, 4, 4)
BATCHES = [(X, torch.tensor([0, 1, 2, 3]))]
HEADS = torch.ones(1, 2, 3, 4)
ROWS = torch.linspace(-1, 2, 32).view(2, 16)

WRONG: dict[str, Any] = {
    "None": None,
    "a string": "x",
    "an empty list": [],
    "a list": [1],
    "a map": {"x": 1},
    "an integer": 3,
    "a negative integer": -1,
    "a huge integer": 1 << 70,
    "a fraction": 1.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a bool": True,
    "a class": object,
    "an object": object(),
    "an integer tensor": torch.tensor([[1, 2]]),
    "an empty tensor": torch.empty(0),
    "five dimensions": torch.ones(2, 3, 4, 5, 6),
    "no dimensions": torch.tensor(1.0),
    "NaNs": torch.full((1, 3), float("nan")),
    "float16": A.half(),
    "complex": A.to(torch.complex64),
    "a meta tensor": torch.empty(1, 3, device="meta"),
    "meta codes": torch.empty(1, 2, dtype=torch.uint8, device="meta"),
    "a sparse tensor": A.to_sparse(),
    "sparse codes": U8.to_sparse(),
    "an LBA": rc.LBA(),
    "an NBSMT": rc.NBSMT(threads=4),
    "a LightNorm": rc.LightNorm(),
    "an Int": rc.Int(1),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    first = (nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))
    return nn.Sequential(*first, nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5))


def calibrated() -> nn.Sequential:
    return rc.calibrate_(network(), BATCHES)


def emulated(config: Any) -> Any:
    return rc.emulate_(calibrated() if isinstance(config, rc.NBSMT) else network(), config)


@dataclass(frozen=True)
class Call:
    """A public function, its good arguments by name, and which of the wrong values are right for an argument."""

    run: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    legal: dict[str, tuple[str, ...]] = field(default_factory=dict)
    of: Any = None  # the public object, where ``run`` only calls it
    torchs: tuple[str, ...] = ()  # arguments that torch itself, or the model, may refuse in words of its own
    refused: bool = False  # whether the good arguments are refused too, for want of a file or a process group
    costly: bool = False  # whether only what is refused is called, because the rest takes seconds


COUNTS = ("an integer",)
NUMBERS = ("an integer", "a huge integer", "a fraction")
REALS = ("an integer", "a fraction")
CONFIGS = ("an LBA", "a LightNorm")
TENSORS = ("an empty tensor", "five dimensions", "no dimensions", "NaNs", "a meta tensor")
FLAGS = {"progress": ("a bool",)}

CALLS: dict[str, Call] = {
    "NBSMT": Call(rc.NBSMT, lambda: {"threads": 2, "policy": "S", "rounding": "zero", "pairing": "halves"}),
    "LBA": Call(
        rc.LBA,
        lambda: {"product": None, "accumulator": rc.Float.lba(4, 7, 10), "chunk": 16, "operands": None},
        {"product": ("None",), "chunk": ("None", "an integer"), "operands": ("None",)},
    ),
    "LightNorm": Call(
        rc.LightNorm,
        lambda: {"forward": None, "backward": None, "statistics": None, "block": 4, "chunks": 8},
        dict.fromkeys(("forward", "backward", "statistics"), ("None",))
        | {"block": ("None", "an integer"), "chunks": COUNTS},
    ),
    "Float": Call(
        rc.Float,
        lambda: {"mantissa": 3, "min_exponent": -6, "max_exponent": 8, "subnormals": True, "largest": None},
        {"mantissa": COUNTS, "min_exponent": ("an integer", "a negative integer"), "largest": ("None",)}
        | {"max_exponent": ("an integer", "a negative integer"), "subnormals": ("a bool",)},
    ),
    "Int": Call(
        rc.Int, lambda: {"bits": 8, "signed": True, "overflow": "wrap"}, {"bits": COUNTS, "signed": ("a bool",)}
    ),
    "BlockFloat": Call(
        rc.BlockFloat,
        lambda: {"exponent": 5, "significand": 5, "block": 4, "dim": 1, "shared": "max"},
        {"exponent": COUNTS, "significand": COUNTS, "block": COUNTS, "dim": ("an integer", "a negative integer")},
    ),
    "quantize": Call(
        rc.quantize,
        lambda: {"x": A, "format": rc.Int(8), "generator": torch.Generator()},
        {"x": TENSORS, "format": ("an Int",), "generator": ("None",)},
    ),
    "formats.encode": Call(
        formats.encode,
        lambda: {"x": A.round(), "format": rc.Int(8)},
        {"x": ("an empty tensor", "five dimensions", "no dimensions")},
    ),
    "formats.decode": Call(
        formats.decode,
        lambda: {"codes": formats.encode(A.round(), rc.Int(8)), "format": rc.Int(8)},
        {"codes": ("an integer tensor",)},
    ),
    "formats.code_bits": Call(formats.code_bits, lambda: {"format": rc.Int(8)}, {"format": ("an Int",)}),
    "formats.FloatFields": Call(formats.FloatFields, lambda: {"format": rc.Float.parse("e5m2")}),
    "nbsmt.matmul": Call(nbsmt.matmul, lambda: {"x": U8, "w": I8, "config": rc.NBSMT()}, {"config": ("an NBSMT",)}),
    "nbsmt.statistics": Call(
        nbsmt.statistics, lambda: {"x": U8, "w": I8, "config": rc.NBSMT()}, {"config": ("an NBSMT",)}
    ),
    "nbsmt.backend": Call(lambda name: nbsmt.backend(name).__enter__(), lambda: {"name": "float32"}, of=nbsmt.backend),
    "nbsmt.Array": Call(
        nbsmt.Array,
        lambda: {"rows": 16, "cols": 16, "overlap": True},
        {"rows": (*COUNTS, "a huge integer"), "cols": (*COUNTS, "a huge integer"), "overlap": ("a bool",)},
    ),
    "nbsmt.cycles": Call(
        nbsmt.cycles,
        lambda: {"model": network(), "inputs": (2, 4, 4), "array": nbsmt.Array()},
        {"array": ("None",)},
        torchs=("inputs",),
    ),
    "nbsmt.profile": Call(nbsmt.profile, lambda: {"model": emulated(rc.NBSMT()), "batches": BATCHES}),
    "reorder_": Call(rc.reorder_, lambda: {"model": emulated(rc.NBSMT()), "batches": BATCHES}),
    "throttle_": Call(
        rc.throttle_, lambda: {"model": emulated(rc.NBSMT()), "batches": BATCHES, "budget": 0.5}, {"budget": NUMBERS}
    ),
    "nbsmt.plan_throttling": Call(
        nbsmt.plan_throttling,
        lambda: {"model": emulated(rc.NBSMT()), "batches": BATCHES, "budget": 0.5},
        {"budget": NUMBERS},
    ),
    "correct_bias_": Call(
        rc.correct_bias_, lambda: {"model": emulated(rc.NBSMT()), "batches": BATCHES}, {"batches": ("None",)}
    ),
    "lba.matmul": Call(
        lba.matmul,
        lambda: {"a": A, "b": B, "config": rc.LBA(), "seed": 0},
        {"config": ("None", "an LBA"), "seed": ("None", "an integer")},
    ),
    "lba.attention": Call(
        lba.attention,
        lambda: {
            "q": HEADS,
            "k": HEADS,
            "v": HEADS,
            "config": rc.LBA(),
            "mask": None,
            "causal": False,
            "scale": 0.5,
            "dropout": 0.0,
        },
        {
            "config": ("None", "an LBA"),
            "mask": ("None", "no dimensions", "float16"),
            "causal": ("a bool",),
            "scale": ("None", "a negative integer", *NUMBERS),
        },
    ),
    "lba.quantize_operand": Call(lba.quantize_operand, lambda: {"x": A, "format": rc.Int(8)}, {"x": TENSORS}),
    "lba.profile": Call(
        lba.profile,
        lambda: {"model": emulated(rc.LBA()), "batches": BATCHES, "outputs": 4, "seed": 0},
        {"outputs": COUNTS, "seed": COUNTS},
    ),
    "lba.correct_gain_": Call(
        lba.correct_gain_, lambda: {"model": emulated(rc.LBA()), "batches": BATCHES, "per": "layer"}
    ),
    "lba.choose_chunks_": Call(
        lba.choose_chunks_, lambda: {"model": emulated(rc.LBA()), "rescale": True}, {"rescale": ("a bool",)}
    ),
    "lba.set_underflow_": Call(
        lba.set_underflow_, lambda: {"model": emulated(rc.LBA()), "on": True}, {"on": ("a bool",)}
    ),
    "lba.register_transformers": Call(
        lba.register_transformers,
        lambda: {"config": rc.LBA(), "name": "wrong_arguments"},
        {"config": ("None", "an LBA"), "name": ("a string",)},
        costly=True,
    ),
    "lightnorm.synchronize_": Call(lightnorm.synchronize_, lambda: {"model": emulated(rc.LightNorm())}, refused=True),
    "lightnorm.correct_gain_": Call(
        lightnorm.correct_gain_,
        lambda: {"model": rc.emulate_(nn.Sequential(nn.LayerNorm(16)), rc.LightNorm()), "batches": [ROWS]},
    ),
    "lightnorm.traffic": Call(
        lightnorm.traffic,
        lambda: {"model": network(), "inputs": X, "config": None, "single_pass": False},
        {"config": ("None", "a LightNorm"), "single_pass": ("a bool",)},
        torchs=("inputs",),
    ),
    "calibrate_": Call(
        rc.calibrate_,
        lambda: {"model": network(), "batches": BATCHES, "layers": None, "keep": 2},
        {"layers": ("None",), "keep": COUNTS},
    ),
    "emulate_": Call(
        rc.emulate_,
        lambda: {"model": network(), "config": rc.LBA(), "layers": None},
        {"config": CONFIGS, "layers": ("None",)},
    ),
    "restore_": Call(rc.restore_, lambda: {"model": emulated(rc.LBA()), "statistics": "auto"}),
    "evaluate": Call(rc.evaluate, lambda: {"model": network(), "batches": BATCHES}),
    "recalibrate_": Call(
        rc.recalibrate_,
        lambda: {"model": emulated(rc.LBA()), "batches": BATCHES, "method": "paired", "baseline": None},
        {"baseline": ("None",)},
    ),
    "repair_": Call(
        rc.repair_,
        lambda: {"model": emulated(rc.LBA()), "batches": BATCHES, "plan": "none"},
        {"plan": ("an empty list",), "batches": tuple(WRONG)},
    ),
    "repair_ by default": Call(rc.repair_, lambda: {"model": emulated(rc.LBA()), "batches": BATCHES}),
    "undo_": Call(rc.undo_, lambda: {"model": emulated(rc.LBA()), "stage": None}, {"stage": ("None",)}),
    "describe": Call(rc.describe, lambda: {"model": network()}),
    "save": Call(rc.save, lambda: {"model": network(), "path": "x.safetensors"}, {"path": ("a string",)}),
    "load": Call(rc.load, lambda: {"path": "nowhere", "model": network()}, refused=True),
    "Policy": Call(Policy, lambda: {"layers": {"0": rc.LBA()}, "name": "x"}, {"name": ("a string",)}),
    "search.narrowest": Call(
        search.narrowest,
        lambda: {"model": network(), "batches": BATCHES, "budget": 50.0, "candidates": [rc.LBA.fp32()]},
        {"budget": ("an integer", "a huge integer", "a fraction")},
    ),
    "wings.register": Call(wings.register, lambda: {"card": CARD}),
    "wings.Card": Call(
        wings.Card,
        lambda: {"config": rc.LBA, "layers": dict(CARD.layers), "measure": None},
        {"config": ("a class",), "measure": ("None", "a string")},
    ),
    "wings.forget": Call(wings.forget, lambda: {"config": int}, refused=True),
    "models.load": Call(
        models.load,
        lambda: {"spec": "digits_net", "weights": None, "num_classes": 4},
        {"weights": ("None",), "num_classes": ("None", "an integer")},
    ),
    "models.load_weights_": Call(
        models.load_weights_, lambda: {"model": nn.Linear(3, 4), "path": "nowhere"}, refused=True
    ),
    "models.load_chargpt": Call(models.load_chargpt, lambda: {"path": "nowhere"}, refused=True),
    "models.chargpt": Call(
        models.chargpt,
        lambda: {"characters": 5, "layers": 1, "width": 8, "heads": 2, "context": 4},
        dict.fromkeys(("characters", "layers", "context"), COUNTS),
    ),
    "models.digits_net": Call(
        models.digits_net,
        lambda: {"num_classes": 2, "norm": "none", "in_channels": 1},
        {"num_classes": COUNTS, "in_channels": COUNTS},
    ),
    "NBSMTLinear": Call(
        lambda config: nbsmt.NBSMTLinear(3, 4, config=config),
        lambda: {"config": None},
        {"config": ("None", "an NBSMT")},
    ),
    "LBALinear": Call(
        lambda config: lba.LBALinear(3, 4, config=config), lambda: {"config": None}, {"config": ("None", "an LBA")}
    ),
    "LightNorm2d": Call(
        lambda eps, momentum, config: rc.LightNorm2d(4, eps, momentum, config=config),
        lambda: {"eps": 1e-5, "momentum": 0.1, "config": None},
        {"momentum": ("None",), "config": ("None", "a LightNorm")},
    ),
    "LightLayerNorm": Call(
        lambda eps, config: rc.LightLayerNorm(16, eps, config=config),
        lambda: {"eps": 1e-5, "config": None},
        {"config": ("None", "a LightNorm")},
    ),
    "LightRMSNorm": Call(
        lambda eps, config: rc.LightRMSNorm(16, eps, config=config),
        lambda: {"eps": 1e-5, "config": None},
        {"eps": ("None",), "config": ("None", "a LightNorm")},
    ),
    "a layer norm of LightNorm": Call(rc.LightLayerNorm(16), lambda: {"input": ROWS}),
    "a layer of LBA": Call(lba.LBALinear(3, 4), lambda: {"input": A}),
    "a convolution of LBA": Call(lba.LBAConv2d(2, 2, 3), lambda: {"input": X}),
    "a layer of NB-SMT": Call(emulated(rc.NBSMT())[3], lambda: {"input": X}),
    "a layer of LightNorm": Call(rc.LightNorm2d(2), lambda: {"input": X}, torchs=("input",)),
}
