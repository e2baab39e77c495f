"""A study's measurements where they are made: in this process, or in a worker that loads the recipe itself."""

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar
from uuid import uuid4

import torch

from recoup.errors import RecoupError, RecoupWarning
from recoup.storage.digest import of_batches
from recoup.storage.statefile import differences
from recoup.study.hardware import Hardware
from recoup.study.lab import Lab
from recoup.study.machine import cpu_threads
from recoup.study.measures import measure_of
from recoup.study.recipe import Recipe
from recoup.tasks.bench import ALONE, Value, Workbench


@dataclass(frozen=True)
class Task:
    """One measurement: the accuracy of ``config`` in ``state``, or (state None) its per-layer profile.

    ``hardware`` None is the float network.
    """

    config: str
    state: str | None
    seed: int | None
    hardware: Hardware | None

    @property
    def key(self) -> str:
        """In the store: a policy by its digest, so that another name measures nothing again."""
        if self.hardware is not None and self.hardware.name == self.config:
            return self._text(self.hardware.key)
        return self._text(self._shown)

    @property
    def label(self) -> str:
        """On the progress display: as the key, but a policy by its name."""
        return self._text(self._shown)

    record = key

    @property
    def _shown(self) -> str:
        """A baseline is named with what it is, since its rows' name says that only where it must."""
        if self.hardware is None or self.hardware.name in self.config:
            return self.config
        return f"{self.config} ({self.hardware.name})"

    def _text(self, name: str) -> str:
        return " | ".join([name, self.state or "profile", "no seed" if self.seed is None else f"seed {self.seed}"])


@dataclass
class Bench(Workbench):
    """A recipe's lab. It is sent without the lab: a worker loads network and data as this process did, and refuses to
    measure where they are others.

    Args:
        lab: of this process.
        threads: torch's, for a measurement; None leaves them as they are.
        divided: whether it may be sent; then it says what a worker's lab must be like.
    """

    purpose: ClassVar[str] = "study"

    lab: Lab | None
    threads: int | None
    divided: bool = False
    recipe: Recipe = field(init=False)
    hardware: Mapping[str, Hardware] = field(init=False)
    expected: Mapping[str, Any] = field(init=False)
    folder: str = field(init=False, default_factory=os.getcwd)
    name: str = field(init=False, default_factory=lambda: uuid4().hex)

    def __post_init__(self) -> None:
        assert self.lab is not None
        self.recipe, self.hardware = self.lab.recipe, dict(self.lab.known)
        self.expected = _likeness(self.lab) if self.divided else {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "lab": None}

    def make(self, task: Any) -> Value:
        """What a `Task` asks for, with its seconds and the notes of it.

        Raises:
            RecoupError: whatever a step refuses; a worker whose network or data are not ours.
        """
        with ALONE, cpu_threads(self.threads):
            if self.lab is not None:
                return measured(self.lab, task)
            with _beside(self.folder):
                return measured(self._loaded(), task)

    def _loaded(self) -> Lab:
        """The lab of this worker, which keeps the one that it used last."""
        if _worker.name != self.name:
            _worker.lab = None
            lab = Lab(self.recipe)
            different = differences(self.expected, _likeness(lab))
            if different:
                name, wanted, found = different[0]
                raise RecoupError(
                    f"study: {name} is {wanted!r}, but {found!r} at a worker: every machine needs the same recoup, "
                    "torch, network and data at the same paths"
                )
            lab.known.update(self.hardware)
            _worker.name, _worker.lab = self.name, lab
        assert _worker.lab is not None
        return _worker.lab


@dataclass
class _Worker:
    name: str = ""
    lab: Lab | None = None


_worker = _Worker()


@contextlib.contextmanager
def _beside(folder: str) -> Iterator[None]:
    """In the folder that a study was started from, to which its paths are relative; its modules can be imported."""
    try:
        there = contextlib.chdir(folder)
        there.__enter__()
    except OSError as error:
        raise RecoupError(
            f"study: a worker cannot enter {folder!r}, from which the study was started ({error.strerror}); every "
            "machine needs the same data at the same paths"
        ) from None
    try:
        if folder not in sys.path:
            sys.path.append(folder)
        yield
    finally:
        there.__exit__(None, None, None)


def _likeness(lab: Lab) -> dict[str, Any]:
    """What every worker's lab must share: identity, and the first samples that are tested on and calibrated with."""
    first = (lab.test, lab.drawing.images(lab.recipe.calibration.seeds[0], 2))
    return {**lab.identity(), "samples": of_batches(next(iter(samples.batches(2))) for samples in first)}


def measured(lab: Lab, task: Task) -> Value:
    """A task's numbers, its seconds, torch's threads, and as its notes recoup's own warnings and what was in float."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RecoupWarning)
        started = time.perf_counter()
        value = _value(lab, task)
        value["seconds"] = round(time.perf_counter() - started, 3)
        value["threads"] = torch.get_num_threads()
    value["notes"] = _notes(caught) + lab.left(None if task.hardware is None else task.hardware.config)
    return value


def _notes(caught: list[warnings.WarningMessage]) -> list[str]:
    """recoup's own warnings, for the report; others are passed on."""
    for warning in caught:
        if not issubclass(warning.category, RecoupWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    own = [str(warning.message) for warning in caught if issubclass(warning.category, RecoupWarning)]
    return list(dict.fromkeys(own))


def _value(lab: Lab, task: Task) -> dict[str, Any]:
    config = None if task.hardware is None else task.hardware.config
    if task.state is None:
        assert task.hardware is not None
        measures = [found for card in task.hardware.cards if (found := measure_of(card)) is not None]
        made = [measure.measure(lab, config, task.seed or 0) for measure in measures]
        return {table: rows for tables in made for table, rows in tables.items()}
    found, moved = lab.accuracy(config, task.state, task.seed or 0)
    return {**found, "shift": {layer: list(pair) for layer, pair in moved.items()}}
