"""The control of one output on the multiply-add unit: chunk by chunk, cycle by cycle."""

from collections.abc import Iterable

import numpy as np


def output(names: Iterable[str], chunk: int, shared: bool, steps: int) -> dict[str, np.ndarray]:
    """The first ``steps`` cycles, uint64 [steps], of those of the ports first, outer and start that a unit has.

    Args:
        names: of the ports.
        chunk: terms of a chunk.
        shared: whether a chunk's sum is added in a cycle of its own, else beside the next chunk's first term.
        steps: how many cycles.
    """
    step = np.arange(steps)
    place, period = step % (chunk + shared), chunk + shared
    found = {
        "first": (place == 0) | (shared & (step == chunk)),
        "outer": (step > 0) & (place == chunk % period),
        "start": step == chunk,
    }
    return {name: found[name].astype(np.uint64) for name in names}
