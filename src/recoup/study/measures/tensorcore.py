"""Tensor cores beside accuracy: what their adders cut from the sums of every layer."""

from typing import Annotated, Any

from pydantic import Field

from recoup.study.lab import Lab
from recoup.study.rows import Rate, Row, Whole
from recoup.tensorcore.config import TensorCore
from recoup.tensorcore.profiling import profile

ADDER_OUTPUTS = 512  # sampled outputs a layer


class AdderRow(Row):
    """One layer on a tensor core, without repair, on calibration images of the first seed.

    The fields are those of `recoup.tensorcore.profiling.LayerProfile`; shares lie in 0..1.
    """

    name: str
    kind: str
    terms: Whole
    group: Whole
    fraction: Whole
    outputs: Whole
    cut: Rate
    lost: Rate
    overflowed: Rate
    slope: float | None
    residual: Annotated[float, Field(ge=0)] | None
    error: Annotated[float, Field(ge=0)] | None


ROWS = {"adders": AdderRow}


def measure(lab: Lab, config: TensorCore, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The per-layer figures of a tensor core without repair."""
    batches = lab.profiled(config, seed)
    adders = profile(lab.model, batches, outputs=ADDER_OUTPUTS) if lab.recipe.profile_images else []
    return {"adders": [adder.to_dict() for adder in adders]}
