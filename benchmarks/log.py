"""Measurements kept one by one, so that an interrupted benchmark goes on where it stopped."""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

Key = tuple


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The command line of a script that keeps a log: ``--tables``, to which it may add."""
    parser = argparse.ArgumentParser(description=str(description).splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="only print the tables of what is measured already")
    return parser


def rows_of(path: Path) -> list[dict]:
    """A log's rows, one JSON line each; a last line without an end, which a kill left, is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def append(path: Path, *rows: dict) -> None:
    """Rows at a log's end, in one write, in the place of a last line that a kill left without its end."""
    whole = path.read_bytes() if path.exists() else b""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(whole.rfind(b"\n") + 1)
        file.seek(0, 2)
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def ends(path: Path, *fields: str) -> dict[Key, dict]:
    """Of a log with a row a training run and epoch, the last epoch's row of every run that ended, by a run's fields.

    A row's ``epoch`` counts from 0, and it names the run's ``epochs``.
    """
    return {tuple(row[name] for name in fields): row for row in rows_of(path) if row["epoch"] == row["epochs"] - 1}


def finite(value: float) -> float | None:
    """As JSON has it: null of what is no number."""
    return value if math.isfinite(value) else None


class Log:
    """A JSONL file of (key, value), and of what a value was measured of, such as a digest of the design.

    A value of something else is measured anew; of a key's rows in the file the last one holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        rows = rows_of(path)
        self.values: dict[Key, float] = {tuple(row["key"]): row["value"] for row in rows}
        self.of: dict[Key, str] = {tuple(row["key"]): row.get("of", "") for row in rows}

    def measure(self, key: Key, run: Callable[[], float], of: str = "") -> float:
        """The value of a key, measured unless it is there, of the same thing."""
        if key not in self.values or self.of[key] != of:
            value = run()
            self.values[key], self.of[key] = value, of
            append(self.path, {"key": list(key), "value": value, **({"of": of} if of else {})})
            print(*key, f"{self.values[key]:.3f}", flush=True)
        return self.values[key]

    def cell(self, keys: Iterable[Key], digits: int = 2) -> str:
        """Mean and standard deviation of what is measured of some keys."""
        values = [self.values[key] for key in keys if key in self.values]
        if not values:
            return ""
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    def rows(self) -> list[dict]:
        """All, for a results file."""
        return [{"key": list(key), "value": value} for key, value in self.values.items()]
