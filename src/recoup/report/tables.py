"""Results as CSV files, one row a measurement, for spreadsheets and data frames."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from recoup.storage.files import write_atomically
from recoup.study.results import AccuracyRow, Results, ShiftRow
from recoup.study.rows import DifferenceRow, FlipsRow, NatsRow


def write_tables(results: Results, folder: Path) -> list[Path]:
    """Write accuracy and flips (of a language model nats and differences), every table of the wings that has rows, and
    shifts, each whole or not at all."""
    tables: dict[str, tuple[type[BaseModel], Sequence[BaseModel]]] = {
        **_measured(results),
        **{name: (type(rows[0]), rows) for name, rows in results.tables.items() if rows},
        "shifts": (ShiftRow, results.shifts),
        **({"costs": (type(results.costs[0]), results.costs)} if results.costs else {}),
    }
    paths = []
    for name, (kind, rows) in tables.items():
        paths.append(folder / f"{name}.csv")
        write_atomically(paths[-1], _table(kind.model_fields, rows))
    return paths


def _measured(results: Results) -> dict[str, tuple[type[BaseModel], Sequence[BaseModel]]]:
    if results.quality.paired:
        return {"nats": (NatsRow, results.nats), "differences": (DifferenceRow, results.differences)}
    flips = {"flips": (FlipsRow, results.flips)} if results.flips else {}
    return {"accuracy": (AccuracyRow, results.accuracy), **flips}


def _table(columns: Iterable[str], rows: Sequence[BaseModel]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.model_dump().items()} for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    """A shape as 16x3x3x3; everything else as it is."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else value
