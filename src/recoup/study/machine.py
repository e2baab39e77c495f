"""The machine a study runs on, in words."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from recoup.errors import RecoupError
from recoup.nbsmt import cpu
from recoup.study.results import Machine
from recoup.version import __version__


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name as its maker writes it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def check_device(name: str) -> torch.device:
    """The device a recipe names.

    Raises:
        RecoupError: CUDA is asked for and not there.
    """
    device = torch.device(name)
    if device.type == "cuda":
        available = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= available:
            raise RecoupError(f"device {name!r}: this machine has {available} CUDA devices that torch can use")
    return device


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Torch on so many threads, then as before; None changes nothing."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def describe(device: torch.device) -> Machine:
    """The machine, and which path NB-SMT layers take on ``device``."""
    probe = cpu.probe()
    if device.type == "cuda":
        backend, isa, reason = "cuda", torch.cuda.get_device_name(device), "the network lies on the GPU"
    else:
        backend, isa, reason = probe.name, probe.isa, probe.reason
    return Machine(
        cpu=processor(),
        cores=cores(),
        torch_threads=torch.get_num_threads(),
        device=str(device),
        backend=backend,
        isa=isa,
        reason=reason,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        recoup=__version__,
    )
