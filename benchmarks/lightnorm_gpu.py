"""Claim: on a GPU, LightNorm's passes reach the share measured here of the bandwidth their count allows; goal 70 %.

Every pass is timed between CUDA events, ten calls in a row as in a training that keeps the queue full, interleaved with
copies of the same tensor, whose bytes per second, read and written, are the bandwidth of the machine. A pass must move:
`finite` and `moments` x once; `normalize` three times (x, xhat, y); `products` two (g, xhat); `gradient` two (g, dx).
`finite` waits for the device in every call. Share = those bytes / time / the copy's bandwidth.

    python benchmarks/lightnorm_gpu.py
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

GOAL = 0.7
CALLS = 10
SHAPES = ((256, 64, 56 * 56), (256, 256, 14 * 14), (64, 512, 7 * 7), (256, 16, 32 * 32))


def variants(x: Tensor) -> dict[str, tuple[int, Callable[[], object]]]:
    """Every pass over x [N, C, P]: how many times it moves the tensor, and the call."""
    from recoup.lightnorm import LightNorm, gpu
    from recoup.lightnorm.separate import statistics

    config = LightNorm()
    C, elements = x.shape[1], x.shape[0] * x.shape[2]
    sums, ends, indices = gpu.moments(x, config.chunks)
    mean, _, r = statistics(sums, ends, elements, config, 1e-5)
    gamma = torch.ones(C, dtype=torch.float64, device=x.device)
    beta, amounts = torch.zeros_like(gamma), torch.ones(C, config.chunks, dtype=torch.float64, device=x.device)
    g, copy = torch.randn_like(x), torch.empty_like(x)
    return {
        "copy": (2, lambda: copy.copy_(x)),
        "finite": (1, lambda: gpu.finite(x)),
        "moments": (1, lambda: gpu.moments(x, config.chunks)),
        "normalize": (3, lambda: gpu.normalize(x, mean, r, gamma, beta, config.forward)),
        "products": (2, lambda: gpu.products(g, x)),
        "gradient": (2, lambda: gpu.gradient(g, mean, r, amounts, indices, config.backward)),
    }


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    """``CALLS`` calls in a row."""

    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


def main() -> None:
    argparse.ArgumentParser(description=str(__doc__).splitlines()[0]).parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/lightnorm_gpu.py: torch sees no CUDA GPU here, so there is nothing to measure")
    from benchmarks.measure import medians, save
    from benchmarks.nbsmt_gpu import events

    results: dict[str, dict[str, float]] = {}
    for shape in SHAPES:
        name = " x ".join(map(str, shape))
        chosen = variants(torch.randn(shape, device="cuda"))
        seconds = medians(events({pass_: repeated(call) for pass_, (_, call) in chosen.items()}))
        size = 4 * shape[0] * shape[1] * shape[2]
        rates = {pass_: CALLS * times * size / seconds[pass_] / 1e9 for pass_, (times, _) in chosen.items()}
        results[name] = rates
        for pass_, rate in rates.items():
            share = rate / rates["copy"]
            print(f"{name:18} {pass_:10} {rate:8.0f} GB/s {share:6.1%}{'' if share >= GOAL else '  below the goal'}")
    print(save("lightnorm_gpu", {"gpu": torch.cuda.get_device_name(), "gigabytes_per_second": results}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
