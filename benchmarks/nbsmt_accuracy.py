"""Claim: recalibrated, four threads per multiplier cost next to nothing on CIFAR-10; paired recalibration does it best.

Top-1 on the whole CIFAR-10 test set of the pretrained ResNet-20/32/44/56 found through RECOUP_DATA. Three seeds draw
the calibration images (2,048 for the activation scales, 1,024 for a repair). First every repair state of 8 bit, two and
four threads on all four networks; then, on ResNet-20, paired against average for 64 to 4,096 images, clean and
augmented as in training. Every measurement is kept in benchmarks/results/nbsmt_accuracy.jsonl as soon as it is made, so
that an interrupted run goes on where it stopped; delete the file to measure anew.

    python benchmarks/nbsmt_accuracy.py            # measure what is missing, then print the tables (hours on two cores)
    python benchmarks/nbsmt_accuracy.py --tables   # only print
"""

import copy
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn

import recoup as rc
from benchmarks.log import append, arguments, rows_of
from benchmarks.measure import RESULTS, save
from recoup.data import root

DEPTHS = {
    20: "resnet20-12fca82f.th",
    32: "resnet32-d509ac18.th",
    44: "resnet44-014dd654.th",
    56: "resnet56-4bfd9763.th",
}
SEEDS = (0, 1, 2)
SCALE_IMAGES, REPAIR_IMAGES, SIZES = 2048, 1024, (64, 256, 1024, 4096)
LOG = RESULTS / "nbsmt_accuracy.jsonl"
T_95 = 4.302653  # Student's t, two degrees of freedom
STATES = {
    "float statistics": "no repair",
    "recalibrated at 8 bit": "BN stats averaged at 8 bit",
    "average": "averaged under NB-SMT",
    "paired": "paired (ours)",
    "bias": "bias correction (ours)",
}

Key = tuple  # (depth, seed, threads, state, images, augmented)


def read() -> dict[Key, dict]:
    """All measurements made so far."""
    return {tuple(row["key"]): row for row in rows_of(LOG)}


def plan(depth: int, study: bool) -> Iterator[tuple[int, str, int, bool]]:
    """(threads, state, images, augmented) to measure on one network with every seed."""
    if study:
        for threads in (2, 4):
            for images in SIZES if depth == 20 else (REPAIR_IMAGES,):
                for augmented in (True, False) if depth == 20 else (False,):
                    for method in ("paired", "average"):
                        yield threads, method, images, augmented
        return
    yield 1, "float statistics", 0, False
    yield 1, "recalibrated at 8 bit", REPAIR_IMAGES, True
    for threads in (2, 4):
        yield threads, "float statistics", 0, False
        for state in ("recalibrated at 8 bit", "average", "paired"):
            yield threads, state, REPAIR_IMAGES, True
        yield threads, "bias", REPAIR_IMAGES, False


class Bench:
    """One pretrained network with its data."""

    def __init__(self, depth: int) -> None:
        folder = root()
        spec = f"cifar10:{folder / 'cifar10'}"
        self.train, self.test = rc.data.load(spec, "train"), rc.data.load(spec, "test")
        weights = folder / "cifar10_models" / DEPTHS[depth]
        self.model: nn.Module = rc.models.load(f"resnet{depth}", weights).eval()
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.state = copy.deepcopy(self.model.state_dict())
        self.seed: int | None = None

    def batches(self, seed: int, images: int, augmented: bool):
        subset = self.train.subset(images, seed)
        return subset.batches(min(images, 128), augment=augmented, seed=seed, channels_last=True)

    def top1(self) -> float:
        return rc.evaluate(self.model, self.test.batches(250, channels_last=True)).top1

    def measure(self, seed: int, threads: int, state: str, images: int, augmented: bool) -> float:
        """Top-1 of one state; the network is given back in float with its own statistics."""
        if self.seed != seed:
            rc.calibrate_(self.model, self.batches(seed, SCALE_IMAGES, False))
            self.seed = seed
        repair = self.batches(seed, images, augmented) if images else []
        try:
            if state == "recalibrated at 8 bit" and threads > 1:
                rc.emulate_(self.model, rc.NBSMT(threads=1))
                rc.recalibrate_(self.model, repair, "average")
                rc.restore_(self.model)
            rc.emulate_(self.model, rc.NBSMT(threads=threads))
            if state == "bias":
                rc.correct_bias_(self.model, repair)
            elif state in ("average", "paired"):
                rc.recalibrate_(self.model, repair, state)
            elif state == "recalibrated at 8 bit" and threads == 1:
                rc.recalibrate_(self.model, repair, "average")
            return self.top1()
        finally:
            rc.restore_(self.model)
            self.model.load_state_dict(self.state)


