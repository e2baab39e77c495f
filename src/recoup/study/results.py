"""What a study found, as results.json holds it."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recoup.errors import RecoupError
from recoup.storage.files import write_atomically
from recoup.study.recipe import Recipe

FILE = "results.json"
SCHEMA = 1

Percent = Annotated[float, Field(ge=0, le=100)]
Rate = Annotated[float, Field(ge=0, le=1)]
Whole = Annotated[int, Field(ge=0)]


class Frozen(BaseModel):
    """Frozen, finite numbers only, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Machine(Frozen):
    """Where the study ran, and by which path: all paths give the same bits, not the same speed."""

    cpu: str
    cores: int
    torch_threads: int
    device: str
    backend: str
    isa: str
    reason: str
    system: str
    python: str
    torch: str
    recoup: str


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


class LayerRow(Frozen):
    """One layer under one config, without repair, on calibration images of the first seed.

    The fields are those of `recoup.nbsmt.profiling.LayerProfile`; rates and shares lie in 0..1.
    """

    config: str
    name: str
    kind: str
    weight_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    threads: int
    policy: str
    macs: Whole
    collisions: Rate
    lossy: Rate
    utilization: Rate
    error: Annotated[float, Field(ge=0)]
    mean_shift: Annotated[float, Field(ge=0)]
    zero_activations: Rate
    wide_activations: Rate
    saturated: Rate
    zero_weights: Rate
    wide_weights: Rate


class CycleRow(Frozen):
    """What one call of a layer costs for one image on the recipe's array under one config.

    The fields are those of `recoup.nbsmt.cost.LayerCost`; ``single``: cycles with one thread. Layers that are left in
    float are counted as 8-bit arithmetic with one thread.
    """

    config: str
    name: str
    emulated: bool
    threads: int
    M: Whole
    C: Whole
    N: Whole
    taps: Whole
    groups: Whole
    cycles: Whole
    single: Whole
    macs: Whole
    activation_bytes: Whole
    weight_bytes: Whole
    output_bytes: Whole


class ShiftRow(Frozen):
    """How far a config moves the batch statistics that one BatchNorm layer sees.

    mean: average over channels of |mean_on - mean_off| / sqrt(stored variance); variance: geometric mean over
    channels of var_on / var_off. "Off" is 8 bit for NB-SMT, else float; both from the first seed's calibration images.
    """

    config: str
    layer: str
    mean: Annotated[float, Field(ge=0)]
    variance: Annotated[float, Field(ge=0)]


class UnitRow(Frozen):
    """One layer on a narrow accumulator, without repair, on calibration images of the first seed.

    The fields are those of `recoup.lba.profiling.LayerProfile`; shares lie in 0..1.
    """

    config: str
    name: str
    kind: str
    terms: Whole
    chunk: Whole
    bits: Whole
    outputs: Whole
    underflowed: Rate
    swamped: Rate
    saturated: Rate
    overflowed: Rate
    slope: float
    residual: Annotated[float, Field(ge=0)]
    error: Annotated[float, Field(ge=0)]


class TrafficRow(Frozen):
    """What one call of a batch norm moves for one image in a training step under one config, in bits.

    The fields are those of `recoup.lightnorm.cost.LayerTraffic`: a model, counted from shapes.
    """

    config: str
    name: str
    kind: str
    emulated: bool
    channels: Whole
    elements: Whole
    conventional: Whole
    ranges: Whole
    formats: Whole
    blocks: Whole


class Results(Frozen):
    """Everything a study measured, with what it takes to measure it again."""

    schema_version: Literal[1] = SCHEMA
    date: str
    recipe: Recipe
    machine: Machine
    model_name: str
    parameters: int
    weights_sha256: str | None
    data_name: str
    test_images: int
    calibration_images: int
    augmented: bool
    accuracy: tuple[AccuracyRow, ...]
    layers: tuple[LayerRow, ...]
    cycles: tuple[CycleRow, ...]
    shifts: tuple[ShiftRow, ...]
    units: tuple[UnitRow, ...] = ()
    traffic: tuple[TrafficRow, ...] = ()
    notes: tuple[str, ...]
    seconds: float

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
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise RecoupError(f"{path}: {place}: {first['msg'].removeprefix('Value error, ')}") from None
