"""Claim: `recoup evaluate` takes less CPU time than before recoup searched, for the same accuracies.

ResNet-20, CIFAR-10's test set, three configs, both versions in one run.

    git worktree add --detach ../before 4693089         # recoup before it searched and divided studies
    python benchmarks/evaluate_cpu.py ../before         # --limit 1000 --calibration-images 128 --seeds 0: less of it

Both run as a user's command would, in processes of their own, in turns; what a process and its children used is the
system's account of them. Every accuracy is compared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import save

from recoup.data import root

CONFIGS = ("nbsmt-2t", "nbsmt-4t", "lba-m7e4")
HERE = Path(__file__).resolve().parents[1]


def command(arguments: argparse.Namespace, out: str) -> list[str]:
    """`recoup evaluate` with its defaults."""
    weights, data = next((root() / "cifar10_models").glob("resnet20-*")), root() / "cifar10"
    given = ["evaluate", "--model", "resnet20", "--weights", str(weights), "--data", f"cifar10:{data}", "--out", out]
    given += [word for config in CONFIGS for word in ("--config", config)]
    given += ["--limit", str(arguments.limit)] if arguments.limit else []
    given += ["--calibration-images", str(arguments.calibration_images)]
    return [sys.executable, "-m", "recoup", *given, "--seeds", arguments.seeds]


def measured(tree: Path, arguments: argparse.Namespace) -> dict:
    """Seconds of one run, and what it found."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        process = subprocess.Popen(command(arguments, folder), env=environment, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        if status:
            raise SystemExit(f"{tree}: recoup evaluate ended with {os.waitstatus_to_exitcode(status)}")
        found = json.loads((Path(folder) / "results.json").read_text())["accuracy"]
    rows = {f"{row['config']} | {row['state']} | {row['seed']}": row["top1"] for row in found}
    return {"user": used.ru_utime, "system": used.ru_stime, "wall": wall, "top1": rows, "MB": used.ru_maxrss / 1024}


def told(name: str, run: dict) -> str:
    """A run in a line."""
    cpu = run["user"] + run["system"]
    return f"{name:7} {cpu:7.1f} s CPU ({run['system']:.1f} system)  {run['wall']:7.1f} s  {run['MB']:.0f} MB"


def main() -> None:
    """Measure, compare and keep."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("before", type=Path, help="a working tree of the older version")
    parser.add_argument("--limit", type=int, help="test images; default: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--calibration-images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    trees = {"before": arguments.before.resolve(), "now": HERE}
    runs: dict[str, list[dict]] = {name: [] for name in trees}
    for _ in range(arguments.rounds):
        for name, tree in trees.items():
            runs[name].append(measured(tree, arguments))
            print(told(name, runs[name][-1]), flush=True)
    cpu = {name: sum(run["user"] + run["system"] for run in made) for name, made in runs.items()}
    pairs = [(before["top1"], now["top1"]) for before, now in zip(*runs.values(), strict=True)]
    different = {key: (b.get(key), n.get(key)) for b, n in pairs for key in b | n if b.get(key) != n.get(key)}
    ratio, count = cpu["before"] / cpu["now"], len(pairs[0][1])
    print(f"CPU time: {ratio:.2f} times less; {len(different)} of {count} accuracies differ")
    for made in runs.values():
        for run in made:
            run.pop("top1", None)
    revisions = {name: revision(tree) for name, tree in trees.items()}
    asked = {name: getattr(arguments, name) for name in ("limit", "seeds", "calibration_images")}
    found = {"revisions": revisions, "runs": runs, "ratio": ratio, "different": different}
    save("evaluate_cpu", {"configs": CONFIGS, **asked, **found})


def revision(tree: Path) -> str:
    """A working tree's commit."""
    asked = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "not a git tree"


if __name__ == "__main__":
    main()
