"""Claim: at batch one, Spike Compensation with weight prediction trains a ResNet-20 as plain SGD does.

ResNet-20 with group norm on CIFAR-10 at batch one, augmented, every stage 2 (S - 1 - s) updates late; SGDM without a
delay. Hyperparameters are those of batches of 128 (learning rate 0.1, momentum 0.9, weight decay 1e-4) scaled to one
sample, the rate falling linearly to zero. Three seeds of every method, all in one batched network: a seed decides the
initial weights, the order and the augmentation, and is the same for every method, so that differences are paired. Two
cores cannot carry a full schedule of 200 epochs: every method gets the same short one. ``--stretch 4`` makes all delays
four times as long: those of a pipeline of 121 stages.

    python benchmarks/pipeline_cifar10.py [--epochs 1] [--stretch 1] [--methods none lwpv+sc] [--tables]

Interrupted, the same command goes on. The log has one JSON line a run and epoch; ``--tables`` computes the table from
it. The runs of two epochs that are in it were not evaluated after the first: its top-1 is null.
"""

import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

import recoup as rc
from benchmarks.log import append, arguments, ends, finite
from benchmarks.measure import RESULTS, save
from recoup.data import root
from recoup.pipeline import Batched, Run

METHODS = ("none", "sc", "lwpv", "lwpv+sc")
SEEDS = (0, 1, 2)
Cases = list[tuple[str, int]]  # method, seed
RATE, MOMENTUM, BATCH, DECAY = 0.1, 0.9, 128, 1e-4
EVERY = 1000  # steps between two points of a curve
KEEP = 5000  # steps between checkpoints
IMAGES = 50_000  # of an epoch
DELAY = 60  # of the first of ResNet-20's 31 stages
LOG = RESULTS / "pipeline_cifar10.jsonl"
FIELDS = ("epochs", "stretch", "method", "seed")  # of a run


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


def train(
    models: list[torch.nn.Module], batched: Batched, cases: Cases, setting: dict[str, int], path: Path
) -> list[list[float]]:
    """Mean losses of every run, a row per EVERY steps; resumes from, and keeps, a checkpoint; logs every epoch."""
    data = rc.data.load(f"cifar10:{root() / 'cifar10'}", "train")
    curve: list[list[float]] = []
    if path.exists():
        state = torch.load(path, weights_only=True)
        batched.load_state_dict(state["batched"])
        curve = state["curve"]
    streams = {seed: Stream(data, seed, batched.steps) for seed in SEEDS}
    total, steps = torch.zeros(len(cases), dtype=torch.float64), setting["epochs"] * IMAGES
    while batched.steps < steps:
        samples = {seed: stream.next() for seed, stream in streams.items()}
        x, y = (torch.stack([samples[seed][part] for _, seed in cases]) for part in range(2))
        total += batched.step(x, y)
        if batched.steps % EVERY == 0:
            curve.append((total / EVERY).tolist())
            total.zero_()
            print(f"{batched.steps} of {steps}", [round(v, 3) for v in curve[-1][:: len(SEEDS)]], flush=True)
        if batched.steps % IMAGES == 0:
            found = figures(models, batched, curve[-IMAGES // EVERY :])
            append(LOG, *rows(cases, found, batched.steps // IMAGES - 1, setting))
        if batched.steps % KEEP == 0:
            _keep(path, {"batched": batched.state_dict(), "curve": curve})
    return curve


def _keep(path: Path, state: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    torch.save(state, temporary)
    temporary.replace(path)


def figures(models: list[torch.nn.Module], batched: Batched, curve: list[list[float]]) -> list[dict[str, float | None]]:
    """Of every run the mean loss of a curve, and its top-1 on the test set if it has not diverged."""
    test = rc.data.load(f"cifar10:{root() / 'cifar10'}", "test")
    found: list[dict[str, float | None]] = []
    for run, model in enumerate(models):
        loss = finite(statistics.mean(row[run] for row in curve))
        top1 = None if loss is None else rc.evaluate(batched.load(run, model).eval(), test.batches(500)).top1
        found.append({"loss": loss, "top1": top1})
    return found


def whole(cases: Cases, curve: list[list[float]], setting: dict[str, int]) -> dict[str, dict]:
    """Of every method the accuracies at the end, the mean losses of the last tenth, and the curves."""
    ended = ends(LOG, *FIELDS)
    found: dict[str, dict] = {}
    for run, (method, seed) in enumerate(cases):
        entry = found.setdefault(method, {"top1": [], "loss": [], "curves": []})
        entry["top1"].append(ended[*setting.values(), method, seed]["top1"])
        entry["loss"].append(statistics.mean(row[run] for row in curve[-max(1, len(curve) // 10) :]))
        entry["curves"].append([row[run] for row in curve])
    return found


def rows(cases: Cases, found: list[dict[str, float | None]], epoch: int, setting: dict[str, int]) -> list[dict]:
    """Of the log, one a run."""
    late = {method: 0 if method == "sgdm" else DELAY * setting["stretch"] for method, _ in cases}
    return [
        {"method": method, "delay": late[method], "seed": seed, "epoch": epoch, **own, **setting, "rate": RATE}
        for (method, seed), own in zip(cases, found, strict=True)
    ]


def table(setting: dict[str, int]) -> str:
    """Markdown: mean and standard deviation, and the paired difference to SGDM, of what the log has."""
    ended, of = ends(LOG, *FIELDS), (setting["epochs"], setting["stretch"])
    lines = ["| | top-1 | loss of the last epoch | top-1 less SGDM's, same seed |", "|---|---|---|---|"]
    for method in ("sgdm", *METHODS):
        both = [(ended.get((*of, method, seed)), ended.get((*of, "sgdm", seed))) for seed in SEEDS]
        kept = [(row, exact) for row, exact in both if row and exact]
        if not kept:
            continue
        top1, loss = ([_number(row[metric]) for row, _ in kept] for metric in ("top1", "loss"))
        gap = [_number(row["top1"]) - _number(exact["top1"]) for row, exact in kept]
        lines.append(f"| {method} | {_cell(top1)} | {_cell(loss, 3)} | {'' if method == 'sgdm' else _cell(gap)} |")
    return "\n".join(lines)


def _number(value: float | None) -> float:
    """A log's null is a run that diverged."""
    return math.nan if value is None else value


def _cell(values: list[float], digits: int = 2) -> str:
    kept = [value for value in values if math.isfinite(value)]
    if len(kept) < len(values):
        return f"{len(values) - len(kept)} of {len(values)} diverged"
    return f"{statistics.mean(kept):.{digits}f} ± {statistics.stdev(kept):.{digits}f}"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--stretch", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="beside sgdm")
    parser.add_argument("--work", type=Path, default=Path("recoup-results"), help="folder of checkpoints")
    given = parser.parse_args()
    torch.set_num_threads(1)
    setting = {"epochs": given.epochs, "stretch": given.stretch}
    cases = [(method, seed) for method in ("sgdm", *given.methods) for seed in SEEDS]
    if not given.tables and not {(given.epochs, given.stretch, *case) for case in cases} <= set(ends(LOG, *FIELDS)):
        name = f"pipeline_cifar10_{given.epochs}_epochs" + f"_x{given.stretch}" * (given.stretch != 1)
        models, batched = build(cases, given.epochs * IMAGES, given.stretch)
        path = given.work / f"{name}.pt"
        curve = train(models, batched, cases, setting, path)
        print(save(name, {**setting, "every": EVERY, "methods": whole(cases, curve, setting)}))
        path.unlink()  # all is in the log and the results
    print(table(setting))


if __name__ == "__main__":
    main()
