"""Finished measurements on disk, so that an interrupted study goes on where it stopped.

One JSON file, replaced whole after every measurement: a reader finds the old file or the new one, never half of one. A
shard writes a file of its own beside it, which may come from another folder; all of a folder are read as one.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from recoup.storage.folder import make
from recoup.storage.lock import WAIT, Lock
from recoup.storage.statefile import Difference, StateFile, kind_and_text
from recoup.tasks.bench import Value, capability
from recoup.tasks.shards import Shard

FILE = "measurements.json"
SHARDS = "measurements-*-of-*.json"
LOCK = "study.lock"
SCHEMA = 1


def file_of(shard: Shard | None) -> str:
    """The name of the file that a shard, or a whole study, writes."""
    return FILE if shard is None else f"measurements-{shard.index}-of-{shard.count}.json"


class Entry(NamedTuple):
    """A measurement and the capability of the processor that made it; None where that was not kept."""

    value: Value
    cpu: str | None


class Locks:
    """A folder that is one study's, or that of several shards of it, until this is left.

    Raises:
        RecoupError: another process writes there: a study of the whole, or the same shard; the folder cannot be made.
    """

    def __init__(self, folder: Path, shard: Shard | None) -> None:
        make(folder)
        self._held = [Lock(folder / LOCK, "study", WAIT, shared=shard is not None)]
        if shard is not None:
            try:
                self._held.append(Lock((folder / file_of(shard)).with_suffix(".lock"), "study", WAIT))
            except BaseException:
                self._held[0].release()
                raise

    def __enter__(self) -> "Locks":
        return self

    def __exit__(self, *_: object) -> None:
        for lock in reversed(self._held):
            lock.release()


class Store:
    """Measurements by key, kept in a folder; each `put` is on disk when it returns.

    Args:
        folder: made if it is not there.
        identity: what decided the numbers; a store of other numbers is refused.
        overwrite: begin anew where the folder holds another study's measurements.
        shard: whose file is written; those of all are read.
        any_cpu: whether measurements of processors with another capability count; else they are made again.

    Raises:
        RecoupError: measurements of another recipe, model or version; a file that is none of ours; no folder possible.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        *,
        overwrite: bool = False,
        shard: Shard | None = None,
        any_cpu: bool = False,
    ) -> None:
        self.folder, self.any_cpu = folder, any_cpu
        self._identity = identity
        self._file = self._at(folder / file_of(shard))
        make(folder)
        self._own: dict[str, Entry] = {}
        self._others: dict[str, Entry] = {}
        if overwrite:
            for path in folder.glob(SHARDS):
                path.unlink()
        else:
            self._own = self._file.read() or {}
            self.read_others()

    def _at(self, path: Path) -> StateFile:
        return StateFile(path, self._identity, _encoded, _decoded, _damaged, _foreign)

    def read_others(self) -> None:
        """What others have measured by now: shards, or a study of the whole.

        Raises:
            RecoupError: a file of another study or version, or none of ours.
        """
        self._others = {}
        for path in [self.folder / FILE, *sorted(self.folder.glob(SHARDS))]:
            if path != self.path:
                found = self._at(path).read() or {}
                self._others |= {key: entry for key, entry in found.items() if self._other(key) is None}

    @property
    def path(self) -> Path:
        """The file that is written."""
        return self._file.path

    @property
    def place(self) -> str:
        """Where, for a sentence."""
        return f"in {self.path}"

    @property
    def foreign(self) -> list[str]:
        """Measurements of processors with another capability, which do not count."""
        return [key for key in {**self._others, **self._own} if key not in self]

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def __getitem__(self, key: str) -> Any:
        found = self.get(key)
        if found is None:
            raise KeyError(key)
        return found

    def __len__(self) -> int:
        return len({**self._others, **self._own})

    def key(self, record: str) -> str:
        """Records are keys already."""
        return record

    def get(self, record: str) -> Value | None:
        """A measurement that counts, or None."""
        own = self._own.get(record)
        found = own if own is not None and self._counts(own) else self._other(record)
        return None if found is None else found.value

    def put(self, record: str, value: Value, cpu: str | None = None) -> None:
        """Add one measurement, of a processor of this capability or another."""
        entries = {**self._own, record: Entry(value, cpu or capability())}
        self._file.write(entries)
        self._own = entries

    def _other(self, key: str) -> Entry | None:
        found = self._others.get(key)
        return found if found is not None and self._counts(found) else None

    def _counts(self, entry: Entry) -> bool:
        return self.any_cpu or entry.cpu in (None, capability())


def _encoded(entries: dict[str, Entry], identity: Mapping[str, Any]) -> str:
    values = {key: entry.value for key, entry in entries.items()}
    processors = {key: entry.cpu for key, entry in entries.items() if entry.cpu is not None}
    content = {"schema": SCHEMA, "identity": identity, "measurements": values, "processors": processors}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _decoded(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    content = json.loads(path.read_text("utf-8"))
    schema, identity, values = content["schema"], content["identity"], content["measurements"]
    processors = content.get("processors", {})
    if schema != SCHEMA or not all(isinstance(part, dict) for part in (identity, values, processors)):
        raise ValueError(f"schema {schema}")
    return {key: Entry(value, processors.get(key)) for key, value in values.items()}, identity


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"{path}: not a file of finished measurements ({kind_and_text(error)}); choose another folder with --out, or "
        "begin anew with --overwrite"
    )


def _foreign(path: Path, different: list[Difference]) -> str:
    told = "; ".join(f"{name} was {before!r}, is {now!r}" for name, before, now in different[:3])
    return (
        f"{path.parent} holds measurements of another study ({told}); choose another folder with --out, or replace "
        "them with --overwrite"
    )
