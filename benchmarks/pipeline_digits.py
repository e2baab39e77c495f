"""Claim: Spike Compensation and Linear Weight Prediction win back what pipelined backpropagation loses.

A residual MLP of 16 stages (width 32, layer norm) on scikit-learn's digits at batch one, 6 epochs, momentum 0.98,
learning rate 8e-5 falling linearly to zero; five seeds of every mitigation, all in one batched network. SGDM has no
delay; the others D_s = 2 (15 - s) <= 30, then three times that. Test accuracy, and training loss of the last epoch.

    python benchmarks/pipeline_digits.py
"""

import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn

import recoup as rc
from benchmarks.measure import save
from recoup.pipeline import delays
from recoup.pipeline.batched import Batched, Run

STAGES, WIDTH, EPOCHS, SEEDS = 16, 32, 6, range(5)
LR, MOMENTUM = 8e-5, 0.98
METHODS = ("none", "stash", "sc", "lwpv", "lwpv+sc", "lwpw+sc", "spectrain")


class Residual(nn.Module):
    """x + relu(W norm(x) + b)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[N, WIDTH] to the same."""
        return x + torch.relu(self.linear(self.norm(x)))


def network(seed: int) -> nn.Sequential:
    """The MLP with a seed's initial weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, WIDTH), *[Residual() for _ in range(STAGES - 2)], nn.Linear(WIDTH, 10))


def images(split: str) -> tuple[Tensor, Tensor]:
    """All images of a split, flat, and their labels."""
    data = rc.data.load("digits", split)
    x, y = next(iter(data.batches(len(data))))
    return x.flatten(1), y


def measure(factor: int) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of accuracy and loss of every method, with delays times a factor."""
    x, y = images("train")
    late = [factor * delay for delay in delays(STAGES)]
    steps = EPOCHS * len(x)
    cases = [(method, seed) for method in ("sgdm", *METHODS) for seed in SEEDS]
    runs = [
        Run(
            [0] * STAGES if method == "sgdm" else late,
            "none" if method == "sgdm" else method,
            lambda k: LR * (1 - k / steps),
            MOMENTUM,
        )
        for method, _ in cases
    ]
    models = [network(seed) for _, seed in cases]
    batched = Batched(models, [[str(i)] for i in range(STAGES)], runs, nn.functional.cross_entropy)
    orders = {seed: _order(seed, len(x)) for seed in SEEDS}
    losses = torch.zeros(len(cases))
    for step in range(steps):
        index = torch.tensor([orders[seed][step] for _, seed in cases])
        value = batched.step(x[index].unsqueeze(1), y[index].unsqueeze(1))
        if step >= steps - len(x):
            losses += value / len(x)
        if step % 1000 == 0:
            print(f"{step} of {steps}", file=sys.stderr, flush=True)
    x_test, y_test = images("test")
    found: dict[str, list[tuple[float, float]]] = {}
    for run, (method, _) in enumerate(cases):
        batched.load(run, models[run])
        with torch.no_grad():
            right = (models[run](x_test).argmax(1) == y_test).float().mean()
        found.setdefault(method, []).append((100 * float(right), float(losses[run])))
    return {method: _spread(values) for method, values in found.items()}


def _order(seed: int, samples: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [i for _ in range(EPOCHS) for i in torch.randperm(samples, generator=generator).tolist()]


def _spread(values: list[tuple[float, float]]) -> dict[str, float]:
    """Of the runs that did not diverge, and how many did."""
    kept = [value for value in values if math.isfinite(value[1])]
    figures: dict[str, float] = {"diverged": len(values) - len(kept)}
    for i, name in enumerate(("accuracy", "loss")):
        column = [value[i] for value in kept]
        figures[name] = statistics.mean(column) if kept else math.nan
        figures[f"{name}_std"] = statistics.stdev(column) if len(kept) > 1 else math.nan
    return figures


def main() -> None:
    torch.set_num_threads(1)
    results = {f"D <= {30 * factor}": measure(factor) for factor in (1, 3)}
    print(f"| | {' | '.join(results)} |\n|---|---|---|")
    for method in ("sgdm", *METHODS):
        cells = [
            f"{v['accuracy']:.1f} ± {v['accuracy_std']:.1f} / {v['loss']:.3f}"
            for v in (r[method] for r in results.values())
        ]
        print(f"| {method} | {' | '.join(cells)} |")
    print(save("pipeline_digits", {"seeds": len(SEEDS), "epochs": EPOCHS, "lr": LR, "momentum": MOMENTUM, **results}))


if __name__ == "__main__":
    main()