def measure(done: dict[Key, dict], parts: list[str]) -> None:
    """Make every measurement that is missing and append it to the log."""
    for study in (part == "study" for part in parts):
        for depth in DEPTHS:
            bench: Bench | None = None
            jobs = [(depth, s, *job) for s in SEEDS for job in plan(depth, study)]
            for key in [(depth, 0, 0, "float", 0, False), *jobs]:
                if key in done or (key[3] == "float" and study):
                    continue
                bench = bench or Bench(depth)
                top1 = bench.top1() if key[3] == "float" else bench.measure(*key[1:])
                done[key] = {"key": list(key), "top1": top1}
                append(LOG, done[key])
                print(*key, f"{top1:.2f}", flush=True)


def cell(done: dict[Key, dict], key: Callable[[int], Key]) -> str:
    """Mean and standard deviation over the seeds."""
    values = [done[key(seed)]["top1"] for seed in SEEDS if key(seed) in done]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def gain(done: dict[Key, dict], depth: int, threads: int, method: str) -> str:
    """Points won over no repair, seed by seed: mean, Student's 95 % interval, share of the loss against 8 bit."""
    rows = []
    for seed in SEEDS:
        keys = [
            (depth, seed, 1, "float statistics", 0, False),
            (depth, seed, threads, "float statistics", 0, False),
            (depth, seed, threads, method, REPAIR_IMAGES, True),
        ]
        if not all(key in done for key in keys):
            return ""
        rows.append([done[key]["top1"] for key in keys])
    gains = [repaired - broken for _, broken, repaired in rows]
    lost = statistics.mean(eight - broken for eight, broken, _ in rows)
    half = T_95 * statistics.stdev(gains) / len(gains) ** 0.5
    share = f", {statistics.mean(gains) / lost:.0%} of the loss" if threads == 4 else ""
    return f"{statistics.mean(gains):+.2f} ± {half:.2f}{share}"


def tables(done: dict[Key, dict]) -> str:
    """Both tables in Markdown."""
    lines = ["| | " + " | ".join(f"ResNet-{d}" for d in DEPTHS) + " |", "|---|" + "---|" * len(DEPTHS)]

    def row(name: str, key: Callable[[int, int], Key]) -> None:
        lines.append(f"| {name} | " + " | ".join(cell(done, lambda s, d=d: key(d, s)) for d in DEPTHS) + " |")

    row("float", lambda d, s: (d, s, 0, "float", 0, False))
    row("8 bit", lambda d, s: (d, s, 1, "float statistics", 0, False))
    row("8 bit, BN stats averaged", lambda d, s: (d, s, 1, "recalibrated at 8 bit", REPAIR_IMAGES, True))
    for threads in (2, 4):
        for state, title in STATES.items():
            images = 0 if state == "float statistics" else REPAIR_IMAGES
            augmented = state not in ("float statistics", "bias")
            row(f"{threads} threads, {title}", lambda d, s, t=threads, k=(state, images, augmented): (d, s, t, *k))
    for threads in (2, 4):
        for method in ("average", "paired"):
            title = f"{threads} threads, gain of {STATES[method]}, 95 % interval"
            cells = [gain(done, depth, threads, method) for depth in DEPTHS]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += ["", "| images, ResNet-20 | " + " | ".join(map(str, SIZES)) + " |", "|---|" + "---|" * len(SIZES)]
    for threads in (2, 4):
        for method in ("paired", "average"):
            for augmented in (True, False):
                name = f"{threads} threads, {method}, {'augmented' if augmented else 'clean'}"
                cells = [cell(done, lambda s, k=(threads, method, n, augmented): (20, s, *k)) for n in SIZES]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| 1,024 images, clean | " + " | ".join(f"ResNet-{d}" for d in DEPTHS) + " |",
        "|---|" + "---|" * len(DEPTHS),
    ]
    for threads in (2, 4):
        for method in ("paired", "average"):
            row(f"{threads} threads, {method}", lambda d, s, t=threads, m=method: (d, s, t, m, REPAIR_IMAGES, False))
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=["states", "study"], help="only the first or the second half")
    given = parser.parse_args()
    done = read()
    if not given.tables:
        measure(done, [given.part] if given.part else ["states", "study"])
        done = read()
        save("nbsmt_accuracy", {"backend": rc.nbsmt.current_backend(), "rows": list(done.values())})
    print(tables(done))


if __name__ == "__main__":
    main()
