"""The four pictures of LightNorm, on scikit-learn's digits: what it stores and moves, what it costs, how it estimates.

    python examples/lightnorm_figures.py --out lightnorm-figures

Writes traffic.png, accuracy.png, scale.png and rounding.png. The network is the demo's, trained here in seconds, then
converted without training and recalibrated.
"""

import argparse
import copy
from pathlib import Path

import torch

import recoup as rc
from recoup.cli.demo import WEIGHTS, train_weights
from recoup.plots import lightnorm as plots

VARIANTS = {
    "batch norm": None,
    "range": rc.LightNorm.range(),
    "range + FP10": rc.LightNorm.fp10(),
    "range + FP10 + BFP4, max": rc.LightNorm(shared="max"),
    "range + FP10 + BFP4": rc.LightNorm(),
    "range + FP10 + BFP16": rc.LightNorm(block=16),
    "range + FP10 + BFP64": rc.LightNorm(block=64),
}
SEEDS = (0, 1, 2)


def accuracies(model: torch.nn.Module, config: rc.LightNorm | None) -> list[float]:
    """Top-1 of the converted network, recalibrated on three draws of the training images."""
    train, test = rc.data.load("digits", "train"), rc.data.load("digits")
    found = []
    for seed in SEEDS:
        unit = copy.deepcopy(model)
        if config is not None:
            rc.emulate_(unit, config)
            rc.recalibrate_(unit, train.subset(512, seed=seed).batches(128))
        found.append(rc.evaluate(unit, test.batches(250)).top1)
    return found


def feature_map(model: torch.nn.Module) -> torch.Tensor:
    """What enters the second batch norm."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    kept: list[torch.Tensor] = []
    hook = norms[1].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach()))
    x, _ = next(iter(rc.data.load("digits").batches(128)))
    with torch.no_grad():
        model(x)
    hook.remove()
    return kept[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("lightnorm-figures"))
    out = parser.parse_args().out
    train_weights(out)
    model = rc.models.load("digits_net", out / WEIGHTS).eval()
    figures = {
        "traffic": plots.traffic_figure(VARIANTS),
        "accuracy": plots.accuracy_figure([(name, c, accuracies(model, c)) for name, c in VARIANTS.items()]),
        "scale": plots.scale_figure(),
        "rounding": plots.rounding_figure(feature_map(model), rc.LightNorm()),
    }
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=150)
        print(out / f"{name}.png")


if __name__ == "__main__":
    main()
