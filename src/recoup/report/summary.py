"""What results mean: estimates, gains and the verdict in plain words. Terminal, HTML and CSV all read this."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from recoup.network.wing import FLOAT, Baseline
from recoup.report.chapters import chapter_of
from recoup.study.doubts import doubts
from recoup.study.hardware import Hardware, Quoted, references
from recoup.study.intervals import Estimate, accuracy, difference, of_test_set
from recoup.study.repairs import NONE
from recoup.study.results import AccuracyRow, Results
from recoup.wings import wing_of

WORTH_REPAIRING = 0.1  # points; of a smaller loss, or of a single image, the share won back says nothing

SPACE = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True, slots=True)
class Line:
    """One accuracy: of a config in a state.

    Attributes:
        top1, top5: percent.
        gain: points of top1 over the same config's float statistics, seed by seed; None for those themselves.
        loss: points of top1 that the config lost against its wing's baseline, seed by seed; None if unmeasured.
        recovered: gain / what the config lost against its baseline, a share; None where at most 0.1 points or one test
            image were lost, or no more than the test images and seeds leave open.
    """

    config: str
    title: str
    state: str
    top1: Estimate
    top5: float
    gain: float | None
    gain_interval: Estimate | None
    loss: Estimate | None
    recovered: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """The whole study: `lines` in the order measured, one verdict a config.

    ``resolution`` is half the width of the best accuracy's Wilson interval, ``threshold`` the loss up to which there is
    nothing to repair; both in points. ``images`` is how many test images there were; ``baselines`` is what each
    config, by its name, is compared with. ``doubts`` are sentences about why the accuracies may say nothing;
    ``guessing`` is whether the float network is no better than chance, as far as the test images resolve it.
    """

    lines: tuple[Line, ...]
    verdicts: tuple[str, ...]
    resolution: float
    threshold: float
    seeds: int
    images: int
    baselines: Mapping[str, Baseline]
    doubts: tuple[str, ...] = ()
    guessing: bool = False

    @property
    def configs(self) -> list[str]:
        """What was measured, in order: baselines and configs by the names that their rows have."""
        return list(dict.fromkeys(line.config for line in self.lines))

    def line(self, config: str, state: str) -> Line | None:
        """The line of a config and state, if it was measured."""
        return next((line for line in self.lines if (line.config, line.state) == (config, state)), None)

    def of(self, config: str) -> list[Line]:
        """The lines of a config."""
        return [line for line in self.lines if line.config == config]


def summarize(results: Results) -> Summary:
    """Derive everything the reports show from what was measured."""
    present = {one.name: one for one in results.present}
    compared = references(list(present.values()))
    titles = {b.name: b.title for b in baselines(results)} | {name: one.title for name, one in present.items()}
    groups: dict[tuple[str, str], list[AccuracyRow]] = {}
    for row in results.accuracy:
        groups.setdefault((row.config, row.state), []).append(row)
    lines = tuple(_line(groups, name, state, titles.get(name, name), compared.get(name)) for name, state in groups)
    count, best = results.test_images, max(line.top1.mean for line in lines)
    resolution, threshold = of_test_set(best, count).half, _threshold(count)
    measured = [one for name, one in present.items() if any(line.config == name for line in lines)]
    chance = 0.0 if not results.classes else 100 / results.classes
    floating = next((line for line in lines if (line.config, line.state) == (FLOAT.name, NONE)), None)
    guessing = floating is not None and results.classes is not None and floating.top1.low <= chance
    said = doubts(results.untrained, results.outputs, results.classes)
    if floating is not None and guessing:
        said.append(
            f"In float the network has {percent(floating.top1.mean)}, and guessing among {results.classes} classes "
            f"gives {percent(chance)}: it does not know these images, so no accuracy says anything about hardware."
        )
    seeds = len(results.recipe.calibration.seeds)
    silent = Summary(
        lines, (), resolution, threshold, seeds, count, compared, tuple(said), guessing or results.untrained
    )
    verdicts = (verdict(silent, one, saving(results, one)) for one in measured)
    return replace(silent, verdicts=tuple(verdicts))


def baselines(results: Results) -> list[Baseline]:
    """The float network, and the other baselines of the hardware that was measured, each once."""
    found = {FLOAT.name: FLOAT}
    for baseline in references(results.present).values():
        found.setdefault(baseline.name, baseline)
    return list(found.values())


def compared_titles(results: Results) -> list[str]:
    """The titles of what losses are taken against."""
    return list(dict.fromkeys(baseline.title for baseline in references(results.present).values()))


def saving(results: Results, hardware: Hardware) -> str:
    """What hardware saves, as a piece of its verdict: of a mix, what each of its wings saves."""
    return " and".join(filter(None, (chapter_of(card).saving(results, hardware.config) for card in hardware.cards)))


def verdict(summary: Summary, hardware: Hardware, saving: str = "") -> str:
    """One sentence: the baseline's accuracy, what becomes of it, with which saving, and what repair wins back."""
    name, title = hardware.name, hardware.title
    baseline = summary.baselines[name]
    before, bare = summary.line(baseline.name, NONE), summary.line(name, NONE)
    line = quoted_line(summary, hardware)
    if before is None or bare is None:
        return f"{title}: {percent(line.top1.mean)} ({line.state}){saving}."
    loss = _loss(before, bare)
    noise = f"within noise of {summary.images:,} images"
    text = f"{title}: {percent(before.top1.mean)} {baseline.phrase}"
    if summary.guessing:
        return f"{text}, {percent(bare.top1.mean)} on it{saving}; from a network that guesses nothing follows."
    if loss <= summary.threshold:
        same = percent(before.top1.mean) == percent(bare.top1.mean)
        text += f" {'stays' if same else 'becomes'} {percent(bare.top1.mean)}{saving}"
        within = not same and abs(loss) <= summary.resolution
        return f"{text}, {noise}; there is nothing to repair." if within else f"{text}; there is nothing to repair."
    text += f" falls to {percent(bare.top1.mean)}{saving}"
    if not _lost(summary, before, bare):
        return f"{text}; the loss is {noise}."
    return f"{text}; {_won_back(hardware, bare, None if line is bare else line, noise)}."


