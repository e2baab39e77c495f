"""Claim: trained until the rate is zero, Spike Compensation and weight prediction match SGD without a delay.

Fashion-MNIST, pooled to 14 x 14, at batch one. A residual network with group norm, 8 channels, four blocks and 15
stages: plain pipelining delays its stages by 28 to 0 updates. Five seeds of every method train at once in one batched
network; a seed decides the initial weights and the order of the images and is the same for every method, so that
differences are paired. Hyperparameters are scaled from batches of 128 to one image. The reference rate is the one of a
grid at which SGDM alone, without a delay, does best after one epoch on two seeds; no other method was asked. The rate
falls linearly to zero over all epochs. ``--blocks 9`` has 30 stages and delays up to 58. A row of SGD at batch 128,
with the reference rate as it is, stands beside them. ``--data cifar10`` trains on CIFAR-10, pooled to 16 x 16.

    python benchmarks/pipeline_converged.py [--epochs 3] [--blocks 4] [--data fashion-mnist] [--tables]

Interrupted, the same command goes on. The log has one JSON line a run and epoch; ``--tables`` computes the table, with
its intervals, from the log alone, which takes seconds.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn

import recoup as rc
from benchmarks.log import append, arguments, rows_of
from benchmarks.measure import RESULTS, save
from benchmarks.paired import gap, spread
from recoup.data import root
from recoup.pipeline import Batched, Run

SGDM, LARGE = "SGDM, no delay", "SGDM, batch 128"
METHODS = {SGDM: "none", "PB": "none", "SC": "sc", "LWPv": "lwpv", "LWPv+SC": "lwpv+sc"}
SEEDS, GRID_SEEDS, GRID, BATCH, MOMENTUM = range(5), range(2), (0.03, 0.06, 0.12, 0.24), 128, 0.9
WIDTH, KEEP = 8, 2000
LOG = RESULTS / "pipeline_converged.jsonl"

Images = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """A data set: its folder, an image's channels and the side of a pooled one."""

    folder: str
    channels: int
    side: int


DATA = {"fashion-mnist": Data("fashion_mnist", 1, 14), "cifar10": Data("cifar10", 3, 16)}


@dataclass(frozen=True)
class Setting:
    """What the runs of one study share."""

    epochs: int
    blocks: int
    data: str

    def ends(self, row: dict) -> bool:
        """Whether a row of the log is of the end of such a training; the first rows do not name their data."""
        found = row["blocks"], row["epochs"], row["epoch"], row.get("data", "fashion-mnist")
        return found == (self.blocks, self.epochs, self.epochs - 1, self.data)

    def name(self, start: str = "pipeline_converged") -> str:
        """Of a file."""
        return f"{start}_{self.blocks}_{self.epochs}" + ("" if self.data == "fashion-mnist" else f"_{self.data}")


