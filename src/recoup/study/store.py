"""Finished measurements on disk, so that an interrupted study goes on where it stopped.

One JSON file, replaced whole after every measurement: a reader finds the old file or the new one, never half of one.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recoup.errors import RecoupError
from recoup.storage.files import write_atomically

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
        self.folder, self.path = folder, folder / FILE
        self._identity = json.loads(json.dumps(identity))
        self._values: dict[str, Any] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecoupError(f"{folder}: cannot be made a folder for results ({error.strerror})") from None
        if not overwrite:
            self._values = self._read()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __len__(self) -> int:
        return len(self._values)

    def put(self, key: str, value: Any) -> None:
        """Add one measurement."""
        values = {**self._values, key: value}
        content = {"schema": SCHEMA, "identity": self._identity, "measurements": values}
        write_atomically(self.path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        self._values = values

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text("utf-8"))
            schema, identity, values = content["schema"], content["identity"], content["measurements"]
            if schema != SCHEMA or not isinstance(identity, dict) or not isinstance(values, dict):
                raise ValueError(f"schema {schema}")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RecoupError(
                f"{self.path}: not a file of finished measurements ({type(error).__name__}: {error}); "
                "choose another folder with --out, or begin anew with --overwrite"
            ) from None
        different = _differences(identity, self._identity)
        if different:
            raise RecoupError(
                f"{self.folder} holds measurements of another study ({'; '.join(different[:3])}); "
                "choose another folder with --out, or replace them with --overwrite"
            )
        return values


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in dict.fromkeys([*ours, *theirs]):
        one, other = theirs.get(key), ours.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found.append(f"{prefix}{key} was {one!r}, is {other!r}")
    return found
