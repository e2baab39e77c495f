"""Checkpoints of a run over processes: a file a rank, and a manifest that is written when all are there.

The manifest has the tick, what run it is of, and the digest of every rank's file. Every rank holds a lock in the folder
while it runs, so that two runs never share one.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recoup.errors import RecoupError
from recoup.pipeline.worker import Worker
from recoup.storage.digest import of_file
from recoup.storage.files import write_atomically
from recoup.storage.folder import make
from recoup.storage.lock import WAIT, Lock
from recoup.storage.statefile import Difference, StateFile, kind_and_text, readable, torch_bytes, torch_state

MANIFEST = "pipeline.json"


@dataclass(frozen=True, slots=True)
class Kept:
    """What a manifest says: the tick of a checkpoint, and the digests of its files by name."""

    tick: int
    files: dict[str, str]


class Keeper:
    """The checkpoints of all ranks at one tick.

    Args:
        folder: shared by all ranks.
        worker: this rank's.
        identity: of the run, as JSON; a checkpoint of another is refused.
        barrier: waits until all ranks have called it.
        wait: seconds to wait for another run to leave the folder.

    Raises:
        RecoupError: another run is in the folder.
    """

    def __init__(
        self,
        folder: Path,
        worker: Worker,
        identity: dict[str, Any],
        barrier: Callable[[str], None],
        wait: float = WAIT,
    ) -> None:
        self.folder, self.worker, self.barrier = folder, worker, barrier
        make(folder)
        self.lock = Lock(folder / f"rank{worker.rank}.lock", "pipeline.run", wait)
        self.manifest = StateFile(folder / MANIFEST, identity, _encoded, _decoded, _damaged, _foreign)

    def resume(self) -> int:
        """Load the last checkpoint, if there is one; the tick to go on with.

        Raises:
            RecoupError: another run's checkpoint, with the first difference; a file that is missing or damaged.
        """
        kept = self.manifest.read() or Kept(0, {})
        if kept.tick:
            file = self._file(kept.tick)
            readable(
                lambda: self._load(file, kept.files[file.name]),
                lambda error: (
                    f"pipeline.run: {file} cannot be read ({kind_and_text(error)}); restore it, or delete {MANIFEST} "
                    "there to start anew"
                ),
            )
        self.barrier("load the checkpoint")
        return kept.tick

    def _load(self, file: Path, digest: str) -> None:
        found = of_file(file)
        if found != digest:
            raise RecoupError(
                f"pipeline.run: {file} is not the file that was written: its SHA-256 is {found[:12]}..., the "
                f"manifest's {digest[:12]}...; restore it, or delete {MANIFEST} there to start anew"
            )
        self.worker.load(torch_state(file))

    def save(self, tick: int) -> None:
        """Keep everything at the beginning of a tick; the previous checkpoint stays until this one is whole."""
        content = torch_bytes(self.worker.state())
        write_atomically(self._file(tick), content)
        write_atomically(self._digest(tick), hashlib.sha256(content).hexdigest())
        self.barrier("write a checkpoint")
        if self.worker.rank == 0:
            names = [f"rank{rank}-{tick}.pt" for rank in range(self.worker.ranks)]
            self.manifest.write(Kept(tick, {name: (self.folder / f"{name}.sha256").read_text() for name in names}))
        self.barrier("write the manifest of a checkpoint")
        for old in self.folder.glob(f"rank{self.worker.rank}-*"):
            if old not in (self._file(tick), self._digest(tick)):
                old.unlink()

    def close(self) -> None:
        """Let others have the folder."""
        self.lock.release()

    def _file(self, tick: int) -> Path:
        return self.folder / f"rank{self.worker.rank}-{tick}.pt"

    def _digest(self, tick: int) -> Path:
        return self.folder / f"rank{self.worker.rank}-{tick}.pt.sha256"


def _encoded(kept: Kept, identity: Mapping[str, Any]) -> str:
    return json.dumps({"tick": kept.tick, "files": kept.files, "run": identity})


def _decoded(path: Path) -> tuple[Kept, dict[str, Any]]:
    content = json.loads(path.read_text("utf-8"))
    files = {str(name): str(digest) for name, digest in dict(content["files"]).items()}
    return Kept(int(content["tick"]), files), dict(content["run"])


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
