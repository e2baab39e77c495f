"""Claim: a network whose activations are far from one keeps its accuracy on a 12-bit accumulator with shifts per layer.

The pretrained ResNet-20 found through RECOUP_DATA, its images times 255 and the first batch norm's statistics with them
(in float the same function), on M7E4: without and with `recoup.lba.choose_exponents_` on 64 training images.

    python benchmarks/lba_exponents.py [--images 500]
"""

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import recoup as rc
from benchmarks.measure import save
from recoup import lba
from recoup.data import root
from recoup.network.emulated import emulated_layers

SCALE, FITTED = 255.0, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    limit = parser.parse_args().images
    torch.set_num_threads(1)
    folder = root()
    spec = f"cifar10:{folder / 'cifar10'}"
    fitted = [x * SCALE for x, _ in rc.data.load(spec, "train", limit=FITTED, seed=0).batches(FITTED)]
    test = [(x * SCALE, y) for x, y in rc.data.load(spec, "test", limit=limit).batches(100)]
    model = rc.models.load("resnet20", folder / "cifar10_models" / "resnet20-12fca82f.th").eval()
    with torch.no_grad():
        norm = model.get_submodule("bn1")
        norm.get_buffer("running_mean").mul_(SCALE)
        norm.get_buffer("running_var").mul_(SCALE**2)
    found = {"images": limit, "float": rc.evaluate(model, test).top1}
    rc.emulate_(model, lba.LBA.m7e4())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rc.RecoupWarning)  # it says that the first layer saturates: that is the point
        found["m7e4"] = rc.evaluate(model, test).top1
    lba.choose_exponents_(model, fitted)
    found["with shifts"] = rc.evaluate(model, test).top1
    found["shifts"] = {name: layer.shift for name, layer in emulated_layers(model).items()}
    print(found)
    print(save("lba_exponents", found))


if __name__ == "__main__":
    main()
