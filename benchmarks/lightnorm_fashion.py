"""Question: trained until the rate is zero, what does range batch norm in FP10 and blocks lose, and to which of them?

A network of depthwise separable convolutions (16 to 64 channels, seven convolutions and norms) on all of
Fashion-MNIST, pooled to 14 x 14: 5 epochs, batch 128, SGD with Nesterov momentum 0.9, weight decay 5e-4, a rate of 0.1
that falls to zero as a cosine; five seeds, paired: a seed decides initial weights and the order of images, the same
for every norm. Top-1 on the 10,000 test images, whose own standard error is 0.3. One JSON line a run.

    python benchmarks/lightnorm_fashion.py [--tables]

Interrupted, the same command goes on; ``--tables`` computes the table from the log.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn

import recoup as rc
from benchmarks.log import Log, arguments
from benchmarks.measure import RESULTS, save
from benchmarks.paired import gap, spread
from benchmarks.pipeline_converged import Images, accuracy, images
from recoup.lightnorm import LightNorm

EPOCHS, BATCH, RATE, SEEDS = 5, 128, 0.1, range(5)
SETTING = f"{EPOCHS} epochs, batch {BATCH}, rate {RATE}"
PLAN = ((32, 2), (64, 2), (64, 1))  # output channels and stride of each separable convolution
EXACT = "batch norm"
NORMS: dict[str, LightNorm | None] = {
    EXACT: None,
    "range": LightNorm.range(),
    "range + FP10": LightNorm.fp10(),
    "range + FP10 + blocks of 4": LightNorm(),
    "range + FP10 + blocks of 4, x - mu in 1-5-12": LightNorm(difference=LightNorm().statistics),
}
MAIN = list(NORMS)[:4]  # the rest is slow


def network() -> nn.Sequential:
    """A convolution of 16 channels, then depthwise and pointwise ones in turn."""
    layers: list[nn.Module] = []

    def unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        layers.extend([convolution, nn.BatchNorm2d(outputs), nn.ReLU()])

    unit(1, 16, 3)
    channels = 16
    for outputs, stride in PLAN:
        unit(channels, channels, 3, stride, channels)
        unit(channels, outputs, 1)
        channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def trained(norm: str, seed: int, train: Images, test: Images) -> float:
    """Top-1 in percent."""
    (x, y), steps = train, EPOCHS * (len(train[1]) // BATCH)
    torch.manual_seed(seed)
    model = network()
    if (config := NORMS[norm]) is not None:
        rc.emulate_(model, config)
    optimizer = torch.optim.SGD(model.parameters(), RATE, 0.9, weight_decay=5e-4, nesterov=True)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (1 + math.cos(math.pi * k / steps)) / 2)
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for now in torch.randperm(len(y), generator=order)[: len(y) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[now]), y[now]).backward()
            optimizer.step()
            falling.step()
    return accuracy(model.eval(), test)


def table(log: Log) -> str:
    """In Markdown, with the paired differences to batch norm."""
    lines = ["| norm | top-1 | less batch norm's of the same seed, 95 % t interval |", "|---|---|---|"]
    for norm in NORMS:
        seeds = [seed for seed in SEEDS if (norm, seed) in log.values]
        if not seeds:
            continue
        top1, less = [log.values[norm, seed] for seed in seeds], ""
        both = [seed for seed in seeds if (EXACT, seed) in log.values]
        if norm != EXACT and len(both) > 1:
            mean, half = gap(*([log.values[which, seed] for seed in both] for which in (norm, EXACT)))
            less = f"{mean:+.2f} ± {half:.2f}"
        lines.append(f"| {norm} | {spread(top1)} | {less} |")
    return "\n".join(lines)


def main() -> None:
    measures = not arguments(__doc__).parse_args().tables
    torch.set_num_threads(1)
    log = Log(RESULTS / "lightnorm_fashion.jsonl")
    if measures:
        train, test = images("fashion-mnist", "train"), images("fashion-mnist", "test")
        for norms in (MAIN, [norm for norm in NORMS if norm not in MAIN]):
            for seed in SEEDS:
                for norm in norms:
                    run = lambda norm=norm, seed=seed: trained(norm, seed, train, test)  # noqa: E731 -- named
                    log.measure((norm, seed), run, SETTING)
        save("lightnorm_fashion", {"epochs": EPOCHS, "rate": RATE, "batch": BATCH, "rows": log.rows()})
    print(table(log))


if __name__ == "__main__":
    main()
