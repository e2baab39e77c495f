"""Checkpoints of a run over processes: a file a rank, and a manifest that is written when all are there."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recoup.pipeline.worker import Worker
from recoup.storage.files import write_atomically
from recoup.storage.folder import make
from recoup.storage.statefile import Difference, StateFile, kind_and_text, readable, torch_bytes, torch_state

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
        self.folder, self.worker, self.barrier = folder, worker, barrier
        make(folder)
        self.manifest = StateFile(folder / MANIFEST, identity, _encoded, _decoded, _damaged, _foreign)

    def resume(self) -> int:
        """Load the last checkpoint, if there is one; the tick to go on with.

        Raises:
            RecoupError: another run's checkpoint, with the first difference; a file that is missing or damaged.
        """
        tick = self.manifest.read() or 0
        if tick:
            file = self._file(tick)
            readable(
                lambda: self.worker.load(torch_state(file)),
                lambda error: (
                    f"pipeline.run: {file} cannot be read ({kind_and_text(error)}); restore it, or delete {MANIFEST} "
                    "there to start anew"
                ),
            )
        self.barrier("load the checkpoint")
        return tick

    def save(self, tick: int) -> None:
        """Keep everything at the beginning of a tick; the previous checkpoint stays until this one is whole."""
        write_atomically(self._file(tick), torch_bytes(self.worker.state()))
        self.barrier("write a checkpoint")
        if self.worker.rank == 0:
            self.manifest.write(tick)
        self.barrier("write the manifest of a checkpoint")
        for old in self.folder.glob(f"rank{self.worker.rank}-*.pt"):
            if old != self._file(tick):
                old.unlink()

    def _file(self, tick: int) -> Path:
        return self.folder / f"rank{self.worker.rank}-{tick}.pt"


def _encoded(tick: int, identity: Mapping[str, Any]) -> str:
    return json.dumps({"tick": tick, "run": identity})


def _decoded(path: Path) -> tuple[int, dict[str, Any]]:
    content = json.loads(path.read_text("utf-8"))
    return int(content["tick"]), dict(content["run"])


def _damaged(path: Path, error: Exception) -> str:
    return f"pipeline.run: {path} is no manifest of a run ({kind_and_text(error)}); delete it to start anew"


def _foreign(path: Path, different: list[Difference]) -> str:
    name, before, now = different[0]
    return (
        f"pipeline.run: {path.parent} holds another run's checkpoint: its {name} is {_short(before)}, this one's "
        f"{_short(now)}; choose another folder"
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
