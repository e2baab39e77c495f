"""Whether this installation works, and which path the emulation takes on this machine."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import typer

from recoup.cli.common import Json
from recoup.data import root
from recoup.kernels import process
from recoup.kernels.operators import has_triton
from recoup.study.machine import cores, processor
from recoup.version import __version__
from recoup.wings import cards

LIBRARIES = ("numpy", "numba", "llvmlite", "scikit-learn", "datasets", "pydantic", "matplotlib", "triton")
OPTIONAL = ("triton",)


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; ``ok`` False is a fault that recoup cannot work with."""

    name: str
    value: str
    ok: bool = True


def examine() -> list[Check]:
    """Look at everything; never raises."""
    return [
        Check("recoup", __version__),
        Check("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        _checked("torch", _torch),
        *(_library(name) for name in LIBRARIES),
        Check("CPU", f"{processor()}, {cores()} cores, {torch.get_num_threads()} torch threads"),
        Check(
            "waiting threads",
            f"{process.waiting()}; commands set GOMP_SPINCOUNT (of GNU's OpenMP), Python must before torch is imported",
        ),
        *(_checked(f"{card.baseline.name} path", _path(card.path)) for card in cards().values() if card.path),
        _checked("CUDA", _cuda),
        *(_checked(f"self-test {name}", test) for name, test in _self_tests()),
        _checked("numba cache", _cache),
        _checked("data folder", _data),
    ]


def _self_tests() -> Iterator[tuple[str, Callable[[], str]]]:
    for config, card in cards().items():
        if card.self_test:
            yield config.__name__, card.self_test


def _checked(name: str, find: Callable[[], str]) -> Check:
    try:
        return Check(name, find())
    except Exception as error:  # a doctor reports every failure rather than failing itself
        return Check(name, f"{type(error).__name__}: {error}", ok=False)


def _torch() -> str:
    return f"{torch.__version__}, oneDNN {'on' if torch.backends.mkldnn.is_available() else 'off'}"


def _library(name: str) -> Check:
    try:
        return Check(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "not installed" + (" (optional)" if name in OPTIONAL else ""), ok=name in OPTIONAL)


def _path(find: Callable[[], tuple[str, str, str]]) -> Callable[[], str]:
    def said() -> str:
        name, _, reason = find()
        return f"{name}: {reason}"

    return said


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "none; the CPU runs everything"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    triton = has_triton()
    return f"{', '.join(names)}; Triton {'found' if triton else 'missing: pip install recoup[gpu]'}"


def _cache() -> str:
    folder = os.environ.get("NUMBA_CACHE_DIR")
    return folder if folder else "beside the installed package, or in the user's cache folder where that is read-only"


def _data() -> str:
    folder = root()
    state = "found" if Path(folder).is_dir() else "not there; only tests and benchmarks on real data need it"
    return f"{folder}: {state}"


def doctor(as_json: Json = False) -> None:
    """Versions, the processor, and which path the emulation takes; exit code 1 if something does not work."""
    checks = examine()
    if as_json:
        typer.echo(json.dumps([{"name": c.name, "value": c.value, "ok": c.ok} for c in checks], indent=1))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            typer.echo(f"{'ok   ' if check.ok else 'FAULT'}  {check.name:{width}}  {check.value}")
    raise typer.Exit(0 if all(check.ok for check in checks) else 1)
