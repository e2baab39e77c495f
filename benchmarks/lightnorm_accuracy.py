"""Claim: range batch norm in FP10 with shared exponents trains as well as batch norm, on the same short schedule.

A ResNet-20, and a MobileNet-v1 of width 0.25 (depthwise convolutions), trained from scratch on CIFAR-10 with each norm,
three seeds: 5,000 training images, augmented, 5 epochs, batch 64, SGD with Nesterov momentum 0.9, weight decay 5e-4,
cosine from 0.1; top-1 on the 10,000 test images. Two cores cannot carry a full schedule in a session: every norm gets
this one. On the MobileNet, variants in which one approximation at a time is taken away say which of them costs
accuracy. Then the pretrained ResNet-20 converted without training: as it is, and with its running statistics
recalibrated (paired and average, 2,048 images). Kept in benchmarks/results/lightnorm_accuracy.jsonl.

    python benchmarks/lightnorm_accuracy.py             # measure what is missing, then print the tables
    python benchmarks/lightnorm_accuracy.py --tables    # only print
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
from recoup.formats import Float
from recoup.lightnorm import LightNorm
from recoup.training import Settings, Stage, train

IMAGES, EPOCHS, RATE, SEEDS = 5000, 5, 0.1, (0, 1, 2)
NORMS: dict[str, LightNorm | None] = {
    "batch norm": None,
    "range": LightNorm.range(),
    "range + FP10": LightNorm.fp10(),
    **{f"range + FP10 + BFP{g}": LightNorm(block=g) for g in (4, 8, 16, 32)},
}
NETWORKS = {
    "ResNet-20": rc.models.resnet20,
    "MobileNet-v1 x0.25": lambda: rc.models.mobilenet_v1(width=0.25),
}
FINE = Float.ieee(8, 23, subnormals=False, rounding="zero")  # of float32: blocks of 24 bits, which lose next to nothing
SEPARATELY: dict[str, LightNorm] = {
    "BFP4, forward exact": LightNorm(forward=FINE),
    "BFP4, backward exact": LightNorm(backward=FINE),
    "BFP4, one more bit backward": LightNorm(backward=Float.ieee(6, 4, subnormals=False, rounding="zero")),
    "BFP4, rounded to nearest": LightNorm(
        forward=Float.parse("fp10_154").replace(rounding="nearest"),
        backward=Float.parse("fp10_163").replace(rounding="nearest"),
    ),
    "BFP4, largest exponent shared": LightNorm(shared="max"),
    "BFP4, exact statistics": LightNorm(statistics=None),
}
DIFFERENCE = LightNorm().statistics  # 1-5-12 for x - mu, which makes the hardware's forward unit smaller
ROUNDED: dict[str, LightNorm] = {
    "range + FP10, x - mu in 1-5-12": LightNorm.fp10(difference=DIFFERENCE),
    "range + FP10 + BFP4, x - mu in 1-5-12": LightNorm(difference=DIFFERENCE),
}
NORMS |= SEPARATELY | ROUNDED
MAIN = ("batch norm", "range", "range + FP10", "range + FP10 + BFP4")
PLAN = [("ResNet-20", norm, seed) for seed in SEEDS for norm in MAIN]
PLAN += [("MobileNet-v1 x0.25", norm, seed) for seed in SEEDS for norm in MAIN]
WIDE = [norm for norm in NORMS if norm not in MAIN and norm not in SEPARATELY and norm not in ROUNDED]
PLAN += [("ResNet-20", norm, seed) for seed in SEEDS for norm in WIDE]
PLAN += [("MobileNet-v1 x0.25", norm, seed) for seed in SEEDS for norm in (*SEPARATELY, *WIDE)]
PLAN += [(network, norm, seed) for network in NETWORKS for seed in SEEDS for norm in ROUNDED]
METHODS = ("none", "paired", "average")


def trained(network: str, norm: str, seed: int) -> float:
    """Top-1 of a network trained from scratch."""
    spec = f"cifar10:{root() / 'cifar10'}"
    data, test = rc.data.load(spec, "train", limit=IMAGES, seed=0), rc.data.load(spec, "test")
    torch.manual_seed(seed)
    model: nn.Module = NETWORKS[network]()
    if (config := NORMS[norm]) is not None:
        rc.emulate_(model, config)
    settings = Settings(batch_size=64, nesterov=True, weight_decay=5e-4, seed=seed)
    train(model, data, None, [Stage(norm, EPOCHS, RATE)], settings)
    return rc.evaluate(model, test.batches(500)).top1


def converted(norm: str, method: str) -> float:
    """Top-1 of the pretrained ResNet-20 with its batch norms converted."""
    folder = root()
    spec = f"cifar10:{folder / 'cifar10'}"
    images, test = rc.data.load(spec, "train", limit=2048, seed=0), rc.data.load(spec, "test")
    model = rc.models.load("resnet20", folder / "cifar10_models" / "resnet20-12fca82f.th").eval()
    if (config := NORMS[norm]) is not None:
        rc.emulate_(model, config)
        if method != "none":
            rc.recalibrate_(model, images.batches(128, augment=True), method)  # type: ignore[arg-type]
    return rc.evaluate(model, test.batches(500)).top1


def tables(log: Log) -> str:
    """The tables in Markdown."""
    networks = list(NETWORKS)
    lines = [f"| norm | {' | '.join(networks)} |", "|---" * (len(networks) + 1) + "|"]
    for norm in NORMS:
        cells = [log.cell([("trained", network, norm, seed) for seed in SEEDS]) for network in networks]
        lines.append(f"| {norm} | {' | '.join(cells)} |")
    lines += ["", f"| converted | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 1) + "|"]
    for norm in (*MAIN, *WIDE, *ROUNDED):
        cells = [log.cell([("converted", norm, method, 0)]) for method in METHODS]
        lines.append(f"| {norm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=["converted", "trained"], help="only this half")
    given = parser.parse_args()
    torch.set_num_threads(1)
    log = Log(RESULTS / "lightnorm_accuracy.jsonl")
    if not given.tables and given.part != "trained":
        for norm in (*MAIN, *WIDE, *ROUNDED):
            for method in METHODS if norm != "batch norm" else ("none",):
                log.measure(("converted", norm, method, 0), lambda n=norm, m=method: converted(n, m))
    if not given.tables and given.part != "converted":
        for run in PLAN:
            log.measure(("trained", *run), lambda run=run: trained(*run))
    print(tables(log))
    if not given.tables:
        save("lightnorm_accuracy", {"images": IMAGES, "epochs": EPOCHS, "rate": RATE, "rows": log.rows()})


if __name__ == "__main__":
    main()
