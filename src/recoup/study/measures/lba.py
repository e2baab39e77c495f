"""LBA beside accuracy: what narrow accumulators do to the sums of every layer."""

from typing import Annotated, Any

from pydantic import Field

from recoup.lba.config import LBA
from recoup.lba.profiling import profile
from recoup.study.lab import Lab
from recoup.study.rows import Rate, Row, Whole

UNIT_OUTPUTS = 512  # sampled outputs a layer; every one takes K reference steps


class UnitRow(Row):
    """One layer on a narrow accumulator, without repair, on calibration images of the first seed.

    The fields are those of `recoup.lba.profiling.LayerProfile`; shares lie in 0..1.
    """

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
    cannot_saturate: bool | None = None


ROWS = {"units": UnitRow}


def measure(lab: Lab, config: LBA, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The per-layer figures of a narrow accumulator without repair."""
    batches = lab.profiled(config, seed)
    units = profile(lab.model, batches, outputs=UNIT_OUTPUTS) if lab.recipe.profile_images else []
    return {"units": [unit.to_dict() for unit in units]}