class Block(nn.Module):
    """Two convolutions with group norm, and what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.GroupNorm(4, WIDTH), nn.GroupNorm(4, WIDTH)
        self.sum = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        return self.sum(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


def network(seed: int, blocks: int, data: Data) -> nn.Sequential:
    """The seed's initial network."""
    torch.manual_seed(seed)
    places = (data.side // 2) ** 2
    stem = nn.Sequential(nn.Conv2d(data.channels, WIDTH, 3, padding=1, bias=False), nn.GroupNorm(4, WIDTH), nn.ReLU())
    last = nn.Sequential(nn.Flatten(), nn.Linear(WIDTH * places, 10))
    return nn.Sequential(stem, nn.MaxPool2d(2), *(Block() for _ in range(blocks)), last)


def stages(blocks: int) -> list[list[str]]:
    """Stem, pooling, three a block and the classifier."""
    inner = [[[f"{b}.conv1", f"{b}.norm1"], [f"{b}.conv2", f"{b}.norm2"], [f"{b}.sum"]] for b in range(2, blocks + 2)]
    return [["0"], ["1"], *(stage for block in inner for stage in block), [str(blocks + 2)]]


def images(data: str, split: str) -> Images:
    """All of a split, pooled and centred."""
    both = list(rc.data.load(f"{data}:{root() / DATA[data].folder}", split).batches(1000))
    x, y = torch.cat([x for x, _ in both]), torch.cat([y for _, y in both])
    return nn.functional.avg_pool2d(x, 2), y


def order(seed: int, epoch: int, count: int) -> Tensor:
    """The images of an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(1000 * seed + epoch))


def accuracy(model: nn.Module, test: Images) -> float:
    """Top-1 on the test images, in percent."""
    with torch.no_grad():
        return 100 * (model(test[0]).argmax(1) == test[1]).double().mean().item()


class Study:
    """Runs of one network that train at once, kept in the log and, between epochs, in a file."""

    def __init__(self, cases: Sequence[tuple[str, int, float]], setting: Setting, train: Images) -> None:
        self.cases, self.setting, self.train = list(cases), setting, train
        self.models = [network(seed, setting.blocks, DATA[setting.data]) for _, seed, _ in cases]
        cut, steps = stages(setting.blocks), setting.epochs * len(train[1])
        late = rc.pipeline.delays(len(cut))
        runs = []
        for method, _, reference in cases:
            rate, momentum = rc.pipeline.scale_hyperparameters(reference, MOMENTUM, BATCH, 1)
            falling = lambda k, rate=rate: rate * (1 - k / steps)  # noqa: E731 -- one a run
            runs.append(Run([0] * len(cut) if method == SGDM else late, METHODS[method], falling, momentum))
        self.batched, self.deepest = Batched(self.models, cut, runs), late[0]
        self.losses = torch.zeros(len(cases), dtype=torch.float64)

    def epoch(self, number: int, test: Images, path: Path) -> list[dict]:
        """Train through one epoch, or what is left of it; a row a run."""
        x, y = self.train
        rows = torch.stack([order(seed, number, len(y)) for _, seed, _ in self.cases], 1)
        while self.batched.steps < (number + 1) * len(y):
            now = rows[self.batched.steps % len(y)]
            self.losses += self.batched.step(x[now].unsqueeze(1), y[now].unsqueeze(1))
            if self.batched.steps % KEEP == 0 and self.batched.steps % len(y):  # the end is kept once it is logged
                self.keep(path)
                print(f"epoch {number}: {self.batched.steps % len(y)} of {len(y)}", flush=True)
        found = []
        for run, ((method, seed, reference), model) in enumerate(zip(self.cases, self.models, strict=True)):
            delay = 0 if method == SGDM else self.deepest
            loss = self.losses[run].item() / len(y)
            measured = {
                "loss": loss if math.isfinite(loss) else None,
                "top1": accuracy(self.batched.load(run, model), test),
            }
            setting = {**asdict(self.setting), "rate": reference}
            found.append({"method": method, "delay": delay, "seed": seed, "epoch": number, **measured, **setting})
        self.losses.zero_()
        return found

    def keep(self, path: Path) -> None:
        """The state, written whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"batched": self.batched.state_dict(), "losses": self.losses}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def resume(self, path: Path) -> None:
        """Go on from what was kept."""
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.batched.load_state_dict(state["batched"])
            self.losses.copy_(state["losses"])


