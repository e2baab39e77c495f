"""Claim: with 8-bit accumulators it matters which gradient a network is trained with.

A multilayer perceptron (784-256-256-10) on Fashion-MNIST from RECOUP_DATA, trained from scratch with every product on
M4E3 accumulators (8 bits; biases 6 and 8, and 4 and 6), under each of the five gradients, and in float32, for five
seeds: 10,000 training images, 4 epochs, batch 64, SGD with momentum 0.9, cosine from 0.05; top-1 on the 10,000 test
images. Then the same with FP8 weights and activations. Kept in benchmarks/results/lba_gradients.jsonl.

    python benchmarks/lba_gradients.py [--tables]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn

import recoup as rc
from benchmarks.log import Log, arguments
from benchmarks.measure import RESULTS, save
from recoup.data import root
from recoup.lba.config import GRADIENTS
from recoup.network.emulated import emulated_layers
from recoup.training import Settings, Stage, train

SEEDS = (0, 1, 2, 3, 4)
IMAGES, EPOCHS, RATE = 10_000, 4, 0.05
UNITS = {"float32": None, "M4E3, bias 6": 6, "M4E3, bias 4": 4}
OPERANDS = {"fp32": None, "fp8": rc.lba.FP8}


def network(seed: int) -> nn.Sequential:
    """The perceptron with fresh weights."""
    torch.manual_seed(seed)
    sizes = ((784, 256), (256, 256), (256, 10))
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in sizes:
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def measure(unit: str, operands: str, gradient: str, seed: int) -> float:
    """Top-1 after training; 10 where the loss was no number."""
    spec = f"fashion-mnist:{root() / 'fashion_mnist'}"
    data, test = rc.data.load(spec, "train", limit=IMAGES, seed=0), rc.data.load(spec, "test")
    model, bias = network(seed), UNITS[unit]
    config = rc.LBA.fp32() if bias is None else rc.LBA.biased(4, 3, bias, gradient=gradient)
    rc.emulate_(model, config.replace(operands=OPERANDS[operands]))
    if bias is None:  # the same quantisers, float32 sums
        for layer in emulated_layers(model).values():
            layer.mode = "baseline"
    settings = Settings(batch_size=64, weight_decay=0.0, seed=seed, augment=False)
    train(model, data, None, [Stage(gradient, EPOCHS, RATE)], settings)
    return rc.evaluate(model, test.batches(500)).top1


def tables(log: Log) -> str:
    """The table in Markdown: mean and standard deviation over the seeds."""
    columns = [(unit, operands) for operands in OPERANDS for unit in UNITS]
    lines = ["| gradient | " + " | ".join(f"{unit}, W/A {operands}" for unit, operands in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for gradient in GRADIENTS:
        cells = [log.cell([(*column, gradient, seed) for seed in SEEDS]) for column in columns]
        lines.append(f"| {gradient} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    given = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    log = Log(RESULTS / "lba_gradients.jsonl")
    if not given.tables:
        for operands in OPERANDS:
            for seed in SEEDS:
                for unit, bias in UNITS.items():
                    for gradient in GRADIENTS if bias is not None else GRADIENTS[:1]:
                        key = (unit, operands, gradient, seed)
                        log.measure(key, lambda key=key: measure(*key))
        save("lba_gradients", {"images": IMAGES, "epochs": EPOCHS, "rate": RATE, "rows": log.rows()})
    print(tables(log))


if __name__ == "__main__":
    main()
