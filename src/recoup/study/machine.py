"""The machine a study runs on, in words."""

import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from recoup.errors import RecoupError
from recoup.network.wing import Card
from recoup.study.rows import Frozen
from recoup.version import __version__


class Machine(Frozen):
    """Where the study ran, and by which path: all paths give the same bits, not the same speed."""

    cpu: str
    cores: int
    torch_threads: int
    device: str
    backend: str
    isa: str
    reason: str
    system: str
    python: str
    torch: str
    recoup: str


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


def describe(device: torch.device, wings: Iterable[Card] = ()) -> Machine:
    """The machine, and which path the first of some wings that has several takes on ``device``."""
    path = next((card.path for card in wings if card.path is not None), None)
    if device.type == "cuda":
        backend, isa, reason = "cuda", torch.cuda.get_device_name(device), "the network lies on the GPU"
    else:
        backend, isa, reason = ("", "", "") if path is None else path()
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
