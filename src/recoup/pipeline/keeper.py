"""Checkpoints of a run over processes: a file a rank, and a manifest that is written when all are there."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recoup.errors import RecoupError
from recoup.pipeline.worker import Worker
from recoup.storage.files import write_atomically

MANIFEST = "pipeline.json"


class Keeper:
    """The checkpoints of all ranks at one tick.

    Args:
        folder: shared by all ranks.
        worker: this rank's.
        identity: of the run, as JSON; a checkpoint of another is refused.
        barrier: waits until all ranks have called it.
    """

    def __init__(self, folder: Path, worker: Worker, identity: dict[str, Any], barrier: Callable[[str], None]) -> None:
        self.folder, self.worker, self.identity, self.barrier = folder, worker, identity, barrier
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> int:
        """Load the last checkpoint, if there is one; the tick to go on with.

        Raises:
            RecoupError: another run's checkpoint, with the first difference; a file that is missing or damaged.
        """
        tick = self._agreed()
        if tick:
            file = self._file(tick)
            broken = (OSError, RuntimeError, KeyError, TypeError, AttributeError, EOFError, pickle.UnpicklingError)
            try:
                self.worker.load(torch.load(file, weights_only=True, map_location="cpu"))
            except broken as error:
                raise RecoupError(
                    f"pipeline.run: {file} cannot be read ({type(error).__name__}: {error}); restore it, or delete "
                    f"{MANIFEST} there to start anew"
                ) from error
        self.barrier("load the checkpoint")
        return tick

    def _agreed(self) -> int:
        """The manifest's tick; 0 without one."""
        path = self.folder / MANIFEST
        if not path.exists():
            return 0
        try:
            manifest = json.loads(path.read_text("utf-8"))
            tick, theirs = int(manifest["tick"]), dict(manifest["run"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecoupError(
                f"pipeline.run: {path} is no manifest of a run ({type(error).__name__}: {error}); delete it to "
                "start anew"
            ) from error
        for name, value in json.loads(json.dumps(self.identity)).items():
            if theirs.get(name) != value:
                raise RecoupError(
                    f"pipeline.run: {self.folder} holds another run's checkpoint: its {name} is "
                    f"{_short(theirs.get(name))}, this one's {_short(value)}; choose another folder"
                )
        return tick

    def save(self, tick: int) -> None:
        """Keep everything at the beginning of a tick; the previous checkpoint stays until this one is whole."""
        buffer = io.BytesIO()
        torch.save(self.worker.state(), buffer)
        write_atomically(self._file(tick), buffer.getvalue())
        self.barrier("write a checkpoint")
        if self.worker.rank == 0:
            write_atomically(self.folder / MANIFEST, json.dumps({"tick": tick, "run": self.identity}))
        self.barrier("write the manifest of a checkpoint")
        for old in self.folder.glob(f"rank{self.worker.rank}-*.pt"):
            if old != self._file(tick):
                old.unlink()

    def _file(self, tick: int) -> Path:
        return self.folder / f"rank{self.worker.rank}-{tick}.pt"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
