"""Claim: Hopper's FP8 adder runs at 0.6 of torch's float32 rate on an AVX-512 thread, bfloat16's at a quarter.

Giga multiply-adds a second on the wall clock, candidates interleaved, medians and best; torch's own product and LBA's
12-bit accumulator beside every preset. On other processors the ratios are others: the results file names it.

torch's OpenMP workers spin for a while after their part of torch's product, on the cores that our threads then want:
with two threads say ``OMP_WAIT_POLICY=PASSIVE``. ``--table``: the table of docs/tensorcore.md from the results files,
measuring nothing.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/tensorcore_speed.py [--threads 1 2] [--table]
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

import recoup as rc
from benchmarks.measure import RESULTS, interleaved, medians, save
from recoup.tensorcore.wing import CARD

SHAPE = (384, 1152, 1024)


def candidates() -> dict[str, Callable[[], Tensor]]:
    """What is compared."""
    M, K, N = SHAPE
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(M, K, generator=generator), torch.randn(K, N, generator=generator)
    found: dict[str, Callable[[], Tensor]] = {
        "torch float32": lambda: a @ b,
        "LBA M7E4": lambda: rc.lba.matmul(a, b, rc.LBA.m7e4()),
    }
    units = {**CARD.presets, "hopper-fp8, promoted": rc.TensorCore.hopper_fp8(promotion=128)}
    for name, unit in units.items():
        if unit.block is not None:
            (x, s), (y, t) = (rc.tensorcore.quantize_blocks(v, unit, side) for v, side in ((a, "a"), (b, "b")))
            scales = {"scale_a": s, "scale_b": t}
        else:
            x, y = (rc.quantize(v, form) for v, form in zip((a, b), unit.formats, strict=True))
            scales = {}
        found[name] = partial(rc.tensorcore.matmul, x, y, unit, **scales)
    return found


def measured(threads: int, rounds: int) -> None:
    """Every candidate on so many threads, printed and kept."""
    torch.set_num_threads(threads)
    seconds = interleaved(candidates(), rounds)
    terms = SHAPE[0] * SHAPE[1] * SHAPE[2] / 1e9
    rates = {name: terms / value for name, value in medians(seconds).items()}
    best = {name: terms / min(values) for name, values in seconds.items()}
    bound, top = rates["torch float32"], best["torch float32"]
    print(f"threads {threads}")
    for name, rate in rates.items():
        print(f"{name:24} {rate:7.2f} GMAC/s {rate / bound:6.3f} of torch (best {best[name] / top:6.3f})")
    save(f"tensorcore_speed_{threads}t", {"threads": threads, "gmacs": rates, "best": best})


def table() -> str:
    """Medians of all results files in Markdown, fastest first."""
    files = sorted(RESULTS.glob("tensorcore_speed_*t.json"))
    found = [json.loads(path.read_text()) for path in files]
    counts = [f"{each['threads']} thread" + "s" * (each["threads"] > 1) for each in found]
    lines = ["| | " + " | ".join(f"{count}, GMAC/s | of torch" for count in counts) + " |"]
    lines.append("|---|" + "---|---|" * len(found))
    for name in sorted(found[0]["gmacs"], key=lambda name: -found[0]["gmacs"][name]):
        cells = []
        for each in found:
            rate = each["gmacs"].get(name)
            cells += ["", ""] if rate is None else [f"{rate:.1f}", f"{rate / each['gmacs']['torch float32']:.2f}"]
        lines.append(f"| {name if ' ' in name and ',' not in name else f'`{name}`'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts, a results file each")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--table", action="store_true", help="print the table of what was measured, and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    for threads in arguments.threads:
        measured(threads, arguments.rounds)


if __name__ == "__main__":
    main()
