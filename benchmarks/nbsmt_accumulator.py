"""Claim: on two threads a ResNet-20 needs a register of 18 bits that saturates; one that wraps needs more.

The pretrained ResNet-20, first 1,000 CIFAR-10 test images, scales from 512 training images: top-1 with exact sums and
with registers of 20 to 16 bits, before and after `rc.repair_` on those training images, and which share of all layers'
outputs the register changed, every layer on the inputs that the emulation gives it. Kept in
benchmarks/results/nbsmt_accumulator.jsonl.

    python benchmarks/nbsmt_accumulator.py [--tables]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

import recoup as rc
from benchmarks.log import Log, arguments
from benchmarks.measure import RESULTS
from recoup.data import root
from recoup.nbsmt.observe import Seen, hooked, nbsmt_layers

REGISTERS = [None, *(rc.Int(bits) for bits in (20, 18, 17, 16)), rc.Int(18, overflow="wrap")]


def measured(register: rc.Int | None) -> dict[str, float]:
    """Top-1, repaired too, and the share of the outputs that are not those of exact sums, in percent."""
    spec = f"cifar10:{root() / 'cifar10'}"
    model = rc.models.load("resnet20", root() / "cifar10_models" / "resnet20-12fca82f.th").eval()
    train, test = rc.data.load(spec, "train", limit=512, seed=0), rc.data.load(spec, "test", limit=1000)
    rc.emulate_(rc.calibrate_(model, train.batches(128)), rc.NBSMT(2, accumulator=register))
    changed = outputs = 0

    def compare(_: str, seen: Seen, y: Tensor) -> None:
        nonlocal changed, outputs
        changed += int((y != seen.product(rc.NBSMT(2), None)).sum())  # no layer has a bias
        outputs += y.numel()

    with hooked(nbsmt_layers(model, "benchmark"), compare, "benchmark"):
        top1 = rc.evaluate(model, test.batches(250)).top1
    rc.repair_(model, train.batches(128))
    repaired = rc.evaluate(model, test.batches(250)).top1
    return {"top-1": top1, "repaired": repaired, "changed": 100 * changed / outputs}


def said(register: rc.Int | None) -> str:
    return "exact sums" if register is None else f"{register.bits} bits, {register.overflow}"


def table(log: Log) -> str:
    """The table in Markdown."""
    lines = ["| register | top-1 % | repaired % | outputs changed % |", "|---|---|---|---|"]
    for title in map(said, REGISTERS):
        cells = [log.cell([(title, name)], digits) for name, digits in (("top-1", 1), ("repaired", 1), ("changed", 2))]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    given = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    log = Log(RESULTS / "nbsmt_accumulator.jsonl")
    for register in [] if given.tables else REGISTERS:
        if (said(register), "repaired") not in log.values:
            for name, value in measured(register).items():
                log.measure((said(register), name), lambda value=value: value)
    print(table(log))


if __name__ == "__main__":
    main()
