"""Claim: LightNorm trains at most twice as slow as torch's batch norm on a CPU, and plain range batch norm no slower.

Milliseconds of a training step of one layer, forward and backward, against torch.nn.BatchNorm2d on the same
contiguous float32 input; candidates interleaved, medians. Shapes: the batch norms of ResNet-20 (32 x 32, batch 128) and
MobileNetV2 (224 x 224, batch 8).

    python benchmarks/lightnorm_speed.py [--threads 1]
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn

from benchmarks.measure import interleaved, medians, save
from recoup.lightnorm import LightNorm, LightNorm2d

SHAPES = {
    "ResNet-20": ((128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8)),
    "MobileNetV2": (
        (8, 32, 112, 112),
        (8, 96, 112, 112),
        (8, 144, 56, 56),
        (8, 192, 28, 28),
        (8, 384, 14, 14),
        (8, 576, 14, 14),
        (8, 960, 7, 7),
        (8, 1280, 7, 7),
    ),
}
NORMS = {
    "torch": None,
    "range": LightNorm.range(),
    "range + FP10": LightNorm.fp10(),
    "LightNorm": LightNorm(),
    "LightNorm, BFP32": LightNorm(block=32),
}


def step(config: LightNorm | None, x: Tensor, grad: Tensor) -> Callable[[], object]:
    """One training step of a layer."""
    channels = x.shape[1]
    norm = nn.BatchNorm2d(channels) if config is None else LightNorm2d(channels, config=config)
    leaf = x.clone().requires_grad_()

    def run() -> None:
        leaf.grad = None
        norm(leaf).backward(grad)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, dict[str, float]] = {}
    for network, shapes in SHAPES.items():
        total = dict.fromkeys(NORMS, 0.0)
        for shape in shapes:
            generator = torch.Generator().manual_seed(0)
            x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
            runs = {name: step(config, x, grad * 1e-3) for name, config in NORMS.items()}
            seconds = medians(interleaved(runs, arguments.rounds))
            name = f"{network} {' x '.join(map(str, shape))}"
            results[name] = {norm: 1e3 * value for norm, value in seconds.items()}
            total = {norm: total[norm] + seconds[norm] for norm in NORMS}
            cells = [f"{norm} {1e3 * v:.2f} ms ({v / seconds['torch']:.2f}x)" for norm, v in seconds.items()]
            print(f"{name:32} {'; '.join(cells)}", flush=True)
        results[network] = {norm: value / total["torch"] for norm, value in total.items()}
        print(network, {norm: round(ratio, 2) for norm, ratio in results[network].items()}, flush=True)
    save(f"lightnorm_speed_{arguments.threads}t", {"threads": arguments.threads, "milliseconds and ratios": results})


if __name__ == "__main__":
    main()
