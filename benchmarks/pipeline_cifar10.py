"""Claim: at batch one, Spike Compensation with weight prediction trains a ResNet-20 as plain SGD does.

ResNet-20 with group norm on CIFAR-10 at batch one, augmented, every stage 2 (S - 1 - s) updates late; SGDM without a
delay. Hyperparameters are those of batches of 128 (learning rate 0.1, momentum 0.9, weight decay 1e-4) scaled to one
sample, the rate falling linearly to zero. Three seeds of every method, all in one batched network: a seed decides the
initial weights, the order and the augmentation, and is the same for every method, so that differences are paired. Two
cores cannot carry a full schedule of 200 epochs: every method gets the same short one. ``--stretch 4`` makes all delays
four times as long: those of a pipeline of 121 stages.

    python benchmarks/pipeline_cifar10.py [--epochs 1] [--stretch 1] [--methods none lwpv+sc]

Interrupted, the same command goes on.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

import recoup as rc
from benchmarks.measure import save
from recoup.data import root
from recoup.pipeline import Batched, Run

METHODS = ("none", "sc", "lwpv", "lwpv+sc")
SEEDS = (0, 1, 2)
Cases = list[tuple[str, int]]  # method, seed
RATE, MOMENTUM, BATCH, DECAY = 0.1, 0.9, 128, 1e-4
EVERY = 1000  # steps between two points of a curve
KEEP = 5000  # steps between checkpoints


class Stream:
    """A seed's endless samples: all images in random order, augmented, epoch after epoch."""

    def __init__(self, data: rc.data.Dataset, seed: int, done: int) -> None:
        self.data, self.seed, self.position = data, seed, done
        self._epoch()
        for _ in range(done % len(data)):
            next(self._batches)

    def _epoch(self) -> None:
        seed = 1000 * self.seed + self.position // len(self.data)
        self._batches = iter(self.data.batches(1, augment=True, seed=seed, shuffle=True))

    def next(self) -> tuple[Tensor, Tensor]:
        """The next sample, with its batch dimension."""
        if self.position and self.position % len(self.data) == 0:
            self._epoch()
        self.position += 1
        return next(self._batches)


def network(seed: int) -> torch.nn.Module:
    """The seed's initial network."""
    torch.manual_seed(seed)
    return rc.models.resnet20(norm="group")


def build(cases: Cases, steps: int, stretch: int) -> tuple[list[torch.nn.Module], Batched]:
    """A model for every case, and all their runs."""
    models = [network(seed) for _, seed in cases]
    stages = rc.pipeline.automatic(models[0])
    late = [stretch * delay for delay in rc.pipeline.delays(len(stages))]
    rate, momentum = rc.pipeline.scale_hyperparameters(RATE, MOMENTUM, BATCH, 1)
    runs = [
        Run(
            [0] * len(stages) if method == "sgdm" else late,
            "none" if method == "sgdm" else method,
            lambda k: rate * (1 - k / steps),
            momentum,
            DECAY,
        )
        for method, _ in cases
    ]
    return models, Batched(models, stages, runs)


def train(batched: Batched, cases: Cases, data: rc.data.Dataset, steps: int, path: Path) -> list[list[float]]:
    """Mean losses of every run, a row per EVERY steps; resumes from, and keeps, a checkpoint."""
    curve: list[list[float]] = []
    if path.exists():
        state = torch.load(path, weights_only=True)
        batched.load_state_dict(state["batched"])
        curve = state["curve"]
    streams = {seed: Stream(data, seed, batched.steps) for seed in SEEDS}
    total = torch.zeros(len(cases), dtype=torch.float64)
    while batched.steps < steps:
        samples = {seed: stream.next() for seed, stream in streams.items()}
        x, y = (torch.stack([samples[seed][part] for _, seed in cases]) for part in range(2))
        total += batched.step(x, y)
        if batched.steps % EVERY == 0:
            curve.append((total / EVERY).tolist())
            total.zero_()
            print(f"{batched.steps} of {steps}", [round(v, 3) for v in curve[-1][:: len(SEEDS)]], flush=True)
        if batched.steps % KEEP == 0:
            _keep(path, {"batched": batched.state_dict(), "curve": curve})
    return curve


def _keep(path: Path, state: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    torch.save(state, temporary)
    temporary.replace(path)


def figures(cases: Cases, models: list[torch.nn.Module], batched: Batched, curve: list[list[float]]) -> dict[str, dict]:
    """Accuracy on the test set and the mean loss of the last tenth, of every method and seed."""
    test = rc.data.load(f"cifar10:{root() / 'cifar10'}", "test")
    found: dict[str, dict] = {}
    tail = curve[-max(1, len(curve) // 10) :]
    for run, (method, _) in enumerate(cases):
        top1 = rc.evaluate(batched.load(run, models[run]).eval(), test.batches(500)).top1
        loss = statistics.mean(row[run] for row in tail)
        entry = found.setdefault(method, {"top1": [], "loss": [], "curves": []})
        entry["top1"].append(top1)
        entry["loss"].append(loss)
        entry["curves"].append([row[run] for row in curve])
    return found


def table(found: dict[str, dict]) -> str:
    """Markdown: mean and standard deviation, and the paired difference to SGDM."""
    lines = ["| | top-1 | loss, last tenth | top-1 less SGDM's, same seed |", "|---|---|---|---|"]
    for method, entry in found.items():
        gap = [a - b for a, b in zip(entry["top1"], found["sgdm"]["top1"], strict=True)]
        cells = [_cell(entry["top1"], 2), _cell(entry["loss"], 3), "" if method == "sgdm" else _cell(gap, 2)]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float], digits: int) -> str:
    kept = [value for value in values if math.isfinite(value)]
    if len(kept) < len(values):
        return f"{len(values) - len(kept)} of {len(values)} diverged"
    return f"{statistics.mean(kept):.{digits}f} ± {statistics.stdev(kept):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--stretch", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="beside sgdm")
    parser.add_argument("--work", type=Path, default=Path("recoup-results"), help="folder of checkpoints")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = rc.data.load(f"cifar10:{root() / 'cifar10'}", "train")
    steps = round(arguments.epochs * len(data))
    cases = [(method, seed) for method in ("sgdm", *arguments.methods) for seed in SEEDS]
    name = f"pipeline_cifar10_{arguments.epochs:g}_epochs" + f"_x{arguments.stretch}" * (arguments.stretch != 1)
    models, batched = build(cases, steps, arguments.stretch)
    curve = train(batched, cases, data, steps, arguments.work / f"{name}.pt")
    found = figures(cases, models, batched, curve)
    print(table(found))
    print(save(name, {"epochs": arguments.epochs, "stretch": arguments.stretch, "every": EVERY, "methods": found}))


if __name__ == "__main__":
    main()
