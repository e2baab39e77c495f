"""Claim: on one thread `quantize` runs near memory speed, and far above the peers that emulate float formats.

Million elements a second of CPU time (other jobs on the machine disturb it less than the clock) for the same normal
numbers, as many as fit a core's second-level cache with room to spare (2^18, 1 MiB) and as many as do not (2^22);
candidates interleaved, medians. Beside recoup stand torch's copy, the bound; torch's own cast to
float8_e5m2 and back and ml_dtypes' (they do only formats they have codes for); and QPyTorch's float_quantize, the peer
that takes any exponent and mantissa widths. Candidates that round to e5m2 must first give recoup's values, but for
QPyTorch at ties, which it rounds away from zero.

    python benchmarks/formats_speed.py [--qtorch DIR]

QPyTorch is no dependency of ours and builds a C++ extension when imported:
``pip install --no-deps --target DIR qtorch``.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import medians, save
from recoup.formats import BlockFloat, Float, Int, quantize

SIZES = (1 << 18, 1 << 22)
E5M2 = Float.parse("e5m2")
OURS = "recoup e5m2, nearest"


def e5m2_candidates(x: Tensor, qtorch: str | None) -> dict[str, Callable[[], Tensor]]:
    """Everything that rounds x to e5m2."""
    found: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: quantize(x, E5M2),
        "torch .to(float8_e5m2).float()": lambda: x.to(torch.float8_e5m2).float(),
        "ml_dtypes .astype(float8_e5m2).astype(float32)": lambda: torch.from_numpy(
            x.numpy().astype(ml_dtypes.float8_e5m2).astype(np.float32)
        ),
    }
    if qtorch is not None:
        sys.path.append(qtorch)
        float_quantize = importlib.import_module("qtorch.quant").float_quantize
        found["QPyTorch float_quantize(exp=5, man=2)"] = lambda: float_quantize(x, exp=5, man=2, rounding="nearest")
    return found


def other_candidates(x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The bound, and what else recoup quantises to."""
    out, x64, x_NCHW = torch.empty_like(x), x.double(), x.view(-1, 64, 32, 32)
    bfloat16, fp10 = Float.parse("bfloat16"), Float.parse("fp10_154")
    return {
        "torch copy, into memory at hand": lambda: out.copy_(x),
        "torch copy, into new memory": x.clone,
        "recoup bfloat16, nearest": lambda: quantize(x, bfloat16),
        "recoup fp10_154, toward zero": lambda: quantize(x, fp10),
        "recoup e5m2, stochastic, drawing included": lambda: quantize(x, E5M2.replace(rounding="stochastic")),
        "recoup e5m2, nearest, float64": lambda: quantize(x64, E5M2),
        "recoup Int(8)": lambda: quantize(x, Int(8)),
        "recoup BlockFloat(), NCHW": lambda: quantize(x_NCHW, BlockFloat()),
    }


def interleaved(runs: Mapping[str, Callable[[], Tensor]], rounds: int, calls: int) -> dict[str, list[float]]:
    """Seconds of this thread's CPU time per call, round by round, of so many calls in a row."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 2):
        for name, run in runs.items():
            start = time.thread_time()
            for _ in range(calls):
                run()
            if round_ >= 2:  # after the warm-up
                seconds[name].append((time.thread_time() - start) / calls)
    return seconds


def measure(size: int, qtorch: str | None, rounds: int) -> dict[str, float]:
    """Million elements a second of every candidate."""
    x = torch.randn(size)
    same = e5m2_candidates(x, qtorch)
    even = quantize(x, E5M2)
    ties = quantize(x * (1 + 2.0**-23), E5M2) != quantize(x * (1 - 2.0**-23), E5M2)
    for name, run in same.items():
        assert not ((run() != even) & ~(ties & ("QPyTorch" in name))).any(), f"{name} rounds otherwise"
    seconds = medians(interleaved({**same, **other_candidates(x)}, rounds, calls=SIZES[-1] // size))
    return {name: size / value / 1e6 for name, value in seconds.items()}


def microseconds_per_call(calls: int = 3000) -> float:
    """On eight elements, through the operator, without a gradient."""
    x = torch.randn(8)
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        quantize(x, E5M2)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[calls // 2] * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qtorch", metavar="DIR", help="where qtorch is installed")
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rates, ratios = {}, {}
    for size in SIZES:
        rates[size] = measure(size, options.qtorch, options.rounds)
        peers = {name: rate for name, rate in rates[size].items() if not name.startswith("recoup")}
        ratios[size] = {name: rates[size][OURS] / rate for name, rate in peers.items()}
        print(f"{size} elements: million elements a second; {OURS} is so many times as fast")
        for name, rate in rates[size].items():
            print(f"{rate:8.0f}  {name}" + (f"  ({ratios[size][name]:.2f})" if name in peers else ""))
    path = save(
        "formats_speed",
        {
            "claim": "quantize runs near memory speed on one thread, far above the emulation peers",
            "rounds": options.rounds,
            "threads": 1,
            "clock": "CPU time of the thread",
            "million_elements_per_second": rates,
            f"times_as_fast_is_{OURS}": ratios,
            "microseconds_per_call_on_8_elements": microseconds_per_call(),
            "peers": {
                "ml_dtypes": version("ml_dtypes"),
                "qtorch": "0.3.0" if options.qtorch else "not measured: pass --qtorch",
            },
        },
    )
    print(path)


if __name__ == "__main__":
    main()
