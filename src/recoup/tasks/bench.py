"""What perform asks of a plan: tasks, a bench that measures them, and a keeper of what is measured."""

import platform
import threading
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import torch

from recoup.network.checks import reduced_float32

Value = dict[str, Any]
"""What a measurement gives, as plain values."""
ALONE = threading.Lock()
"""Held by whoever measures: torch's thread count is the process's, and a network is in one state at a time."""


def capability() -> str:
    """What of a processor, and of the precision that torch was given, decides which float kernels torch takes, and so
    the last bits of a result."""
    fewer = [f"{name} in {value}" for name, value in reduced_float32().items()]
    return ", ".join([f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}", *fewer])


class Task(Protocol):
    """One measurement, which depends on no other."""

    @property
    def label(self) -> str:
        """As users are told."""
        ...

    @property
    def record(self) -> Any:
        """What it is filed under."""
        ...


class Workbench(ABC):
    """What measures; it is sent to a worker once, not with every measurement."""

    purpose: ClassVar[str]
    """Heads errors."""

    @abstractmethod
    def make(self, task: Any) -> Value:
        """One measurement, the same to the bit in every process of processors with the same `capability`."""


class Keeper(Protocol):
    """Keeps measurements by their records; those of processors with another capability only with ``any_cpu``."""

    any_cpu: bool

    @property
    def place(self) -> str:
        """Where, for a sentence."""
        ...

    def key(self, record: Any, /) -> str:
        """One for all that is the same measurement."""
        ...

    def get(self, record: Any, /) -> Value | None:
        """A finished measurement, or None."""
        ...

    def put(self, record: Any, /, value: Value, cpu: str) -> None:
        """Keep a measurement that a processor of capability ``cpu`` made; it is safe when this returns."""
        ...
