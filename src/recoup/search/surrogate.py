"""From one-layer damages to the damage of a network: how well they add up, measured on probes."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from recoup.knapsack import Quantity

POWERS = (1.0, 0.75, 0.5)
"""p of sum d^p. With 1 damages add; with 1/2 amplitudes do, as errors that all layers make alike."""
TRUSTED_ERROR, TRUSTED_RANK = 2.0, 0.9


@dataclass(frozen=True, slots=True)
class Probe:
    """A policy measured as a whole: the option of each group, what one-layer damages predict, and what was found, with
    half the width of its 95 % interval over samples (0 where the metric has none)."""

    label: str
    options: tuple[int, ...]
    measured: float
    predicted: float = math.nan
    half: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Surrogate:
    """The network's damage as factor * (sum over groups of d^power)^(1/power).

    Attributes:
        power: of `POWERS`, the one that predicts left-out probes best.
        factor: the geometric mean of measured over predicted.
        error: r: measured over predicted lies in [1/r, r] for every probe, each predicted from the others and with the
            interval that its samples leave; infinite where only one of the two is 0, None where fewer than two probes
            say anything.
        rank: Spearman's correlation of measured and predicted over the probes; None with fewer than three.
    """

    power: float
    factor: float
    error: float | None
    rank: float | None

    @property
    def trusted(self) -> bool:
        """Whether the probes say that predictions rank policies: error at most 2, rank correlation at least 0.9."""
        within = self.error is not None and self.error <= TRUSTED_ERROR
        return within and (self.rank is None or self.rank >= TRUSTED_RANK)

    def quantity(self, damages: Sequence[Sequence[float]]) -> Quantity:
        """What a knapsack minimises."""
        return Quantity([[damage**self.power for damage in row] for row in damages])

    def predict(self, damages: Sequence[Sequence[float]], options: Sequence[int]) -> float:
        """The damage of a policy."""
        total = math.fsum(row[option] ** self.power for row, option in zip(damages, options, strict=True))
        return self.factor * total ** (1 / self.power)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an infinite error is None, as one that was not measured: JSON has no infinity."""
        return asdict(self) | {"error": finite(self.error)}

    def __str__(self) -> str:
        if self.error is None:
            return "how damages add up was not measured: fewer than two probes say anything"
        rank = "" if self.rank is None else f", rank correlation {self.rank:.2f}"
        low, high = 1 / self.error, self.error
        text = f"measured / predicted within [{low:.2f}, {high:.2f}] on the probes{rank} (exponent {self.power:g})"
        return text if self.trusted else f"{text}: the damages do not add up well, so predictions rank poorly"


def fit(damages: Sequence[Sequence[float]], probes: Sequence[Probe]) -> tuple[Surrogate, tuple[Probe, ...]]:
    """The surrogate that predicts each probe best from the others, and the probes with what it predicts of them.

    For each power the factor is the geometric mean of measured over sum over the other probes; the power with the least
    mean |log(measured / predicted)| wins. Probes without damage, neither measured nor summed, say nothing and have no
    part; one with only one of the two is missed by any factor, so the error is infinite.

    Args:
        damages: of every group's options alone, 0 or more.
        probes: whole policies; with fewer than two of them, damages are taken to add up, with an error of None.
    """
    scored = []
    for power in POWERS:
        plain = Surrogate(power, 1.0, None, None)
        pairs = [(probe.measured, plain.predict(damages, probe.options)) for probe in probes]
        telling = [
            (found, sums, probe.half)
            for (found, sums), probe in zip(pairs, probes, strict=True)
            if found > 0 and sums > 0
        ]
        logs = np.array([math.log(found / sums) for found, sums, _ in telling])
        left_open = np.array([math.log1p(half / found) for found, _, half in telling])
        missed = sum((found > 0) != (sums > 0) for found, sums in pairs)
        if len(logs) + missed < 2:
            continue
        others = (logs.sum() - logs) / max(len(logs) - 1, 1)
        off = np.abs(logs - others) if len(logs) > 1 else np.zeros(1)
        factor = float(np.exp(logs.mean())) if len(logs) else 1.0
        error = math.inf if missed else float(np.exp((off + left_open).max()))
        scored.append((float(off.mean()), -power, Surrogate(power, factor, error, _rank(pairs))))
    best = min(scored, key=lambda entry: entry[:2])[2] if scored else Surrogate(1.0, 1.0, None, None)
    return best, tuple(replace(p, predicted=best.predict(damages, p.options)) for p in probes)


def finite(value: float | None) -> float | None:
    """A number as JSON has it: None where it is infinite."""
    return None if value is None or math.isinf(value) else value


def _rank(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's: the correlation of ranks, equal values sharing theirs."""
    if len(pairs) < 3:
        return None
    ranks = [_ranks([pair[side] for pair in pairs]) for side in (0, 1)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    array = np.array(values)
    return (array[:, None] > array).sum(1) + ((array[:, None] == array).sum(1) - 1) / 2
