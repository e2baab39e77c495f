"""What repeated measurements say: mean, spread and a 95 % confidence interval, within what is possible."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from recoup.errors import RecoupError
from recoup.network.answers import Z, paired_interval

Kind = Literal["t", "wilson", "normal"]
MARKS: dict[str, str] = {"t": "t", "wilson": "W", "normal": "N"}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 95 % confidence interval, in the unit of the values; the interval is never of zero width.

    Attributes:
        mean: of the values.
        std: their sample standard deviation; None for a single value.
        low, high: the interval, ``low <= mean <= high``.
        kind: ``t``: Student's t over the seeds (how much the choice of calibration images matters) combined with the
            test images' own resolution; ``wilson``: that resolution alone, Wilson's score over the test images of a
            single run (how much the choice of test images matters); ``normal``: the same over windows of a text.
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

    @property
    def mark(self) -> str:
        """The kind as a letter."""
        return MARKS[self.kind]

    @property
    def holds_zero(self) -> bool:
        """Whether the values may as well be 0."""
        return self.low <= 0 <= self.high


def over_seeds(values: Sequence[float]) -> Estimate:
    """mean +- t(0.975, n - 1) * s / sqrt(n) over n >= 2 values, one a seed: without the test images' resolution."""
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
    """The accuracies of one state, in percent: over the test images, and over seeds where there are several.

    Seeds share their test images, so however well they agree, those images resolve no more than Wilson's interval of
    the mean says. The two are independent and their distances from the mean add as squares:
    ``low = mean - sqrt((mean - low_t)^2 + (mean - low_wilson)^2)``, ``high`` alike, cut to [0, 100] [our definition;
    distances of intervals are combined so by Zou and Donner's MOVER, Statistics in Medicine 27, 2008].

    >>> estimate = accuracy([91.5, 91.5], 10_000)
    >>> round(estimate.low, 2), round(estimate.high, 2)
    (90.94, 92.03)
    """
    images = of_test_set(fmean(percents), count)
    return _combined(percents, images.low, images.high, (0.0, 100.0))


def difference(points: Sequence[float], count: int, changed: Sequence[float]) -> Estimate:
    """Differences between two accuracies on the same images, in points: over the images, and over seeds if several.

    Paired image by image: the interval over the images is `recoup.network.answers.paired_interval`, of the mean
    difference and the mean of ``changed``; of one seed it is that of `recoup.network.answers.Flips`. Even where all
    changed images changed alike, fewer than five may as well be none. Combined with the seeds as in `accuracy`, cut to
    [-100, 100] [our definition].

    Args:
        points: a difference a seed.
        count: images.
        changed: how many of them are right in one of the two and wrong in the other, lost and won together, a number a
            seed; where answers were not kept, `most_changed` of the two accuracies, which makes the interval too wide
            rather than too narrow.

    Raises:
        RecoupError: fewer changed than a difference needs, or more than there are.

    >>> difference([1.0], 1000, [10]).holds_zero, difference([1.0], 1000, [70]).holds_zero
    (False, True)
    """
    mean = round(fmean(points), 6)  # accuracies are quotients, rounded
    for one, many in zip(points, changed, strict=True):
        if not abs(one) / 100 * count - 0.01 <= many <= count + 0.01:
            raise RecoupError(
                f"a difference of {one:g} points on {count:,} images: {many:,} of them cannot have changed"
            )
    low, high = paired_interval(mean / 100 * count, fmean(changed), count)
    return _combined(points, low, high, (-100.0, 100.0))


def most_changed(one: float, other: float, count: int) -> float:
    """How many of ``count`` images two accuracies in percent can answer differently: as many as both have wrong, no
    image twice, or as many as both have right.

    >>> most_changed(91.0, 90.0, 1000), most_changed(20.0, 10.0, 1000)
    (190.0, 300.0)
    """
    right = round((one + other) / 100 * count, 6)
    return min(right, 2 * count - right)


def of_windows(values: Sequence[float], halves: Sequence[float], least: float = 0.0) -> Estimate:
    """Means over windows of a text, with half their intervals over the windows; over seeds where there are several.

    Seeds share their windows, so half the interval over those is the mean of the halves; combined with the seeds as in
    `accuracy`, cut at ``least``.

    >>> of_windows([1.5], [0.25])
    Estimate(mean=1.5, std=None, low=1.25, high=1.75, kind='normal', runs=1)
    """
    mean, half = fmean(values), fmean(halves)
    return _combined(values, mean - half, mean + half, (least, math.inf), "normal")


def half_width(values: Sequence[float]) -> float:
    """Half the 95 % normal interval of a mean over windows, 1.96 s / sqrt(n); 0 where the windows do not differ.

    Raises:
        RecoupError: fewer than two windows.
    """
    if len(values) < 2:
        raise RecoupError(f"an interval over windows needs two or more; got {len(values)}")
    return Z * stdev(values) / len(values) ** 0.5


def _combined(
    values: Sequence[float], low: float, high: float, legal: tuple[float, float], single: Kind = "wilson"
) -> Estimate:
    """An interval over images, widened by the spread of several values."""
    mean = fmean(values)
    if len(values) == 1:
        return Estimate(mean, None, max(min(low, mean), legal[0]), min(max(high, mean), legal[1]), single, 1)
    seeds = over_seeds(values)
    below, above = ((seeds.half**2 + max(distance, 0.0) ** 2) ** 0.5 for distance in (mean - low, high - mean))
    low, high = max(mean - below, legal[0]), min(mean + above, legal[1])
    return Estimate(mean, seeds.std, min(low, mean), max(high, mean), "t", len(values))