def trained(cases: Sequence[tuple[str, int, float]], setting: Setting, work: Path, name: str) -> None:
    """Train some cases, all together, unless the log has the end of all of them."""
    ended = {(row["method"], row["seed"], row["rate"]) for row in rows_of(LOG) if setting.ends(row)}
    if set(cases) <= ended:
        return
    train, test = images(setting.data, "train"), images(setting.data, "test")
    study, path = Study(cases, setting, train), work / f"{name}.pt"
    study.resume(path)
    for number in range(study.batched.steps // len(train[1]), setting.epochs):
        rows = study.epoch(number, test, path)
        append(LOG, *rows)
        study.keep(path)


def large(setting: Setting, rate: float) -> None:
    """SGD with momentum at batch 128, by torch's optimizer: the seeds that the log lacks."""
    (x, y), test = images(setting.data, "train"), images(setting.data, "test")
    steps = setting.epochs * (len(y) // BATCH)
    ended = {row["seed"] for row in rows_of(LOG) if row["method"] == LARGE and setting.ends(row)}
    for seed in sorted(set(SEEDS) - ended):
        model = network(seed, setting.blocks, DATA[setting.data])
        optimizer = torch.optim.SGD(model.parameters(), rate, MOMENTUM)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / steps)
        for number in range(setting.epochs):
            total, parts = 0.0, order(seed, number, len(y))[: len(y) // BATCH * BATCH].split(BATCH)
            for now in parts:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x[now]), y[now])
                loss.backward()
                optimizer.step()
                falling.step()
                total += loss.item()
            row = {"method": LARGE, "delay": 0, "seed": seed, "epoch": number, "loss": total / len(parts)}
            append(LOG, row | {"top1": accuracy(model, test), **asdict(setting), "rate": rate})


def best(grid: Setting) -> float:
    """The grid's rate of the highest mean accuracy of SGDM."""
    found: dict[float, list[float]] = {}
    for row in rows_of(LOG):
        own = grid.ends(row) and row["method"] == SGDM and row["seed"] in GRID_SEEDS
        if own and row["loss"] is not None:
            found.setdefault(row["rate"], []).append(row["top1"])
    return max(found, key=lambda rate: statistics.mean(found[rate]))


def summary(setting: Setting) -> dict[str, dict]:
    """Of every method its last accuracies by seed, their mean and, less SGDM's of the same seed, a 95 % t interval."""
    last = [row for row in rows_of(LOG) if setting.ends(row)]
    found: dict[str, dict] = {}
    for method in (*METHODS, LARGE):
        own = {row["seed"]: row for row in last if row["method"] == method}
        if not own:
            continue
        top1 = [own[seed]["top1"] for seed in sorted(own)]
        row = {"rate": own[min(own)]["rate"], "seeds": sorted(own), "top1": top1, "mean": statistics.mean(top1)}
        row["loss"] = [own[seed]["loss"] for seed in sorted(own)]
        reference = found.get(SGDM)
        if reference is not None and sorted(own) == reference["seeds"] and len(own) > 1:
            row["less SGDM"], row["interval"] = gap(top1, reference["top1"])
        found[method] = row
    return found


def table(found: dict[str, dict]) -> str:
    """As Markdown."""
    lines = ["| | top-1 | less SGDM's of the same seed, 95 % t interval | training loss |", "|---|---|---|---|"]
    for method, row in found.items():
        less = f"{row['less SGDM']:+.2f} ± {row['interval']:.2f}" if "less SGDM" in row and method != SGDM else ""
        losses = [loss for loss in row["loss"] if loss is not None]
        loss = f"{statistics.mean(losses):.3f}" if losses else "diverged"
        lines.append(f"| {method} | {spread(row['top1'])} | {less} | {loss} |")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--data", default="fashion-mnist", choices=DATA)
    parser.add_argument("--work", type=Path, default=Path("recoup-results"), help="folder of unfinished runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    setting, first = (Setting(epochs, given.blocks, given.data) for epochs in (given.epochs, 1))
    if not given.tables:
        grid = [(SGDM, seed, rate) for rate in GRID for seed in GRID_SEEDS]
        trained(grid, first, given.work, first.name("pipeline_converged_grid"))
        rate = best(first)
        cases = [(method, seed, rate) for method in METHODS for seed in SEEDS]
        trained(cases, setting, given.work, setting.name())
        large(setting, rate)
    found = summary(setting)
    print(table(found))
    if not given.tables:
        print(save(setting.name(), {"grid": list(GRID), "methods": found}))


if __name__ == "__main__":
    main()
