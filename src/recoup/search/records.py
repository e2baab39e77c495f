"""The measurements of a search: what they are, and the finished ones, each a file named by what decides its number."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recoup.storage.files import write_atomically
from recoup.storage.folder import make
from recoup.tasks.bench import Value, capability

SCHEMA = 2  # the first kept no samples of nats
FOLDER = "records"


@dataclass(frozen=True)
class Task:
    """One measurement: a policy by explicit names, float layers left out."""

    label: str
    hardware: Mapping[str, Any]

    @classmethod
    def of(cls, label: str, assignment: Mapping[str, Any]) -> "Task":
        """Of an assignment that names float layers too."""
        return cls(label, {name: config for name, config in assignment.items() if config is not None})

    @property
    def policy(self) -> dict[str, str]:
        """As text, for records."""
        return {name: repr(config) for name, config in self.hardware.items()}

    record = policy


class Records:
    """Measurements of one identity, in a folder that several processes and machines may share, or in memory.

    A file is whole or not there. One that is torn, or of a processor with another capability, counts as not there.

    Args:
        folder: where ``records/`` lies; None: in memory.
        identity: what decides the numbers beside the policy.
        any_cpu: whether records of processors with another capability count.

    Raises:
        RecoupError: the folder cannot be made.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], *, any_cpu: bool = False) -> None:
        self.folder = None if folder is None else folder / FOLDER
        self.identity, self.any_cpu = dict(identity), any_cpu
        self._known: dict[str, Value] = {}
        if self.folder is not None:
            make(self.folder)

    def key(self, policy: Mapping[str, str]) -> str:
        """The name of a measurement: the sha256 of everything that decides it."""
        content = json.dumps({"identity": self.identity, "policy": policy}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def get(self, policy: Mapping[str, str]) -> Value | None:
        """A finished measurement, or None."""
        key = self.key(policy)
        if key not in self._known and self.folder is not None:
            found = self._read(self.folder / f"{key}.json", policy)
            if found is not None:
                self._known[key] = found
        return self._known.get(key)

    @property
    def place(self) -> str:
        """Where they are kept."""
        return "in memory" if self.folder is None else f"in {self.folder}"

    def __len__(self) -> int:
        """How many measurements were asked for or made."""
        return len(self._known)

    def put(self, policy: Mapping[str, str], value: Value, cpu: str) -> None:
        """Keep a measurement that a processor of capability ``cpu`` made; it is on disk when this returns."""
        key = self.key(policy)
        if self.folder is not None:
            content = {"schema": SCHEMA, "cpu": cpu, "identity": self.identity, "policy": dict(policy)}
            text = json.dumps({**content, "value": value}, indent=1, allow_nan=False)
            write_atomically(self.folder / f"{key}.json", text + "\n")
        if self.any_cpu or cpu == capability():
            self._known[key] = json.loads(json.dumps(value))

    def _read(self, path: Path, policy: Mapping[str, str]) -> Value | None:
        try:
            content = json.loads(path.read_text("utf-8"))
            same = (content["schema"], content["identity"], content["policy"]) == (SCHEMA, self.identity, dict(policy))
            value, cpu = content["value"], content["cpu"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        able = self.any_cpu or cpu == capability()
        return value if same and able and isinstance(value, dict) else None
