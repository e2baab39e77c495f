"""NB-SMT beside accuracy: collisions and errors layer by layer, and the array's cycles."""

from typing import Annotated, Any

from pydantic import Field

from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.cost import Array, cycles
from recoup.nbsmt.profiling import profile
from recoup.study.lab import Lab
from recoup.study.rows import Rate, Row, Whole


class LayerRow(Row):
    """One layer under one config, without repair, on calibration images of the first seed.

    The fields are those of `recoup.nbsmt.profiling.LayerProfile`; rates and shares lie in 0..1.
    """

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
    overflowed: Rate = 0.0


class CycleRow(Row):
    """What one call of a layer costs for one image on the recipe's array under one config.

    The fields are those of `recoup.nbsmt.cost.LayerCost`; ``single``: cycles with one thread. Layers that are left in
    float are counted as 8-bit arithmetic with one thread.
    """

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


ROWS = {"layers": LayerRow, "cycles": CycleRow}


def measure(lab: Lab, config: NBSMT, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The per-layer figures without repair, on the first calibration images of a seed, and the cycles of one image."""
    batches = lab.profiled(config, seed)
    array = Array(lab.recipe.array.rows, lab.recipe.array.columns)
    cost = cycles(lab.model, next(iter(batches))[0][:1], array)
    layers = profile(lab.model, batches) if lab.recipe.profile_images else []
    return {"layers": [layer.to_dict() for layer in layers], "cycles": [layer.to_dict() for layer in cost.layers]}
