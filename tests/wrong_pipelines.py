"""Calls of pipelines and tensor cores with good arguments, as in `wrong_arguments.py`."""

import torch
from torch import nn

from recoup import pipeline, silicon, tensorcore
from tests.wrong_arguments import BATCHES, COUNTS, HEADS, NUMBERS, REALS, TENSORS, WRONG, A, B, Call, emulated, network

PACKAGES = pipeline, tensorcore, silicon


def narrow() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


CALLS: dict[str, Call] = {
    "a layer of tensor cores": Call(tensorcore.TensorCoreLinear(3, 4), lambda: {"input": A}),
    "TensorCore": Call(
        tensorcore.TensorCore,
        lambda: {
            "operands": "e4m3fn",
            "group": 16,
            "fraction": 13,
            "output": "float32",
            "promotion": None,
            "amax": None,
        },
        {"group": COUNTS, "fraction": COUNTS, "promotion": ("None",), "amax": ("None", "an integer", "a fraction")},
    ),
    "tensorcore.attention": Call(
        tensorcore.attention,
        lambda: {
            "q": HEADS,
            "k": HEADS,
            "v": HEADS,
            "config": tensorcore.TensorCore(),
            "mask": None,
            "causal": False,
            "scale": 0.5,
            "dropout": 0.0,
        },
        {
            "config": ("None", "a TensorCore"),
            "mask": ("None", "no dimensions", "float16"),
            "causal": ("a bool",),
            "scale": ("None", "a negative integer", *NUMBERS),
        },
    ),
    "tensorcore.profile": Call(
        tensorcore.profile,
        lambda: {"model": emulated(tensorcore.TensorCore()), "batches": BATCHES, "outputs": 4, "seed": 0},
        {"outputs": COUNTS, "seed": COUNTS},
    ),
    "tensorcore.correct_gain_": Call(
        tensorcore.correct_gain_,
        lambda: {"model": emulated(tensorcore.TensorCore()), "batches": BATCHES, "per": "layer"},
    ),
    "tensorcore.matmul": Call(tensorcore.matmul, lambda: {"a": A, "b": B, "config": tensorcore.TensorCore()}),
    "tensorcore.quantize_operand": Call(
        tensorcore.quantize_operand,
        lambda: {"x": A, "name": "e4m3fn", "amax": 448.0, "dims": None},
        {"x": TENSORS, "amax": ("None", "an integer", "a fraction"), "dims": ("None",)},
    ),
    "pipeline.automatic": Call(pipeline.automatic, lambda: {"model": network()}),
    "pipeline.chain": Call(
        pipeline.chain,
        lambda: {"model": narrow(), "stages": [["0"], ["2"], []]},
        {"stages": ("None",)},
    ),
    "pipeline.delays": Call(pipeline.delays, lambda: {"stages": 3, "schedule": "1f1b"}, {"stages": COUNTS}),
    "pipeline.constant_delays": Call(
        pipeline.constant_delays, lambda: {"stages": 3, "delay": 2}, {"stages": COUNTS, "delay": COUNTS}
    ),
    "pipeline.utilisation": Call(
        pipeline.utilisation,
        lambda: {"stages": 3, "samples": 4, "schedule": "pipelined"},
        {"stages": COUNTS, "samples": COUNTS},
    ),
    "pipeline.activations": Call(pipeline.activations, lambda: {"stages": 3}, {"stages": COUNTS}),
    "pipeline.weight_versions": Call(
        pipeline.weight_versions,
        lambda: {"values": [2, 1, 0], "stash": True},
        {"values": ("an empty list", "a list", "an empty tensor"), "stash": ("a bool",)},
    ),
    "pipeline.scale_hyperparameters": Call(
        pipeline.scale_hyperparameters,
        lambda: {"lr": 0.1, "momentum": 0.9, "reference_batch": 128, "batch": 1},
        {"lr": NUMBERS, "reference_batch": COUNTS, "batch": COUNTS},
    ),
    "pipeline.Times": Call(
        pipeline.Times,
        lambda: {"forward": 1.0, "backward": 2.0, "update": 0.5},
        dict.fromkeys(("forward", "backward", "update"), NUMBERS),
    ),
    "pipeline.balance": Call(
        pipeline.balance, lambda: {"times": [pipeline.Times(1.0, 2.0)] * 3, "ranks": 2}, {"ranks": COUNTS}
    ),
    "pipeline.Mitigation": Call(
        pipeline.Mitigation,
        lambda: {"compensation": 1.0, "prediction": "velocity", "horizon": 1.0, "stash": False, "shrink": 1.0},
        {"compensation": REALS, "horizon": REALS, "stash": ("a bool",)},
    ),
    "pipeline.SGDM": Call(pipeline.SGDM, lambda: {"momentum": 0.9, "weight_decay": 0.0}, {"weight_decay": NUMBERS}),
    "pipeline.AdamW": Call(
        pipeline.AdamW,
        lambda: {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0},
        {"eps": NUMBERS, "weight_decay": NUMBERS},
    ),
    "pipeline.NAdamW": Call(
        pipeline.NAdamW,
        lambda: {"betas": (0.9, 0.99), "momentum_decay": None},
        {"momentum_decay": ("None", *NUMBERS)},
    ),
    "pipeline.Run": Call(
        pipeline.Run,
        lambda: {"delays": [1, 0], "mitigation": "none", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0},
        {"delays": tuple(WRONG), "lr": (*NUMBERS, "a class"), "momentum": NUMBERS, "weight_decay": NUMBERS},
    ),
    "pipeline.Simulator": Call(
        pipeline.Simulator,
        lambda: (
            {"model": narrow(), "stages": [["0"], ["2"], []], "delays": [4, 2, 0], "lr": 0.1, "momentum": 0.9}
            | {"weight_decay": 0.0, "mitigation": "sc", "update_size": 1, "optimizer": None, "clip": None, "seed": 0}
            | {"first": 0, "cuda_graph": False}
        ),
        {"lr": (*NUMBERS, "a class"), "weight_decay": NUMBERS, "update_size": COUNTS, "optimizer": ("None",)}
        | {"clip": ("None", *NUMBERS), "seed": COUNTS, "first": COUNTS},
    ),
    "pipeline.Simulator.step": Call(
        lambda x: pipeline.Simulator(narrow(), [["0"], ["2"], []], [4, 2, 0], 0.1).step(x, torch.tensor([1])),
        lambda: {"x": A},
        torchs=("x",),
    ),
    "pipeline.Batched": Call(
        pipeline.Batched,
        lambda: {"models": [narrow()], "stages": [["0"], ["2"], []], "runs": [pipeline.Run([4, 2, 0])]},
    ),
    "pipeline.Delayed": Call(
        pipeline.Delayed,
        lambda: (
            {"params": list(narrow().parameters()), "optimizer": pipeline.AdamW(), "lr": 0.1, "delay": 2}
            | {"mitigation": "coasting"}
        ),
        {"lr": NUMBERS, "delay": COUNTS},
        torchs=("params",),
    ),
    "pipeline.DelayedSGD": Call(
        pipeline.DelayedSGD,
        lambda: (
            {"params": list(narrow().parameters()), "lr": 0.1, "delay": 2, "momentum": 0.9, "weight_decay": 0.0}
            | {"mitigation": "sc"}
        ),
        {"lr": NUMBERS, "delay": COUNTS, "weight_decay": NUMBERS},
        torchs=("params",),
    ),
}
