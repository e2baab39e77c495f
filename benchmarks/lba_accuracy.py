"""Claim: accumulators of 10 to 12 bits cost a CIFAR-10 network little once a gain per channel is fitted, untrained.

Top-1 on the whole CIFAR-10 test set of the pretrained ResNet-20 found through RECOUP_DATA: zero-shot at accumulators
from M10E5 to M4E3 with fp32 and FP8 weights and activations; then four of them with every cheap repair, for three draws
of 512 training images, augmented as in training; then three fine-tuned in two stages (2 epochs without underflow, 1
with, of 10,000 augmented training images, batch 64, learning rate 0.002, then 0.0002). Every measurement is kept in
benchmarks/results/lba_accuracy.jsonl as soon as it is made; delete the file to measure anew.

    python benchmarks/lba_accuracy.py            # measure what is missing, then print the tables (an hour on one core)
    python benchmarks/lba_accuracy.py --tables   # only print
"""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn

import recoup as rc
from benchmarks.log import Log, arguments
from benchmarks.measure import RESULTS, save
from recoup.data import root
from recoup.training import Settings, fine_tune

FORMATS = ((10, 5), (9, 5), (8, 5), (7, 5), (6, 5), (7, 4), (6, 4), (5, 4), (4, 4), (4, 3))
REPAIRED = ((7, 4), (6, 4), (5, 4), (4, 4))
OPERANDS = {"fp32": None, "fp8": rc.lba.FP8}
REPAIRS = ("gain per layer", "gain per channel", "chunk near sqrt(K)", "paired", "average", "gain + paired")
SEEDS, IMAGES = (0, 1, 2), 512
TUNED, TUNING_IMAGES = ((7, 4), (5, 4), (4, 4)), 10_000


class Bench:
    """The pretrained network with its data."""

    def __init__(self) -> None:
        folder = root()
        spec = f"cifar10:{folder / 'cifar10'}"
        self.train, self.test = rc.data.load(spec, "train"), rc.data.load(spec, "test")
        self.model: nn.Module = rc.models.load("resnet20", folder / "cifar10_models" / "resnet20-12fca82f.th").eval()
        self.state = copy.deepcopy(self.model.state_dict())

    def top1(self) -> float:
        return rc.evaluate(self.model, self.test.batches(250)).top1

    def measure(self, mantissa: int, exponent: int, operands: str, repair: str, seed: int) -> float:
        """Top-1 of one state; the network is given back in float with its own statistics."""
        if repair == "fine-tuned":
            return self.fine_tuned(mantissa, exponent, seed)
        batches = self.train.subset(IMAGES, seed).batches(128, augment=True, seed=seed)
        rc.emulate_(self.model, rc.LBA.biased(mantissa, exponent, operands=OPERANDS[operands]))
        try:
            if repair.startswith("chunk"):
                rc.lba.choose_chunks_(self.model)
            if repair.startswith("gain"):
                rc.lba.correct_gain_(self.model, batches, "layer" if repair.endswith("layer") else "channel")
            if repair.endswith("paired"):
                rc.recalibrate_(self.model, batches, "paired")
            elif repair == "average":
                rc.recalibrate_(self.model, batches, "average")
            return self.top1()
        finally:
            rc.restore_(self.model)
            self.model.load_state_dict(self.state)

    def fine_tuned(self, mantissa: int, exponent: int, seed: int) -> float:
        """Top-1 after both stages."""
        rc.emulate_(self.model, rc.LBA.biased(mantissa, exponent))
        try:
            settings = Settings(batch_size=64, seed=seed)
            data = self.train.subset(TUNING_IMAGES, seed)
            fine_tune(self.model, data, epochs=2, underflow_epochs=1, learning_rate=0.002, settings=settings)
            return self.top1()
        finally:
            rc.restore_(self.model)
            self.model.load_state_dict(self.state)


def jobs(part: str) -> Iterator[tuple]:
    """(mantissa, exponent, operands, repair, seed) of every measurement; None is the float network."""
    if part == "tuning":
        for m, e in TUNED:
            yield (m, e, "fp32", "fine-tuned", 0)
        return
    yield (None, None, "fp32", "none", 0)
    for m, e in FORMATS:
        for operands in OPERANDS:
            yield (m, e, operands, "none", 0)
    for seed in SEEDS:
        for m, e in REPAIRED:
            for repair in REPAIRS:
                if seed == 0 or not repair.startswith("chunk"):
                    yield (m, e, "fp32", repair, seed)


def tables(log: Log) -> str:
    """Both tables in Markdown."""
    lines = [f"float: {log.cell([(None, None, 'fp32', 'none', 0)])}", ""]
    lines += ["| W/A | " + " | ".join(f"M{m}E{e}" for m, e in FORMATS) + " |", "|---|" + "---|" * len(FORMATS)]
    for operands in OPERANDS:
        cells = [log.cell([(m, e, operands, "none", 0)]) for m, e in FORMATS]
        lines.append(f"| {operands} | " + " | ".join(cells) + " |")
    lines += ["", "| repair | " + " | ".join(f"M{m}E{e}" for m, e in REPAIRED) + " |", "|---|" + "---|" * len(REPAIRED)]
    for repair in ("none", *REPAIRS, "fine-tuned"):
        seeds = (0,) if repair == "none" or repair.startswith("chunk") else SEEDS
        cells = [log.cell([(m, e, "fp32", repair, s) for s in seeds]) for m, e in REPAIRED]
        lines.append(f"| {repair} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", choices=["cheap", "tuning"], help="only this half")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    log = Log(RESULTS / "lba_accuracy.jsonl")
    if not given.tables:
        bench = Bench()
        for part in [given.part] if given.part else ["cheap", "tuning"]:
            for job in jobs(part):
                log.measure(job, lambda job=job: bench.top1() if job[0] is None else bench.measure(*job))
        save("lba_accuracy", {"images": IMAGES, "rows": Log(log.path).rows()})
    print(tables(log))


if __name__ == "__main__":
    main()
