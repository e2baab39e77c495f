"""Checkpoints of a run over processes: a file a rank, and a manifest that is written when all are there.

Every rank keeps its state when it has updated for the same sample, each at its own time, and rank 0 is the last of
them. The manifest has the number of samples, what run it is of, and the digest of every rank's file; the run may go on
over other ranks. Every rank holds a lock in the folder while it runs, so that two runs never share one.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
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

MANIFEST, DIGEST = "pipeline.json", ".sha256"


@dataclass(frozen=True, slots=True)
class Kept:
    """What a manifest says: how many samples were updated for, and the digests of its files by name."""

    samples: int
    files: dict[str, str]


class Keeper:
    """The checkpoints of all ranks at one sample.

    Args:
        folder: shared by all ranks.
        worker: this rank's.
        identity: of the run, as JSON; a checkpoint of another is refused.
        barrier: waits until all ranks have called it.
        wait: seconds to wait for another run to leave the folder, and for another rank's file to be seen.

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
        self.folder, self.worker, self.barrier, self.wait = folder, worker, barrier, wait
        make(folder)
        self.lock = Lock(folder / f"rank{worker.rank}.lock", "pipeline.run", wait)
        self.manifest = StateFile(folder / MANIFEST, identity, _encoded, _decoded, _damaged, _foreign)

    def watch(self, every: int, samples: int) -> None:
        """From now on, keep everything after so many samples, at whole updates, but for the last."""
        size = self.worker.core.update_size
        every = -(-every // size) * size

        def updated(k: int) -> None:
            if k % every == 0 and k < samples:
                self.save(k)

        self.worker.updated = updated

    def resume(self) -> int:
        """Load the last checkpoint, if there is one; how many samples it has behind it.

        Raises:
            RecoupError: another run's checkpoint, with the first difference; a file that is missing or damaged.
        """
        kept = self.manifest.read() or Kept(0, {})
        if kept.samples:
            read = (self._read(self.folder / name, digest) for name, digest in kept.files.items())
            self.worker.load([self.worker.needed(state) for state in read])
        if self.worker.rank == 0:
            self._clear(kept.files)
        self.barrier("load the checkpoint")
        return kept.samples

    def _read(self, file: Path, digest: str) -> Mapping[str, Any]:
        return readable(
            lambda: self._state(file, digest),
            lambda error: (
                f"pipeline.run: {file} cannot be read ({kind_and_text(error)}); restore it, or delete {MANIFEST} "
                "there to start anew"
            ),
        )

    def _state(self, file: Path, digest: str) -> Mapping[str, Any]:
        found = of_file(file)
        if found != digest:
            raise RecoupError(
                f"pipeline.run: {file} is not the file that was written: its SHA-256 is {found[:12]}..., the "
                f"manifest's {digest[:12]}...; restore it, or delete {MANIFEST} there to start anew"
            )
        return torch_state(file)

    def save(self, samples: int) -> None:
        """Keep everything after the update of a sample; the previous checkpoint stays until this one is whole."""
        content, file = torch_bytes(self.worker.state()), self._file(self.worker.rank, samples)
        write_atomically(file, content)
        write_atomically(_digest(file), hashlib.sha256(content).hexdigest())
        if self.worker.rank:
            return
        files = [self._file(rank, samples) for rank in range(self.worker.ranks)]
        self.manifest.write(Kept(samples, {file.name: self._written(file) for file in files}))
        self._clear([file.name for file in files], samples)  # a faster rank may be at a later sample already

    def _clear(self, files: Iterable[str], samples: int | None = None) -> None:
        """Take away checkpoints that are not these: all, as of an attempt before, or those up to a sample."""
        kept = {f"{name}{end}" for name in files for end in ("", DIGEST)}
        for path in self.folder.iterdir():
            found = re.fullmatch(rf"rank\d+-(\d+)\.pt(?:{re.escape(DIGEST)})?", path.name)
            if found and path.name not in kept and (samples is None or int(found[1]) <= samples):
                path.unlink(missing_ok=True)

    def _written(self, file: Path) -> str:
        """The digest of another rank's file. It has been written; a file system over a network shows it late.

        Raises:
            RecoupError: it is not seen in time.
        """
        end = time.monotonic() + self.wait
        while not _digest(file).exists():
            if time.monotonic() > end:
                raise RecoupError(
                    f"pipeline.run: {_digest(file)} was written and is not seen here after {self.wait:g} s; the folder "
                    "must be shared by all ranks"
                )
            time.sleep(0.01)
        return _digest(file).read_text("utf-8")

    def close(self) -> None:
        """Let others have the folder."""
        self.lock.release()

    def _file(self, rank: int, samples: int) -> Path:
        return self.folder / f"rank{rank}-{samples}.pt"


def _digest(file: Path) -> Path:
    return file.with_name(f"{file.name}{DIGEST}")


def _encoded(kept: Kept, identity: Mapping[str, Any]) -> str:
    return json.dumps({"samples": kept.samples, "files": kept.files, "run": identity})


def _decoded(path: Path) -> tuple[Kept, dict[str, Any]]:
    content = json.loads(path.read_text("utf-8"))
    if isinstance(content, dict) and "tick" in content:
        raise RecoupError(
            f"pipeline.run: {path} is of a recoup before 0.2.0, whose checkpoints go on in that version alone; finish "
            "the run with it, or choose another folder"
        )
    files = {str(name): str(digest) for name, digest in dict(content["files"]).items()}
    return Kept(int(content["samples"]), files), dict(content["run"])


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
