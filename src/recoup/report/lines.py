"""One line of a report's table: what a config reaches in a state, what that gains and what the hardware lost."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from recoup.network.wing import FLOAT, Baseline
from recoup.study.intervals import Estimate, accuracy, difference, most_changed, of_windows
from recoup.study.measured import pairs
from recoup.study.quality import Quality, perplexity
from recoup.study.repairs import NONE
from recoup.study.results import AccuracyRow, Results
from recoup.study.rows import DifferenceRow, FlipsRow, NatsRow

Key = tuple[str, str]
"""A config and a state."""


@dataclass(frozen=True, slots=True)
class Line:
    """One result: of a config in a state.

    Attributes:
        reached: top-1 in percent, or nats.
        second: top-5 in percent, or the perplexity.
        gain: what is better than with the same config's float statistics, seed by seed: points of top-1, or nats less;
            None for those themselves.
        loss: what is worse on the config than on its wing's baseline, seed by seed; None if unmeasured.
        recovered: gain / what the config lost against its baseline, a share; None where no more was lost than is worth
            a repair (and than one test image), or no more than the test samples and seeds leave open.
        paired: whether gain and loss were taken sample by sample; else their intervals are the widest that the
            accuracies allow.
    """

    config: str
    title: str
    state: str
    reached: Estimate
    second: float
    gain: float | None
    gain_interval: Estimate | None
    loss: Estimate | None
    recovered: float | None
    paired: bool = True


def threshold(quality: Quality, count: int) -> float:
    """The loss up to which there is nothing to repair: what is worth it, and of images at least one."""
    return quality.worth if quality.paired else round(max(quality.worth, 100 / count), 6)


def lines_of(results: Results, titles: Mapping[str, str], compared: Mapping[str, Baseline]) -> tuple[Line, ...]:
    """The lines in the order measured.

    Args:
        results: a study's.
        titles: of configs and baselines, by the names of their rows.
        compared: what each config is compared with; baselines themselves have none to lose against.
    """
    found = _found(results)
    made = []
    for config, state in found.keys:
        baseline = compared.get(config)
        gain = found.gain(config, state) if state != NONE else None
        lost = None if baseline is None else found.loss(config, baseline.name)
        loss = 0.0 if lost is None else round(lost.mean, 6)
        sure = lost is not None and not lost.holds_zero and loss > threshold(results.quality, results.test_images)
        made.append(
            Line(
                config=config,
                title=titles.get(config, config),
                state=state,
                reached=found.reached(config, state),
                second=found.second(config, state),
                gain=None if gain is None else gain.mean,
                gain_interval=gain,
                loss=lost,
                recovered=gain.mean / loss if gain is not None and sure else None,
                paired=found.paired(config, state, baseline),
            )
        )
    return tuple(made)


def against_float(results: Results, config: str, state: str) -> Estimate | None:
    """What a config loses in a state against the float network on the same samples: points of top-1, or nats more,
    paired sample by sample."""
    return _found(results).beside(config, state, FLOAT.name)


def _found(results: Results) -> "_Accuracies | _Nats":
    if results.nats:
        return _Nats(results.nats, results.differences)
    return _Accuracies(results.accuracy, results.flips)


class _Accuracies:
    """Top-1 and top-5: differences are paired image by image where answers were kept."""

    def __init__(self, rows: Iterable[AccuracyRow], flips: Iterable[FlipsRow]) -> None:
        self._groups: dict[Key, list[AccuracyRow]] = {}
        self._flips: dict[tuple[Key, Key], list[FlipsRow]] = {}
        for row in rows:
            self._groups.setdefault((row.config, row.state), []).append(row)
        for flip in flips:
            self._flips.setdefault(((flip.config, flip.state), (flip.against, flip.against_state)), []).append(flip)

    @property
    def keys(self) -> list[Key]:
        """In order."""
        return list(self._groups)

    def reached(self, config: str, state: str) -> Estimate:
        """Top-1."""
        rows = self._groups[config, state]
        return accuracy([row.top1 for row in rows], rows[0].count)

    def second(self, config: str, state: str) -> float:
        """Top-5."""
        return fmean(row.top5 for row in self._groups[config, state])

    def gain(self, config: str, state: str) -> Estimate | None:
        """Over the bare hardware."""
        return self._apart((config, state), (config, NONE), -1)

    def loss(self, config: str, baseline: str) -> Estimate | None:
        """Of the bare hardware."""
        return self.beside(config, NONE, baseline)

    def beside(self, config: str, state: str, baseline: str) -> Estimate | None:
        """What is lost against a baseline."""
        return self._apart((config, state), (baseline, NONE), 1)

    def paired(self, config: str, state: str, baseline: Baseline | None) -> bool:
        """Whether flips are known of all that the state is compared with."""
        others = {(config, NONE)} | (set() if baseline is None else {(baseline.name, NONE)})
        there = [other for other in others if other != (config, state) and other in self._groups]
        return all(((config, state), other) in self._flips for other in there)

    def _apart(self, one: Key, other: Key, sign: int) -> Estimate | None:
        """What ``one`` loses against ``other``, or with sign -1 gains."""
        flips, rows = self._flips.get((one, other)), self._groups.get(one, [])
        if flips:
            points = [100 * sign * (flip.lost - flip.won) / flip.count for flip in flips]
            return difference(points, flips[0].count, [flip.lost + flip.won for flip in flips])
        both = pairs(rows, self._groups.get(other, []))
        points = [sign * (theirs.top1 - mine.top1) for mine, theirs in both]
        changed = [most_changed(mine.top1, theirs.top1, mine.count) for mine, theirs in both]
        return difference(points, rows[0].count, changed) if points else None


class _Nats:
    """Nats and perplexity: differences were measured window by window."""

    def __init__(self, rows: Iterable[NatsRow], differences: Sequence[DifferenceRow]) -> None:
        self._groups: dict[Key, list[NatsRow]] = {}
        self._differences = differences
        for row in rows:
            self._groups.setdefault((row.config, row.state), []).append(row)

    @property
    def keys(self) -> list[Key]:
        """In order."""
        return list(self._groups)

    def reached(self, config: str, state: str) -> Estimate:
        """Nats."""
        rows = self._groups[config, state]
        return of_windows([row.nats for row in rows], [row.high - row.nats for row in rows])

    def second(self, config: str, state: str) -> float:
        """Perplexity: the geometric mean over seeds, which belongs to the mean of the nats."""
        return perplexity(self.reached(config, state).mean)

    def gain(self, config: str, state: str) -> Estimate | None:
        """Nats less than on the bare hardware."""
        return self._apart(config, state, config, -1)

    def loss(self, config: str, baseline: str) -> Estimate | None:
        """Nats more on the bare hardware."""
        return self.beside(config, NONE, baseline)

    def beside(self, config: str, state: str, baseline: str) -> Estimate | None:
        """Nats more than a baseline has."""
        return self._apart(config, state, baseline, 1)

    def paired(self, config: str, state: str, baseline: Baseline | None) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def _apart(self, config: str, state: str, against: str, sign: int) -> Estimate | None:
        wanted = (config, state, against, NONE)
        rows = [r for r in self._differences if (r.config, r.state, r.against, r.against_state) == wanted]
        if not rows:
            return None
        return of_windows([sign * row.nats for row in rows], [row.half for row in rows], -float("inf"))
