"""Claim: ResNet-20 in 4-bit integers keeps its accuracy on accumulators of 11 bits, in 8-bit ones of 20.

Top-1 on the first 2,000 CIFAR-10 test images (standard error 0.6) of the pretrained ResNet-20 found through RECOUP_DATA
on integer units: unsigned activations after a ReLU with one calibrated scale a layer, signed weights with a scale per
output channel, exact products, one accumulator a sum. W4A4 as in A2Q: the first and the last layer have operands of
8 bits and accumulators of 32, all between 4 bits and the accumulator of the column; W8A8: 8 bits everywhere, the first
layer's activations signed, and the accumulator of the column in every layer. Without repair, and with batch norm
statistics measured anew on the unit (`recalibrate_`, average) on 512 training images, augmented as in training, one
draw. Nothing is trained, where A2Q trains for its accumulator. Kept in benchmarks/results/lba_integers.jsonl.

    python benchmarks/lba_integers.py [--tables]
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import recoup as rc
from benchmarks.log import Log, arguments
from benchmarks.measure import RESULTS, save
from recoup.data import root
from recoup.formats.spec import IntOverflow
from recoup.network.emulated import emulated_layers

WIDTHS = {"W4A4": (32, 14, 13, 12, 11, 10, 9), "W8A8": (32, 20, 19, 18, 17, 16)}
ENDS: tuple[IntOverflow, ...] = ("saturate", "wrap")
REPAIRS = ("none", "statistics")
EXACT, IMAGES, FITTED = 32, 2000, 512
ANYTHING = 1e6  # inputs of all codes, saturated ones too


def unit(bits: int, width: int, end: IntOverflow, signed: bool = False) -> rc.LBA:
    """Operands of ``bits``, exact products, an accumulator of ``width``."""
    operands = (rc.Int(bits, signed=signed), rc.Int(bits))
    accumulator = rc.Int(width, overflow=end)
    return rc.LBA.int16(
        accumulator=accumulator, operands=operands, weight_scale="channel", activation_scale="calibrated"
    )


def chip(kind: str, width: int, end: IntOverflow) -> tuple[rc.LBA, dict[str, rc.LBA]]:
    """The config of most layers and those that differ."""
    if kind == "W8A8":
        return unit(8, width, end), {"conv1": unit(8, width, end, signed=True)}
    return unit(4, width, end), {"conv1": unit(8, 32, end, signed=True), "linear": unit(8, 32, end)}


class Bench:
    """The pretrained network with its data."""

    def __init__(self) -> None:
        folder = root()
        spec = f"cifar10:{folder / 'cifar10'}"
        self.fitted = rc.data.load(spec, "train").subset(FITTED, 0).batches(128, augment=True, seed=0)
        self.test = rc.data.load(spec, "test", limit=IMAGES)
        self.model = rc.models.load("resnet20", folder / "cifar10_models" / "resnet20-12fca82f.th").eval()
        self.state = copy.deepcopy(self.model.state_dict())

    def top1(self) -> float:
        return rc.evaluate(self.model, self.test.batches(250)).top1

    def measure(self, kind: str, width: int, end: IntOverflow, repair: str) -> float:
        """Top-1 of one chip; the network is given back in float with its own statistics."""
        config, others = chip(kind, width, end)
        rc.emulate_(self.model, config, layers=others)
        try:
            rc.calibrate_(self.model, self.fitted)
            if repair == "statistics":
                rc.recalibrate_(self.model, self.fitted, "average")
            return self.top1()
        finally:
            rc.restore_(self.model)
            self.model.load_state_dict(self.state)

    def needed(self, kind: str) -> float:
        """Bits with which no sum of a layer of the width asked can overflow, by its weights alone."""
        config, others = chip(kind, 32, "wrap")
        rc.emulate_(self.model, config, layers=others)
        rc.calibrate_(self.model, self.fitted)
        bits = []
        for name, layer in emulated_layers(self.model).items():
            if kind == "W8A8" or name not in others:
                codes = (-ANYTHING if name == "conv1" else 0.0, ANYTHING)
                bits.append(rc.lba.bound(layer, codes).bits)
        rc.restore_(self.model)
        self.model.load_state_dict(self.state)
        return float(max(bits))


def tables(log: Log) -> str:
    """A ladder a kind, in Markdown."""
    lines = []
    for kind, widths in WIDTHS.items():
        lines += [f"| {kind} | " + " | ".join(map(str, widths)) + " |", "|---|" + "---|" * len(widths)]
        for end in ENDS:
            for repair in REPAIRS:
                cells = [log.cell([(kind, width, end, repair)]) for width in widths]
                lines.append(f"| {end}, {repair} | " + " | ".join(cells) + " |")
        lines += ["", f"{kind}: {log.cell([(kind, 'bound')], 0)} bits cannot overflow", ""]
    return "\n".join(lines)


def main() -> None:
    given = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    log = Log(RESULTS / "lba_integers.jsonl")
    if not given.tables:
        bench = Bench()
        log.measure(("float32",), bench.top1)
        for kind, widths in WIDTHS.items():
            log.measure((kind, "bound"), lambda kind=kind: bench.needed(kind))
            for width in widths:
                for end in ENDS if width < EXACT else ENDS[:1]:
                    for repair in REPAIRS:
                        job = (kind, width, end, repair)
                        log.measure(job, lambda job=job: bench.measure(*job))
        save("lba_integers", {"images": IMAGES, "fitted": FITTED, "rows": log.rows()})
    print(tables(log))


if __name__ == "__main__":
    main()
