"""What results mean: estimates, gains and the verdict in plain words. Terminal, HTML and CSV all read this."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from recoup.network.wing import FLOAT, Baseline
from recoup.report.chapters import chapter_of
from recoup.report.lines import Line, lines_of, threshold
from recoup.study.doubts import doubts
from recoup.study.hardware import Hardware, Quoted, references
from recoup.study.intervals import of_test_set
from recoup.study.quality import SPACE, Quality, perplexity_text
from recoup.study.repairs import NONE
from recoup.study.results import Results
from recoup.wings import wing_of


@dataclass(frozen=True, slots=True)
class Summary:
    """The whole study: `lines` in the order measured, one verdict a config.

    ``resolution`` is half the width of the best result's interval over the test samples, ``threshold`` the loss up to
    which there is nothing to repair; both in points of top-1, or in nats. ``samples`` is how many test images or
    windows there were; ``baselines`` is what each config, by its name, is compared with. ``doubts`` are sentences about
    why the results may say nothing; ``guessing`` is whether the float network is no better than chance, as far as the
    test samples resolve it.
    """

    quality: Quality
    lines: tuple[Line, ...]
    verdicts: tuple[str, ...]
    resolution: float
    threshold: float
    seeds: int
    samples: int
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
    lines, quality = lines_of(results, titles, compared), results.quality
    best = max(lines, key=lambda line: quality.better(line.reached.mean)).reached
    resolution = best.half if quality.paired else of_test_set(best.mean, results.test_images).half
    measured = [one for name, one in present.items() if any(line.config == name for line in lines)]
    floating = next((line for line in lines if (line.config, line.state) == (FLOAT.name, NONE)), None)
    guess = None if floating is None else _guess(results, floating)
    said = doubts(results.untrained, results.outputs, results.classes) + ([guess] if guess else [])
    seeds = len(results.recipe.calibration.seeds)
    about = (seeds, results.test_images, compared, tuple(said), guess is not None or results.untrained)
    silent = Summary(quality, lines, (), resolution, threshold(quality, results.test_images), *about)
    verdicts = (verdict(silent, one, saving(results, one)) for one in measured)
    return replace(silent, verdicts=tuple(verdicts))


def _guess(results: Results, floating: Line) -> str | None:
    """Why nothing follows, where the float network is no better than chance as far as the test samples resolve it."""
    quality, reached = results.quality, floating.reached
    choices = results.outputs if quality.paired else results.classes
    if not choices:
        return None
    chance = math.log(choices) if quality.paired else 100 / choices
    worst = reached.low if quality.rises else reached.high
    if quality.better(worst) > quality.better(chance):
        return None
    among = f"{choices:,} tokens" if quality.paired else f"{choices} classes"
    what = "this text, so no nats say" if quality.paired else "these images, so no accuracy says"
    return (
        f"In float the network has {quality.text(reached.mean)}, and guessing among {among} gives "
        f"{quality.text(chance)}: it does not know {what} anything about hardware."
    )


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
    text_of = summary.quality.text
    if before is None or bare is None:
        return f"{title}: {text_of(line.reached.mean)} ({line.state}){saving}."
    loss = _loss(summary, before, bare)
    noise = f"within noise of {summary.samples:,} {summary.quality.samples}"
    now = text_of(bare.reached.mean)
    text = f"{title}: {text_of(before.reached.mean)} {baseline.phrase}"
    if summary.guessing:
        return f"{text}, {now} on it{saving}; from a network that guesses nothing follows."
    if loss <= summary.threshold:
        same = text_of(before.reached.mean) == now
        text += f" {'stays' if same else 'becomes'} {now}{saving}"
        within = not same and _within_noise(summary, loss, bare)
        return f"{text}, {noise}; there is nothing to repair." if within else f"{text}; there is nothing to repair."
    text += f" {'falls' if summary.quality.rises else 'rises'} to {now}{saving}"
    if not _lost(summary, before, bare):
        return f"{text}; the loss is {noise}."
    won = _won_back(summary, hardware, bare, None if line is bare else line)
    return f"{text}{_lost_text(summary, before, bare)}; {won}."


def _within_noise(summary: Summary, loss: float, bare: Line) -> bool:
    """Whether what little the hardware changes may as well be nothing."""
    return abs(loss) <= summary.resolution if bare.loss is None else bare.loss.holds_zero


def _lost_text(summary: Summary, before: Line, bare: Line) -> str:
    """How much a language model loses; of accuracies that is plain to see."""
    if not summary.quality.paired:
        return ""
    loss = summary.quality.text(_loss(summary, before, bare))
    between = f"{perplexity_text(before.second)} to {perplexity_text(bare.second)}"
    return f": it loses {loss} a token (perplexity {between})"


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
            return line.state, line.reached.mean
        own = wing_of(hardware.configs[0], "report").baseline.name
        found = summary.line(own, NONE) or summary.line(summary.baselines[hardware.name].name, NONE)
        return NONE, None if found is None else found.reached.mean

    return quoted


def _loss(summary: Summary, before: Line, bare: Line) -> float:
    return round(summary.quality.lost(before.reached.mean, bare.reached.mean), 6)  # accuracies are quotients, rounded


def _lost(summary: Summary, before: Line, bare: Line) -> bool:
    """Whether hardware costs accuracy, as far as the test samples and seeds resolve it."""
    loss = _loss(summary, before, bare)
    return loss > summary.threshold and not _within_noise(summary, loss, bare)


def _won_back(summary: Summary, hardware: Hardware, bare: Line, repaired: Line | None) -> str:
    """The verdict's last piece: what repair brings, as far as the gain's interval supports it."""
    quality = summary.quality
    if repaired is None:
        return "no repair was measured"
    how, now = hardware.sentence(repaired.state), quality.text(repaired.reached.mean)
    if repaired.gain_interval is not None and repaired.gain_interval.holds_zero:
        return f"what {how} changes is within noise of {summary.samples:,} {quality.samples} ({now})"
    if quality.lost(bare.reached.mean, repaired.reached.mean) >= 0:
        return f"{how} does not help ({now})"
    share = repaired.recovered or 0.0
    part = f"{quality.text(repaired.gain or 0.0)} of it" if quality.paired else f"{100 * share:.0f}{SPACE}% of the loss"
    won = "all of the loss" if share >= 0.995 else part
    return f"{how} brings back {won} ({now})"
