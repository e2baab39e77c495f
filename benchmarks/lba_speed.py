"""Claim: the 12-bit accumulator's product runs at a sixth of torch's float32 speed or better, far above the peers.

Giga multiply-adds a second on the wall clock, candidates interleaved, medians; M7E4 (biases 12 and 10), chunk 16.
"small" operands cannot saturate, which the driver proves and then leaves out the limits; "large" ones do, so every
operation is there. Layers of networks: the shapes M x K x N that convolutions and linear layers give.

The peers: QPyTorch has no such product, so a user writes a loop over k with its float_quantize. It builds a C++
extension when imported: ``pip install --no-deps --target DIR qtorch``. MPTorch has one; it is not on the package index,
so its CPU rate is the one measured before (0.03 to 0.05 GMAC/s on a comparable server).

    python benchmarks/lba_speed.py [--qtorch DIR] [--threads 1]
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from benchmarks.measure import interleaved, medians, save
from recoup import lba
from recoup.kernels.llvm import Target, host
from recoup.lba import LBA, cpu

MAIN = (384, 1152, 1024)
LAYERS = ((16, 144, 8192), (32, 288, 4096), (64, 576, 2048), (512, 4608, 512), (4096, 4096, 32), (64, 64, 64))
GOALS = {(4096, 4096, 32): 0.5, (64, 64, 64): 0.3}  # of torch: decoding and classifiers are thin, or small
MOMENT = 1e6  # multiply-adds; products of fewer are over before a clock has told
PEER = (384, 64, 1024)  # the outputs of MAIN, a slice of its terms
MPTORCH = 0.05
LEVELS = tuple(t for t in ("skylake-avx512", "haswell", "x86-64") if Target.named(t).features <= host().features)


def operands(shape: tuple[int, int, int], scale: float) -> tuple[Tensor, Tensor]:
    """Gaussian weights [M, K] and rectified activations [K, N]."""
    M, K, N = shape
    generator = torch.Generator().manual_seed(0)
    return torch.randn(M, K, generator=generator) * scale, torch.randn(K, N, generator=generator).relu()


def on(level: str, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same on another instruction path."""

    def forced() -> Tensor:
        with cpu.target(level):
            return run()

    return forced


def candidates(shape: tuple[int, int, int], everything: bool) -> dict[str, Callable[[], Tensor]]:
    """What is compared on a shape."""
    (a, b), (large, _) = operands(shape, 0.02), operands(shape, 4.0)
    unit, integer = LBA(), LBA.int16()
    found: dict[str, Callable[[], Tensor]] = {
        "torch float32": lambda: a @ b,
        "M7E4, small operands": lambda: lba.matmul(a, b, unit),
        "M7E4, large operands": lambda: lba.matmul(large, b, unit),
    }
    if everything:
        found |= {f"M7E4, large operands, {level}": on(level, found["M7E4, large operands"]) for level in LEVELS}
        fused, narrow, sequential = LBA(product=None), LBA.sequential14(), LBA.fp32()
        whole = (a * 150).round(), (b * 3).round()
        found |= {
            "M7E4, fused": lambda: lba.matmul(large, b, fused),
            "sequential 14 bits, promoted": lambda: lba.matmul(a, b, narrow),
            "sequential float32": lambda: lba.matmul(a, b, sequential),
            "int16, saturating": lambda: lba.matmul(*whole, integer),
        }
    return found


def qpytorch(folder: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The per-step loop its users write."""
    sys.path.append(folder)
    quantize = importlib.import_module("qtorch.quant").float_quantize

    def run(a: Tensor, b: Tensor) -> Tensor:
        y = torch.zeros(a.shape[0], b.shape[1])
        for start in range(0, a.shape[1], 16):
            s = torch.zeros_like(y)
            for k in range(start, start + 16):
                p = quantize(a[:, k, None] * b[None, k], exp=4, man=7, rounding="nearest")
                s = quantize(p + s, exp=4, man=7, rounding="nearest")
            y = quantize(s + y, exp=4, man=7, rounding="nearest")
        return y

    return run


def rates(shape: tuple[int, int, int], runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """GMAC/s of every candidate."""
    M, K, N = shape
    rounds = rounds if M * K * N > MOMENT else 100 * rounds
    return {name: M * K * N / 1e9 / seconds for name, seconds in medians(interleaved(runs, rounds)).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--qtorch", help="the folder QPyTorch was installed to")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, dict[str, float]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for shape in (MAIN, *LAYERS):
        name = " x ".join(map(str, shape))
        results[name] = rates(shape, candidates(shape, shape == MAIN), arguments.rounds)
        bound = results[name]["torch float32"]
        for candidate, rate in results[name].items():
            print(f"{name:20} {candidate:40} {rate:8.3f} GMAC/s {rate / bound:7.3f} of torch", flush=True)
        if shape in GOALS:
            ratio = results[name]["M7E4, small operands"] / bound
            ratios[name] = {"of torch": ratio, "goal": GOALS[shape]}
            print(f"{name:20} {ratio:.2f} of torch where {GOALS[shape]} is the goal")
    main_rate = results[" x ".join(map(str, MAIN))]["M7E4, large operands"]
    peers = {"MPTorch, measured before": MPTORCH}
    if arguments.qtorch:
        loop, (a, b) = qpytorch(arguments.qtorch), operands(PEER, 4.0)
        peers["QPyTorch, loop over k"] = rates(PEER, {"loop": lambda: loop(a, b)}, 3)["loop"]
    for name, rate in peers.items():
        print(f"{name:61} {rate:8.4f} GMAC/s, recoup {main_rate / rate:.0f} times as fast")
    save(
        f"lba_speed_{arguments.threads}t",
        {"threads": arguments.threads, "gmacs": results, "thin": ratios, "peers": peers},
    )


if __name__ == "__main__":
    main()
