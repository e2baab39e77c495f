"""Fresh processes for tests, without the seconds that each of them would take to import torch.

They are forked from a server that has imported libraries and recoup's modules, and done nothing else: no kernel is
compiled, no pool started, no wing registered and no random number drawn. What must be set before a library is imported,
such as OMP_NUM_THREADS, needs a process of its own instead.
"""

import multiprocessing
import os
import runpy
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "recoup.cli.evaluate",
        "recoup.cli.train",
        "sklearn.datasets",
        "torch.distributed.launcher.api",
        "torch.fx.experimental.symbolic_shapes",  # sympy, which the first backward pass of a process imports
    ]
)


@dataclass(frozen=True)
class Done:
    """What a process left: its exit code (minus the signal that ended it) and its texts."""

    returncode: int | None
    stdout: str
    stderr: str


class Fresh:
    """A process that calls a function of a module, and what it writes.

    Args:
        function: at the top of a module; its SystemExit is the exit code.
        arguments: its arguments.
        cwd: the folder it runs in; None: this process's.
        env: what to set in its environment.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._files = files = [f"{folder}/{name}" for name in ("stdout", "stderr")]
        for name in files:
            Path(name).touch()  # so that it can be read at once
        begin = (function, arguments, str(cwd or Path.cwd()), dict(env or {}), files)
        self.process: BaseProcess = CONTEXT.Process(target=_begin, args=begin)
        self.process.start()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.is_alive()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def told(self) -> Done:
        """What it has written so far; its exit code is None while it runs."""
        return Done(self.process.exitcode, *(Path(name).read_text("utf-8") for name in self._files))

    def wait(self, seconds: float = 600) -> Done:
        """Wait for its end; taking longer is a failure."""
        self.process.join(seconds)
        done = self.told()
        assert done.returncode is not None, f"still running after {seconds} s\n{done.stdout}\n{done.stderr}"
        return done

    def end(self) -> None:
        """Kill it, if it runs."""
        self.process.kill()
        self.process.join()


def recoup(*arguments: str) -> None:
    """``python -m recoup`` with these arguments, for `Fresh`."""
    sys.argv = ["recoup", *arguments]
    runpy.run_module("recoup", run_name="__main__", alter_sys=True)


def tested(*arguments: str) -> None:
    """``python -m pytest`` with these arguments, for `Fresh`; of the tests that start it, it knows nothing."""
    import pytest

    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    # Asserts are not rewritten, which takes seconds of a process: what fails is run again by hand, where they are.
    sys.exit(pytest.main(["-p", "no:cacheprovider", "--assert=plain", *arguments]))


def _begin(function: Callable[..., Any], arguments: tuple, cwd: str, env: dict[str, str], files: list[str]) -> None:
    for descriptor, name in zip((1, 2), files, strict=True):
        os.dup2(os.open(name, os.O_WRONLY), descriptor)
    os.chdir(cwd)
    os.environ.update(env)
    try:
        function(*arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
