"""What networks lose against another on the same samples, with the interval that samples and draws leave."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from recoup.errors import RecoupError
from recoup.network.answers import Answers, Flips
from recoup.network.meters import METERS, over_samples
from recoup.study.intervals import Estimate, difference, most_changed, over_seeds

Found = Mapping[str, Any]
"""A metric's part of a measurement: value, count, interval; what networks are compared by sample by sample: samples and
labels of nats, answers of top1."""


def loss(name: str, ones: Sequence[Found], others: Sequence[Found], *, rises: bool) -> Estimate:
    """How much worse networks are than another, one value a draw.

    Networks are compared sample by sample: nats window by window of a text, accuracies image by image as
    `recoup.study.intervals.difference` says; where answers were not kept, with the widest interval that the accuracies
    allow. A distance from the other is its own measure. Of a measure of the user's own the samples are not known: the
    interval is its own, which knows nothing of what the two have in common. The draws' part adds as squares.

    Args:
        name: of the metric.
        ones, others: what was measured, draw by draw.
        rises: whether more of it is better.

    Raises:
        RecoupError: measurements of other samples.
    """
    sign = -1 if rises else 1
    if "samples" in ones[0]:
        pairs = [_paired(one, other) for one, other in zip(ones, others, strict=True)]
        return _estimate([sign * mean for mean, _ in pairs], [half for _, half in pairs])
    values = [sign * (one["value"] - other["value"]) for one, other in zip(ones, others, strict=True)]
    if name == "top1":
        found, count = flips(ones, others), ones[0]["count"]
        if found:
            return difference([one.points for one in found], count, [one.changed for one in found])
        changed = [most_changed(one["value"], other["value"], count) for one, other in zip(ones, others, strict=True)]
        return difference(values, count, changed)
    return _estimate(values, [half_of(one) for one in ones])


def flips(ones: Sequence[Found], others: Sequence[Found]) -> tuple[Flips, ...]:
    """The images that networks answer otherwise than another, draw by draw; none where answers were not kept.

    Raises:
        RecoupError: measurements of other samples.
    """
    if not all("answers" in found for found in (*ones, *others)):
        return ()
    pairs = zip(ones, others, strict=True)
    try:
        return tuple(
            Answers.from_dict(one["answers"]).flips(Answers.from_dict(other["answers"])) for one, other in pairs
        )
    except RecoupError as error:
        raise RecoupError(f"search: {error}") from None


def _estimate(values: Sequence[float], halves: Sequence[float]) -> Estimate:
    """Over the samples of the draws, whose mean half width it is, and over the draws; the two add as squares."""
    mean = fmean(values)
    seeds = over_seeds(values) if len(values) > 1 else None
    half = math.hypot(fmean(halves), 0.0 if seeds is None else seeds.half)
    kind = "normal" if seeds is None else "t"
    return Estimate(mean, None if seeds is None else seeds.std, mean - half, mean + half, kind, len(values))


def half_of(one: Found) -> float:
    """Half the interval of a measure by itself; 0 where it has none."""
    return (one["interval"][1] - one["interval"][0]) / 2 if one["interval"] else 0.0


def half_of_damage(name: str, one: Found, base: Found) -> float:
    """Half of what the samples leave open of a damage: of a distance its own, of nats and top1 that of the difference
    sample by sample; 0 of others, whose own interval is not that of a difference on the same samples."""
    if "samples" in one:
        return _paired(one, base)[1]
    if name == "top1":
        return loss(name, [one], [base], rises=True).half
    return half_of(one) if name in METERS and METERS[name].relative else 0.0


def _paired(one: Found, other: Found) -> tuple[float, float]:
    """The mean difference, and half its interval."""
    if one["labels"] != other["labels"]:
        raise RecoupError("search: two measurements are of other samples, so their difference says nothing")
    means = [torch.tensor(found["samples"], dtype=torch.float64) for found in (one, other)]
    return over_samples(means[0] - means[1], torch.tensor(one["labels"], dtype=torch.float64).expand_as(means[0]))
