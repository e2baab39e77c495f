"""What studies over seeds share: differences of runs that have the same seeds."""

import statistics
from collections.abc import Sequence

from recoup.study.intervals import over_seeds


def gap(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Mean of ``values - reference``, seed by seed, and the half width of its 95 % t interval."""
    found = over_seeds([a - b for a, b in zip(values, reference, strict=True)])
    return found.mean, found.half


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"
