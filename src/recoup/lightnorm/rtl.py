"""LightNorm's units in gates, by name: the forward and the backward one of a batch norm, those of norms of rows."""

import numpy as np

from recoup.errors import RecoupError
from recoup.gates.module import Inputs, Module
from recoup.lightnorm.backward_unit.unit import Backward
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.row_unit.unit import KINDS, Rows
from recoup.lightnorm.rtl_forward import Forward

__all__ = ["build"]


UNITS = ("forward", "backward", "layer", "rms")


def build(config: LightNorm, *, elements: int = 1 << 17, eps: float = 1e-5, unit: str = "forward") -> Module:
    """A unit of a config, bit-identical to `recoup.lightnorm.reference` in training, of rows to that of `rows`.

    Args:
        config: formats, blocks along channels, K.
        elements: the most elements of a channel. A run of the forward unit has any multiple of K from 2 K up to it;
            the backward unit takes chunks of two lengths as well.
        eps: what is added to s; the backward unit has 1/s from the forward pass.
        unit: "forward"; "backward" for the gradients (`recoup.lightnorm.backward_unit`); "layer" and "rms" for the
            forward pass of norms of rows (`recoup.lightnorm.row_unit`), whose channel is a row of any multiple of K
            and the block up to ``elements``, and whose blocks lie along it; a repair's gain is not in it.

    Raises:
        RecoupError: a config that has no such unit: ``forward``, ``backward`` or ``statistics`` None, blocks along
            places; an eps that is not positive; too few elements; no such unit; formats too wide for the backward
            unit's letter; an RMS norm with a scale that is not "gaussian".
    """
    if unit not in UNITS:
        raise RecoupError(f"lightnorm.rtl.build(unit={unit!r}): must be {' or '.join(map(repr, UNITS))}")
    if unit in KINDS:
        return Rows.of_kind(unit, config, elements, eps).module()
    return (Backward if unit == "backward" else Forward).of(config, elements, eps).module()


def typical(config: LightNorm, lanes: int, steps: int, generator: np.random.Generator) -> Inputs:
    """Inputs of the forward unit: the first half of the steps in pass 1, the others in pass 2, on normal elements of
    mean 0 and deviation 1 in F, gamma and beta N(1, 1/4) and N(0, 1/2), with mu 0 and r 1. The divider idles."""
    return Forward.of(config, 1 << 17, 1e-5).ordinary(lanes, steps, generator)
