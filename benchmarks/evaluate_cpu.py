"""Claim: `recoup evaluate` of ResNet-20 on three pieces of hardware takes half of the CPU time of an earlier version.

The same command line in two checkouts in turns, each run in a folder and a process of its own with its kernels already
compiled; CPU time is user and system time of the process and its children. The least and the median of the rounds, and
whether both versions wrote the same accuracies.

    git worktree add OTHER aeba55b
    python benchmarks/evaluate_cpu.py OTHER --limit 10000
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.measure import save
from recoup.data import root

HERE = Path(__file__).parent.parent
CONFIGS = ("nbsmt-2t", "nbsmt-4t", "lba-m7e4")


def evaluated(checkout: Path, limit: int, out: Path) -> tuple[float, float]:
    """CPU seconds and seconds of the command."""
    command = [sys.executable, "-m", "recoup", "evaluate", "--model", "resnet20"]
    command += [
        "--weights",
        str(root() / "cifar10_models" / "resnet20-12fca82f.th"),
        "--data",
        f"cifar10:{root()}/cifar10",
    ]
    command += [word for config in CONFIGS for word in ("--config", config)]
    command += ["--limit", str(limit), "--seeds", "0", "--out", str(out)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(checkout / "src")}, check=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, seconds


def accuracies(out: Path) -> dict[str, float]:
    """Top-1 of every hardware and state."""
    found = json.loads((out / "results.json").read_text())
    return {f"{row['hardware']}, {row['state']}": row["top1"] for row in found["accuracy"]}


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout of the earlier version")
    parser.add_argument("--limit", type=int, default=10000, help="test images")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sides = {"earlier": options.other.resolve(), "now": HERE}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        for name, checkout in sides.items():  # compiles
            evaluated(checkout, 16, Path(folder) / f"{name}-first")
        for number in range(options.rounds):
            for name, checkout in sides.items():
                out = Path(folder) / f"{name}-{number}"
                spent = evaluated(checkout, options.limit, out)
                cpu[name].append(spent[0])
                wall[name].append(spent[1])
                print(f"{name}: {spent[0]:.1f} s of CPU, {spent[1]:.1f} s", flush=True)
    ratio = statistics.median(cpu["now"]) / statistics.median(cpu["earlier"])
    print(f"CPU time {ratio:.2f} of the earlier version's")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=sides["earlier"], check=True, capture_output=True, text=True
    ).stdout.strip()
    save("evaluate_cpu", {"earlier": commit, "images": options.limit, "cpu": cpu, "wall": wall, "ratio": ratio})


if __name__ == "__main__":
    main()
