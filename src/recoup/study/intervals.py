"""What repeated measurements say: mean, spread and a 95 % confidence interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from recoup.errors import RecoupError

Kind = Literal["t", "wilson"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 95 % confidence interval, in the unit of the values.

    Attributes:
        mean: of the values.
        std: their sample standard deviation; None for a single value.
        low, high: the interval.
        kind: ``t``: Student's t over the seeds (how much the choice of calibration images matters); ``wilson``:
            Wilson's score over the test images of a single run (how much the choice of test images matters).
        runs: how many values.
    """

    mean: float
    std: float | None
    low: float
    high: float
    kind: Kind
    runs: int

    @property
    def half(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2


def over_seeds(values: Sequence[float]) -> Estimate:
    """mean +- t(0.975, n - 1) * s / sqrt(n) over n >= 2 values, one a seed."""
    from scipy.special import stdtrit  # scipy.stats has the same function but takes a second to import

    if len(values) < 2:
        raise RecoupError(f"a t interval needs two values or more; got {len(values)}")
    mean, std = fmean(values), stdev(values)
    half = float(stdtrit(len(values) - 1, 0.975)) * std / len(values) ** 0.5
    return Estimate(mean, std, mean - half, mean + half, "t", len(values))


def of_test_set(percent: float, count: int) -> Estimate:
    """The Wilson score interval of an accuracy in percent, measured once on ``count`` images."""
    from recoup.evaluation import Accuracy

    low, high = Accuracy(percent, percent, count).interval
    return Estimate(percent, None, low, high, "wilson", 1)


def accuracy(percents: Sequence[float], count: int) -> Estimate:
    """The accuracies of one state: over seeds where there are several, otherwise over the test set."""
    return over_seeds(percents) if len(percents) > 1 else of_test_set(percents[0], count)
