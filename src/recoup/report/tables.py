"""Results as CSV files, one row a measurement, for spreadsheets and data frames."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from recoup.storage.files import write_atomically
from recoup.study.measures.lba import UnitRow
from recoup.study.measures.lightnorm import TrafficRow
from recoup.study.measures.nbsmt import CycleRow, LayerRow
from recoup.study.results import AccuracyRow, Results, ShiftRow


def write_tables(results: Results, folder: Path) -> list[Path]:
    """Write accuracy, layers, cycles, shifts and, of LBA, units, of LightNorm traffic, each whole or not at all."""
    tables: list[tuple[str, type[BaseModel], Sequence[BaseModel]]] = [
        ("accuracy.csv", AccuracyRow, results.accuracy),
        ("layers.csv", LayerRow, results.rows("layers")),
        ("cycles.csv", CycleRow, results.rows("cycles")),
        ("shifts.csv", ShiftRow, results.shifts),
    ]
    if results.rows("units"):
        tables.append(("units.csv", UnitRow, results.rows("units")))
    if results.rows("traffic"):
        tables.append(("traffic.csv", TrafficRow, results.rows("traffic")))
    paths = []
    for name, kind, rows in tables:
        paths.append(folder / name)
        write_atomically(folder / name, _table(kind.model_fields, rows))
    return paths


def _table(columns: Iterable[str], rows: Sequence[BaseModel]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.model_dump().items()} for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    """A shape as 16x3x3x3; everything else as it is."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else value
