"""What the Pipelined Backpropagation chapter says, in numbers and words; terminal and HTML read this."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from recoup.report.summary import SPACE
from recoup.study.pipeline import PB, SGDM, PipelineResults, PipelineRow

MEANING = {
    SGDM: "SGD with momentum, without a pipeline: no delay.",
    PB: (
        "Pipelined Backpropagation without a repair: every gradient comes D updates late, and the backward pass sees "
        "newer weights than the forward pass did."
    ),
    "SC": "Spike Compensation: of each late gradient the share that it would have contributed by now comes at once.",
    "LWP": "Linear Weight Prediction: the forward pass uses the weights that the velocity foretells for D updates on.",
    "LWPv+SC": "Both, with the prediction by velocity.",
}


@dataclass(frozen=True, slots=True)
class ChapterLine:
    """A method over its seeds: mean and standard deviation of the runs that did not diverge.

    Attributes:
        accuracy, loss: means, NaN where every run diverged; accuracy in percent, loss of the last epoch in training.
        accuracy_std, loss_std: None with fewer than two runs.
        against: by seed, the mean factor (geometric) of SGDM's loss; None where there is no such pair.
        seeds, diverged: runs, and how many of them diverged.
    """

    label: str
    accuracy: float
    accuracy_std: float | None
    loss: float
    loss_std: float | None
    against: float | None
    seeds: int
    diverged: int

    @property
    def text(self) -> str:
        """For a sentence."""
        if math.isnan(self.loss):
            return "diverged"
        return f"loss {self.loss:.3f}, accuracy {self.accuracy:.2f}{SPACE}%"


def chapter_lines(chapter: PipelineResults) -> list[ChapterLine]:
    """One a method, in the order measured."""
    baseline = {row.seed: row.loss for row in chapter.of(SGDM)}
    return [_line(label, chapter.of(label), baseline) for label in chapter.labels()]


def chapter_verdict(chapter: PipelineResults) -> str:
    """What delay costs and which share of it each mitigation wins back, in plain words."""
    lines = {line.label: line for line in chapter_lines(chapter)}
    where = f"Pipelined Backpropagation, {chapter.setting.stages} stages, batch {chapter.setting.batch}"
    sgdm, late = lines.get(SGDM), lines.get(PB)
    if sgdm is None or late is None or math.isnan(sgdm.loss):
        return f"{where}: " + "; ".join(f"{line.label} {line.text}" for line in lines.values()) + "."
    if math.isnan(late.loss):
        text = f"{where}: delayed gradients make training diverge"
    elif late.loss <= sgdm.loss:
        return f"{where}: training loss {sgdm.loss:.3f} without delay, {late.loss:.3f} with it; nothing to repair."
    else:
        text = f"{where}: training loss {sgdm.loss:.3f} without delay becomes {late.loss:.3f} with it"
    repaired = [line for line in lines.values() if line not in (sgdm, late)]
    if not repaired:
        return f"{text}; no mitigation was measured."
    return f"{text}; " + ", ".join(f"{line.label} {_loss(line)}" for line in repaired) + "."


def spread(mean: float, std: float | None, digits: int) -> str:
    """Mean ± standard deviation as text.

    >>> spread(96.5, 0.25, 1)
    '96.5 ± 0.2'
    """
    if math.isnan(mean):
        return "diverged"
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def delays_text(chapter: PipelineResults) -> str:
    """The setting in a sentence."""
    rate, momentum = chapter.setting.scaled
    longest = max(chapter.delays)
    return (
        f"Residual MLP of {chapter.setting.stages} stages on {chapter.data_name}, batch {chapter.setting.batch}, "
        f"{chapter.setting.epochs} epochs, learning rate {rate:.3g} falling to zero, momentum {momentum:.5f}; with a "
        f"pipeline the gradients of the first stage come {longest} updates late, of the last {min(chapter.delays)}."
    )


def _loss(line: ChapterLine) -> str:
    return "diverges" if math.isnan(line.loss) else f"{line.loss:.3f}"


def _line(label: str, rows: Sequence[PipelineRow], baseline: dict[int, float]) -> ChapterLine:
    kept = [row for row in rows if math.isfinite(row.loss)]
    ratios = [
        math.log(row.loss / baseline[row.seed])
        for row in kept
        if label != SGDM and row.loss > 0 and baseline.get(row.seed, 0.0) > 0
    ]
    accuracy, loss = [row.accuracy for row in kept], [row.loss for row in kept]
    return ChapterLine(
        label=label,
        accuracy=fmean(accuracy) if kept else math.nan,
        accuracy_std=stdev(accuracy) if len(kept) > 1 else None,
        loss=fmean(loss) if kept else math.nan,
        loss_std=stdev(loss) if len(kept) > 1 else None,
        against=math.exp(fmean(ratios)) if ratios else None,
        seeds=len(rows),
        diverged=len(rows) - len(kept),
    )
