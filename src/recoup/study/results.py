"""What a study found, as results.json holds it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from recoup.errors import RecoupError
from recoup.network.wing import Card
from recoup.storage.files import write_atomically
from recoup.study.configs import parse_config
from recoup.study.hardware import Hardware, name_of
from recoup.study.machine import Machine
from recoup.study.measures import tables
from recoup.study.quality import NATS, TOP1, Quality
from recoup.study.recipe import Recipe
from recoup.study.rows import CostRow, DifferenceRow, FlipsRow, Frozen, NatsRow, Percent, PricedRow, Row, TextRow, Whole
from recoup.wings import cards

FILE = "results.json"
SCHEMA = 1


class AccuracyRow(Frozen):
    """One accuracy: of ``config`` (``float``, ``8-bit`` or a config's repr) in ``state``, calibrated with ``seed``.

    ``seed`` is null where no calibration image has a part in it; ``seconds`` is the time that repair and test took.
    """

    config: str
    state: str
    seed: int | None
    top1: Percent
    top5: Percent
    count: Annotated[int, Field(ge=1)]
    seconds: Annotated[float, Field(ge=0)]


class ShiftRow(Frozen):
    """How far a config moves the batch statistics that one BatchNorm layer sees.

    mean: average over channels of |mean_on - mean_off| / sqrt(stored variance); variance: geometric mean over
    channels of var_on / var_off. "Off" is 8 bit for NB-SMT, else float; both from the first seed's calibration images.
    """

    config: str
    layer: str
    mean: Annotated[float, Field(ge=0)]
    variance: Annotated[float, Field(ge=0)]


class Results(Frozen):
    """Everything a study measured, with what it takes to measure it again.

    ``tables`` holds the wings' own rows by the fields that their measures name (`recoup.study.measures`); results.json
    has each as a field beside ``accuracy``. ``hardware`` says, for every config that was measured, what the layers ran
    on: config -> number of layers (0: all, not counted). ``norms``: whether the network has batch norm statistics;
    ``untrained``: whether it is known to have none but initial weights; ``outputs`` and ``classes``: of the network and
    the data, where they are known. ``costs``: of every chip, where the recipe has policies.

    ``flips`` has the images that rows of ``accuracy`` answer otherwise than others; a pair of states that is not among
    them was not compared image by image, by an older recoup or on other images.

    Of a language model there is no ``accuracy``: ``nats`` has a row for each measurement, ``differences`` what rows
    lose against others window by window, ``text`` what a window is; ``test_images`` and ``calibration_images`` count
    windows. Other studies have none of the three in results.json.
    """

    schema_version: Literal[1] = SCHEMA
    date: str
    recipe: Recipe
    machine: Machine
    model_name: str
    parameters: int
    weights_sha256: str | None
    hardware: Mapping[str, Mapping[str, Whole]] = {}
    norms: bool = True
    untrained: bool = False
    outputs: int | None = None
    classes: int | None = None
    data_name: str
    test_images: int
    calibration_images: int
    augmented: bool
    accuracy: tuple[AccuracyRow, ...] = ()
    flips: tuple[FlipsRow, ...] = ()
    nats: tuple[NatsRow, ...] = ()
    differences: tuple[DifferenceRow, ...] = ()
    text: TextRow | None = None
    tables: Mapping[str, tuple[Any, ...]] = {}
    shifts: tuple[ShiftRow, ...]
    costs: tuple[PricedRow | CostRow, ...] = ()
    notes: tuple[str, ...]
    seconds: float

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, values: Any) -> Any:
        """The wings' tables from the fields they have in results.json."""
        if not isinstance(values, Mapping):
            return values
        if "tables" in values:
            return {**values, "tables": {name: rows for name, rows in values["tables"].items() if rows}}
        known = tables()
        rows = {name: _rows(name, values[name], known[name]) for name in known if values.get(name)}
        return {name: value for name, value in values.items() if name not in known} | {"tables": rows}

    @model_validator(mode="after")
    def _measured(self) -> "Results":
        if bool(self.accuracy) == bool(self.nats) or bool(self.nats) != (self.text is not None):
            raise ValueError("accuracy: must have rows, or nats and text must, and not both")
        return self

    @model_serializer(mode="wrap")
    def _spread(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The wings' tables as fields of their own, behind accuracy or nats."""
        spread: dict[str, Any] = {}
        absent = ("accuracy", "flips") if self.nats else ("nats", "differences", "text")
        for name, value in handler(self).items():
            if name in absent:
                continue
            if name == "tables":
                spread |= {table: [row.model_dump(mode="json") for row in rows] for table, rows in self.tables.items()}
            else:
                spread[name] = value
        return spread

    def hardware_of(self, config: Any) -> Hardware:
        """What the layers ran on under one of the recipe's configs or policies."""
        found = self.hardware.get(name_of(config))
        if found is None:
            return Hardware.plain(config)
        return Hardware(config, tuple((parse_config(name), count) for name, count in found.items()))

    @property
    def quality(self) -> Quality:
        """What networks are judged by."""
        return NATS if self.nats else TOP1

    @property
    def measured(self) -> Sequence[AccuracyRow | NatsRow]:
        """The rows of it."""
        return self.nats or self.accuracy

    @property
    def present(self) -> list[Hardware]:
        """That of every config of the recipe, and of every policy."""
        return [self.hardware_of(config) for config in self.recipe.chips]

    @property
    def wings(self) -> list[Card]:
        """The wings whose hardware layers ran on, in the order in which they were registered."""
        found = {type(config) for one in self.present for config in one.configs}
        return [card for config, card in cards().items() if config in found]

    def rows(self, table: str, config: str | None = None) -> list[Any]:
        """The rows of a wing's table, all or those of one config; none where the study has no such table."""
        return [row for row in self.tables.get(table, ()) if config is None or row.config == config]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return self.model_dump(mode="json")

    def save(self, folder: Path) -> Path:
        """Write results.json, whole or not at all."""
        path = folder / FILE
        write_atomically(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "Results":
        """Read and check the results.json of a folder.

        Raises:
            RecoupError: none there, or a file that is truncated, foreign or of another schema.
        """
        path = Path(folder) / FILE if Path(folder).is_dir() else Path(folder)
        try:
            content = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise RecoupError(f"{path}: no such file; a finished study leaves {FILE} in its folder") from None
        except OSError as error:
            raise RecoupError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise RecoupError(f"{path}: not JSON, or cut off ({error})") from None
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA:
            raise RecoupError(f"{path}: not results of this recoup (schema_version {version!r}, expected {SCHEMA})")
        try:
            results = cls.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = "".join(f"{part}." for part in first["loc"])[:-1]
            place += ": " if place else ""
            raise RecoupError(f"{path}: {place}{first['msg'].removeprefix('Value error, ')}") from None
        if not results.hardware and len(results.recipe.wings) > 1 and any(results.recipe.layers.values()):
            raise RecoupError(
                f"{path}: measured by an older recoup, which did not keep what its layer map makes a mix of; measure "
                "it again with --overwrite"
            )
        return results


def _rows(table: str, values: Any, kind: type[Row]) -> tuple[Any, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"{table}: must be a list of rows")
    rows = []
    for index, value in enumerate(values):
        try:
            rows.append(kind.model_validate(value))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in (table, index, *first["loc"]))
            raise ValueError(f"{place}: {first['msg']}") from None
    return tuple(rows)
