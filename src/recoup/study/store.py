"""Finished measurements on disk, so that an interrupted study goes on where it stopped.

One JSON file, replaced whole after every measurement: a reader finds the old file or the new one, never half of one.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recoup.storage.folder import make
from recoup.storage.statefile import Difference, StateFile, kind_and_text

FILE = "measurements.json"
SCHEMA = 1


class Store:
    """Measurements by key, kept in a folder; each `put` is on disk when it returns.

    Args:
        folder: made if it is not there.
        identity: what decided the numbers; a store of other numbers is refused.
        overwrite: begin anew where the folder holds another study's measurements.

    Raises:
        RecoupError: measurements of another recipe, model or version; a file that is none of ours; no folder possible.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.folder = folder
        self._file = StateFile(folder / FILE, identity, _encoded, _decoded, _damaged, _foreign)
        make(folder)
        self._values: dict[str, Any] = {} if overwrite else self._file.read() or {}

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __len__(self) -> int:
        return len(self._values)

    def put(self, key: str, value: Any) -> None:
        """Add one measurement."""
        values = {**self._values, key: value}
        self._file.write(values)
        self._values = values


def _encoded(values: dict[str, Any], identity: Mapping[str, Any]) -> str:
    content = {"schema": SCHEMA, "identity": identity, "measurements": values}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _decoded(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    content = json.loads(path.read_text("utf-8"))
    schema, identity, values = content["schema"], content["identity"], content["measurements"]
    if schema != SCHEMA or not isinstance(identity, dict) or not isinstance(values, dict):
        raise ValueError(f"schema {schema}")
    return values, identity


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
