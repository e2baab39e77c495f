"""What every benchmark shares: interleaved medians, the machine's description, and a results file."""

import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from recoup.kernels.process import waiting

RESULTS = Path(__file__).parent / "results"


def clock_of_threads(threads: int) -> Callable[[], float]:
    """CPU time of one thread, which other jobs on the machine disturb less than the clock; of several the clock."""
    return time.process_time if threads == 1 else time.perf_counter


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int = 9,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of every variant, round by round, so that noise of the machine falls on all alike."""
    for _ in range(warmup):
        for run in variants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def ratio_of(seconds: Mapping[str, list[float]], name: str, other: str) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each variant."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> dict[str, object]:
    """Processor, cores, versions and date, as every results file states them."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    versions = {}
    for package in ("torch", "numpy", "numba", "llvmlite", "triton", "recoup"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load": list(os.getloadavg()),
        "waiting threads": waiting(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def save(name: str, results: Mapping[str, object]) -> Path:
    """Write benchmarks/results/NAME.json, with the machine, in one step."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    temporary.replace(path)
    return path


def design(module: Any) -> str:
    """A digest of a hardware module's RTLIL: a log that has it does not keep what an earlier generator measured."""
    return hashlib.sha256(module.rtlil().encode()).hexdigest()[:16]


def mapped(module: Any) -> str:
    """A digest of a hardware module's RTLIL and of how it is mapped to a library: of its area and energy."""
    from recoup.silicon import yosys  # most benchmarks need no yosys

    return hashlib.sha256((design(module) + yosys.rule()).encode()).hexdigest()[:16]
