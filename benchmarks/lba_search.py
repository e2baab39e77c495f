"""Claim: chosen per layer, accumulators can be narrower than the narrowest that all layers bear together.

`recoup.search.narrowest` on the pretrained ResNet-20 found through RECOUP_DATA: accuracy within a point of float on
1,000 training images, with a gain per channel fitted on 256 others; the found network is then measured on the whole
CIFAR-10 test set. Every network measured is kept beside the results, so that an interrupted search goes on.

    python benchmarks/lba_search.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import recoup as rc
from benchmarks.measure import RESULTS, save
from recoup import lba
from recoup.data import root
from recoup.search import narrowest

IMAGES, FITTED, BUDGET = 1000, 256, 1.0


def main() -> None:
    torch.set_num_threads(1)
    folder = root()
    spec = f"cifar10:{folder / 'cifar10'}"
    train, test = rc.data.load(spec, "train", limit=IMAGES + FITTED, seed=0), rc.data.load(spec, "test")
    images = list(train.batches(FITTED))
    calibration, labelled = [images[0][0]], images[1:]
    model = rc.models.load("resnet20", folder / "cifar10_models" / "resnet20-12fca82f.th").eval()
    found = narrowest(
        model,
        labelled,
        budget=BUDGET,
        calibration=calibration,
        log=RESULTS / "lba_search_log.json",
        progress=lambda line: print(line, flush=True),
    )
    rc.emulate_(model, None, layers=found.layers)
    lba.correct_gain_(model, calibration)
    top1 = rc.evaluate(model, test.batches(500)).top1
    layers = {name: config.accumulator.bits for name, config in found.layers.items()}
    uniform = {repr(config): accuracy for config, accuracy in found.uniform.items()}
    print(f"{found.bits:.2f} bits on average, {found.accuracy:.2f} % (float {found.reference:.2f}); test {top1:.2f} %")
    for name, bits in layers.items():
        print(f"{name:24} {bits}")
    measured = {"bits": found.bits, "accuracy": found.accuracy, "float": found.reference, "test": top1}
    print(save("lba_search", {**measured, "uniform": uniform, "layers": layers}))


if __name__ == "__main__":
    main()
