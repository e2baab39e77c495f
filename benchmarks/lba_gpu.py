"""Claim: on a GPU, the 12-bit accumulator's product runs at the rate measured here, against torch's float32 product.

Giga multiply-adds a second between CUDA events, variants interleaved, medians; M7E4 (biases 12 and 10), chunk 16, by
PTX (float32 toward zero) and without it (float64, the same bits), and other accumulators that need float64. torch runs
without TF32.

    python benchmarks/lba_gpu.py
    python benchmarks/lba_gpu.py --tiles     # is the tile a good choice? others on every shape
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from benchmarks.lba_speed import operands
from benchmarks.measure import medians, save
from benchmarks.nbsmt_gpu import events
from recoup.lba import LBA, driver

SHAPES = ((4096, 4096, 4096), (384, 1152, 1024), (64, 576, 16384), (512, 4608, 512))
TILES = ((32, 64), (64, 64), (32, 32), (64, 128), (16, 64), (128, 64))


def variants(a: Tensor, b: Tensor, tiles: bool) -> dict[str, Callable[[], Tensor]]:
    """What is compared on one product [1, M, K] x [1, K, N]."""
    from recoup.lba.gpu import Gpu

    if tiles:
        return {str(tile): lambda t=tile: driver.matmul(Gpu(block=t), a, b, LBA()) for tile in TILES}
    units = {
        "M7E4, fused": LBA(product=None),
        "sequential 14 bits": LBA.sequential14(),
        "sequential float32": LBA.fp32(),
    }
    return {
        "torch float32": lambda: a[0] @ b[0],
        "M7E4": lambda: driver.matmul(Gpu(), a, b, LBA()),
        "M7E4, float64": lambda: driver.matmul(Gpu(assembly=False), a, b, LBA()),
        **{name: lambda u=unit: driver.matmul(Gpu(), a, b, u) for name, unit in units.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tiles", action="store_true", help="time other tiles; nothing is saved")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/lba_gpu.py: torch sees no CUDA GPU here, so there is nothing to measure")
    torch.backends.cuda.matmul.allow_tf32 = False
    results: dict[str, dict[str, float]] = {}
    for shape in SHAPES:
        name, work = " x ".join(map(str, shape)), shape[0] * shape[1] * shape[2] / 1e9
        a, b = (x[None].cuda() for x in operands(shape, 4.0))
        seconds = medians(events(variants(a, b, arguments.tiles), rounds=9))
        results[name] = {variant: work / value for variant, value in seconds.items()}
        for variant, rate in results[name].items():
            print(f"{name:20} {variant:22} {rate:10.1f} GMAC/s", flush=True)
    if not arguments.tiles:
        print(save("lba_gpu", {"gpu": torch.cuda.get_device_name(), "gmacs": results}))


if __name__ == "__main__":
    main()
