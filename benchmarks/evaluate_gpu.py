"""Claim: a study runs on a GPU as on a CPU, with top-1 as close and in the time measured here.

`recoup evaluate` on ResNet-20 and 2,000 of CIFAR-10's test images, seven hardwares and their repairs, once on the GPU
and once on the CPU of the same machine. Calibration images come from the test set's other images, so that the training
set is not needed. What is emulated has the same bits on both; the float layers around it are torch's, here without TF32
(``NVIDIA_TF32_OVERRIDE=0``), and differ in last bits, which calibration and repairs carry on.

    python benchmarks/evaluate_gpu.py
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.measure import save
from recoup.data import root

CONFIGS = (
    *("nbsmt-2t", "nbsmt-4t", "NBSMT(2, accumulator=Int(16))", "lba-m7e4", "lightnorm-fp10"),
    *("hopper-fp8", "ampere-bf16"),
)
COMMAND = "from recoup.cli.main import app; app()"


def study(device: str, images: int, out: Path) -> tuple[float, dict[str, float]]:
    """Seconds of the whole command, and top-1 of every measurement."""
    data = root()
    chosen = [part for config in CONFIGS for part in ("--config", config)]
    weights = data / "cifar10_models" / "resnet20-12fca82f.th"
    given = ["--model", "resnet20", "--weights", str(weights), "--data", f"cifar10:{data / 'cifar10'}"]
    sizes = ["--limit", str(images), "--seeds", "0", "--calibration-images", "256", "--calibration-split", "test"]
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", COMMAND, "evaluate", *given, *chosen, *sizes, "--device", device, "--out", str(out)],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "NVIDIA_TF32_OVERRIDE": "0"},
    )
    seconds = time.perf_counter() - started
    with (out / "accuracy.csv").open(encoding="utf-8", newline="") as file:
        rows = {f"{row['config']} | {row['state']}": float(row["top1"]) for row in csv.DictReader(file)}
    return seconds, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--images", type=int, default=2000, help="of the test set")
    images = parser.parse_args().images
    if not torch.cuda.is_available():
        sys.exit("benchmarks/evaluate_gpu.py: torch sees no CUDA GPU here, so there is nothing to measure")
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "images": images}
    with tempfile.TemporaryDirectory() as folder:
        for device in ("cuda", "cpu"):
            seconds, rows = study(device, images, Path(folder) / device)
            found[device] = {"seconds": seconds, "top1": rows}
            print(f"{device}: {len(rows)} measurements, {seconds:.0f} s", flush=True)
    pairs = [(name, value, found["cpu"]["top1"][name]) for name, value in found["cuda"]["top1"].items()]
    found["largest difference"] = max(abs(one - other) for _, one, other in pairs)
    for name, one, other in pairs:
        print(f"{one:6.2f} {other:6.2f}  {name}")
    print(save("evaluate_gpu", found))


if __name__ == "__main__":
    main()