def quoted_line(summary: Summary, hardware: Hardware) -> Line:
    """The accuracy that a verdict ends on, for whatever shows one accuracy of measured hardware.

    The bare hardware's where nothing is to be repaired, the loss is within noise, the network guesses or no repair was
    measured; else that of the repair which the cards prefer.
    """
    name = hardware.name
    before, bare = summary.line(summary.baselines[name].name, NONE), summary.line(name, NONE)
    repaired = next((line for state in hardware.quoted if (line := summary.line(name, state))), None)
    if before is None or bare is None:
        return repaired or summary.of(name)[0]
    if repaired is None or summary.guessing or not _lost(summary, before, bare):
        return bare
    return repaired


def quoted_of(summary: Summary) -> Quoted:
    """State and top-1 of `quoted_line`, or of the baseline of a hardware's unit, for chapters that join accuracy."""

    def quoted(hardware: Hardware, baseline: bool) -> tuple[str, float | None]:
        if not summary.of(hardware.name):
            return NONE, None  # not measured yet
        if not baseline:
            line = quoted_line(summary, hardware)
            return line.state, line.top1.mean
        own = wing_of(hardware.configs[0], "report").baseline.name
        found = summary.line(own, NONE) or summary.line(summary.baselines[hardware.name].name, NONE)
        return NONE, None if found is None else found.top1.mean

    return quoted


def _loss(before: Line, bare: Line) -> float:
    return round(before.top1.mean - bare.top1.mean, 6)  # accuracies are quotients, rounded


def _lost(summary: Summary, before: Line, bare: Line) -> bool:
    """Whether hardware costs accuracy, as far as the test images and seeds resolve it."""
    unsure = bare.loss is not None and bare.loss.holds_zero
    return _loss(before, bare) > max(summary.threshold, summary.resolution) and not unsure


def _won_back(hardware: Hardware, bare: Line, repaired: Line | None, noise: str) -> str:
    """The verdict's last piece: what repair brings, as far as the gain's interval supports it."""
    if repaired is None:
        return "no repair was measured"
    how, now = hardware.sentence(repaired.state), percent(repaired.top1.mean)
    if repaired.gain_interval is not None and repaired.gain_interval.holds_zero:
        return f"what {how} changes is {noise} ({now})"
    if repaired.top1.mean <= bare.top1.mean:
        return f"{how} does not help ({now})"
    share = repaired.recovered or 0.0
    won = "all of the loss" if share >= 0.995 else f"{100 * share:.0f}{SPACE}% of the loss"
    return f"{how} brings back {won} ({now})"


def percent(value: float) -> str:
    """An accuracy as text.

    >>> percent(91.6).split()
    ['91.60', '%']
    """
    return f"{value:.2f}{SPACE}%"


def _line(
    groups: dict[tuple[str, str], list[AccuracyRow]], config: str, state: str, name: str, baseline: Baseline | None
) -> Line:
    """One line of the table; baselines themselves have none to lose against."""
    rows, bare = groups[config, state], groups.get((config, NONE), [])
    gains = _differences(rows, bare) if state != NONE else []
    losses = [] if baseline is None else _differences(groups.get((baseline.name, NONE), []), bare)
    loss = round(fmean(losses), 6) if losses else 0.0
    gain = fmean(gains) if gains else None
    lost = difference(losses, rows[0].count) if losses else None
    sure = lost is not None and not lost.holds_zero and loss > _threshold(rows[0].count)
    return Line(
        config=config,
        title=name,
        state=state,
        top1=accuracy([row.top1 for row in rows], rows[0].count),
        top5=fmean(row.top5 for row in rows),
        gain=gain,
        gain_interval=difference(gains, rows[0].count) if gains else None,
        loss=lost,
        recovered=gain / loss if gain is not None and sure else None,
    )


def _threshold(count: int) -> float:
    return round(max(WORTH_REPAIRING, 100 / count), 6)


def _differences(rows: Sequence[AccuracyRow], others: Sequence[AccuracyRow]) -> list[float]:
    """Accuracy minus accuracy where both were calibrated with the same seed."""
    theirs = {row.seed: row.top1 for row in others}
    if len(theirs) == 1:  # without calibration images: the same for every seed
        only = next(iter(theirs.values()))
        return [row.top1 - only for row in rows]
    if len(rows) == 1 and rows[0].seed is None:  # the float network, beside hardware that every seed decides
        return [rows[0].top1 - value for value in theirs.values()]
    return [row.top1 - theirs[row.seed] for row in rows if row.seed in theirs]
