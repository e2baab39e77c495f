"""Learning rates as functions of the step alone, so that a resumed run needs no state of them."""

import math
from collections.abc import Callable
from typing import Literal, get_args

from recoup.errors import RecoupError

Schedule = Literal["constant", "cosine", "linear"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)


def schedule(name: str, steps: int, warm_up: int = 0) -> Callable[[int], float]:
    """The factor of the base learning rate at step 0 .. steps - 1.

    It rises linearly over the first ``warm_up`` steps, from 1/warm_up to 1; then with t from 0 to 1

        constant 1,   linear 1 - t,   cosine (1 + cos(pi t)) / 2

    Raises:
        RecoupError: an unknown name, a warm-up as long as the run.

    >>> [round(schedule("cosine", 4)(step), 3) for step in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    if name not in SCHEDULES:
        raise RecoupError(f"schedule {name!r}: must be one of {', '.join(SCHEDULES)}")
    if not 0 <= warm_up <= max(steps - 1, 0):
        raise RecoupError(
            f"warm_up {warm_up}: must be 0 to {max(steps - 1, 0)}, less than the {steps} steps of the stage"
        )

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        t = (step - warm_up) / max(steps - warm_up, 1)
        return {"constant": 1.0, "linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2}[name]

    return factor
