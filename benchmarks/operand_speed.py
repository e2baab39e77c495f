"""Claim: building NB-SMT's activation operands costs about as much as copying the float tensor it is built from.

Milliseconds of CPU time per call on one thread (other jobs on the machine disturb it less than the clock) for layer
shapes of ResNet-20 (batch 64) and ResNet-18 (batch 8): recoup's fused pass with new and with given output memory,
against ``torch.clone`` of the float input (it reads the same and writes 4 bytes a channel; two threads write 2, four
threads 12) and against the same operand in eager torch on uint8 tensors, the fastest way we know to write it without a
kernel; its result is compared first. Variants interleaved, medians; eager torch in rounds of its own, because its
temporary tensors would push the others out of the caches.

    python benchmarks/operand_speed.py
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from benchmarks.measure import medians, save
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.groups import Activation, groups
from recoup.nbsmt.operand import operands

SHAPES = [(65536, 16), (16384, 32), (4096, 64), (25088, 64), (6272, 128), (392, 512)]
SCALE = 0.012


def eager(x_PC: Tensor, config: NBSMT, activations: tuple[Activation, ...]) -> Tensor:
    """Policy S+A, half to even, halves, C a multiple of the threads: the operand by torch's operators alone.

    Selections are bit operations on masks of 0 and 255: ``torch.where`` takes about ten times as long on the CPU.
    """
    T, (P, C) = config.threads, x_PC.shape
    x = (x_PC / SCALE).round_().clamp_(0, 255).to(torch.uint8)
    r = x.clamp(max=247)
    r = ((r >> 4) & 1).add_(r).add_(7).bitwise_and_(0xF0)
    r = select(-(x < 16).view(torch.uint8), x, r)
    active = (-(x != 0).view(torch.uint8)).view(P, T, C // T)
    partner = {u: torch.cat([active[:, u:], active[:, :u]], 1).view(P, C) for u in range(1, T)}
    values = {"0": torch.zeros_like(x), "x": x, "r": r}
    out = []
    for activation in activations:
        value, one, several = (values[name] for name in activation.values)
        some = more = None
        for mask in (partner[u] for u in activation.partners):
            both = None if some is None else some & mask
            more = both if more is None or both is None else more | both
            some = mask if some is None else some | mask
        value = value if some is None else select(some, one, value)
        out.append(value if more is None else select(more, several, value))
    return torch.cat(out, 1)


def select(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where the mask is 255, b where it is 0."""
    return (a ^ b).bitwise_and_(mask).bitwise_xor_(b)


def variants(P: int, C: int, threads: int) -> dict[str, Callable[[], object]]:
    """The same operand by every route, checked to be the same."""
    config = NBSMT(threads)
    activations = tuple(group.activation for group in groups(config))
    x = torch.relu(torch.randn(P, C, generator=torch.Generator().manual_seed(0)))
    given, faults = operands(x, SCALE, config, activations)
    assert faults == 0
    assert torch.equal(given, eager(x, config, activations))
    return {
        "recoup": lambda: operands(x, SCALE, config, activations),
        "recoup, given memory": lambda: operands(x, SCALE, config, activations, out=given),
        "torch clone of the input": x.clone,
        "torch eager": lambda: eager(x, config, activations),
    }


def cpu_seconds(routes: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of this thread per call, the routes taking turns; two rounds to warm up are not kept."""
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(rounds + 2):
        for name, run in routes.items():
            start = time.thread_time()
            run()
            seconds[name].append(time.thread_time() - start)
    return {name: values[2:] for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = []
    for threads in (2, 4):
        for P, C in SHAPES:
            routes = variants(P, C, threads)
            alone = {"torch eager": routes.pop("torch eager")}
            seconds = cpu_seconds(routes, rounds) | cpu_seconds(alone, max(3, rounds // 5))
            ms = {name: round(1e3 * value, 4) for name, value in medians(seconds).items()}
            least = {name: round(1e3 * min(values), 4) for name, values in seconds.items()}
            rows.append({"threads": threads, "pixels": P, "channels": C, "median_ms": ms, "least_ms": least})
            text = "  ".join(f"{name} {value:.3f}" for name, value in ms.items())
            print(f"{threads}T {P:6d} x {C:3d}: {text}")
    print(save("operand_speed", {"clock": "CPU time of one thread", "rounds": rounds, "rows": rows}))


if __name__ == "__main__":
    main()
