"""LightNorm beside accuracy: what every norm moves to and from memory in training."""

from typing import Any

from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.cost import traffic
from recoup.study.lab import Lab
from recoup.study.rows import Row, Whole


class TrafficRow(Row):
    """What one call of a norm moves for one image in a training step under one config, in bits.

    The fields are those of `recoup.lightnorm.cost.LayerTraffic`: a model, counted from shapes.
    """

    name: str
    kind: str
    emulated: bool
    channels: Whole
    elements: Whole
    conventional: Whole
    ranges: Whole
    formats: Whole
    blocks: Whole
    over: str = "batch"


ROWS = {"traffic": TrafficRow}


def measure(lab: Lab, config: LightNorm, seed: int) -> dict[str, list[dict[str, Any]]]:
    """What every norm moves for one image in a training step: a model, from shapes."""
    batches = lab.profiled(config, seed)
    return {"traffic": [layer.to_dict() for layer in traffic(lab.model, next(iter(batches))[0][:1]).layers]}
