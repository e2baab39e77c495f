"""Pipelined Backpropagation's part of a report: what delay costs, and what each mitigation wins back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from recoup.plots.pipeline import curves_figure
from recoup.report.chapters import Chapter, Table
from recoup.report.figures import COLOURS, clear, styled, svg
from recoup.report.summary import SPACE
from recoup.study.measures.pipeline import PB, SGDM, PipelineResults, PipelineRow

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
class MethodLine:
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


def method_lines(study: PipelineResults) -> list[MethodLine]:
    """One a method, in the order measured."""
    baseline = {row.seed: row.loss for row in study.of(SGDM)}
    return [_line(label, study.of(label), baseline) for label in study.labels()]


def verdict(study: PipelineResults) -> str:
    """What delay costs and which share of it each mitigation wins back, in plain words."""
    lines = {line.label: line for line in method_lines(study)}
    where = f"Pipelined Backpropagation, {study.setting.stages} stages, batch {study.setting.batch}"
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


def setting_text(study: PipelineResults) -> str:
    """The setting in a sentence."""
    rate, momentum = study.setting.scaled
    longest = max(study.delays)
    return (
        f"Residual MLP of {study.setting.stages} stages on {study.data_name}, batch {study.setting.batch}, "
        f"{study.setting.epochs} epochs, learning rate {rate:.3g} falling to zero, momentum {momentum:.5f}; with a "
        f"pipeline the gradients of the first stage come {longest} updates late, of the last {min(study.delays)}."
    )


def _loss(line: MethodLine) -> str:
    return "diverges" if math.isnan(line.loss) else f"{line.loss:.3f}"


def _line(label: str, rows: Sequence[PipelineRow], baseline: dict[int, float]) -> MethodLine:
    kept = [row for row in rows if math.isfinite(row.loss)]
    ratios = [
        math.log(row.loss / baseline[row.seed])
        for row in kept
        if label != SGDM and row.loss > 0 and baseline.get(row.seed, 0.0) > 0
    ]
    accuracy, loss = [row.accuracy for row in kept], [row.loss for row in kept]
    return MethodLine(
        label=label,
        accuracy=fmean(accuracy) if kept else math.nan,
        accuracy_std=stdev(accuracy) if len(kept) > 1 else None,
        loss=fmean(loss) if kept else math.nan,
        loss_std=stdev(loss) if len(kept) > 1 else None,
        against=math.exp(fmean(ratios)) if ratios else None,
        seeds=len(rows),
        diverged=len(rows) - len(kept),
    )


def context(study: PipelineResults) -> Mapping[str, Any]:
    """The setting, the picture, and every method's line with its numbers as text."""
    lines = method_lines(study)
    return {
        "batch": study.setting.batch,
        "setting": setting_text(study),
        "figure": pipeline_figure(study, lines),
        "lines": [
            (line, spread(line.accuracy, line.accuracy_std, 2), spread(line.loss, line.loss_std, 3)) for line in lines
        ],
        "seeds": max(line.seeds for line in lines),
        "meaning": {line.label: MEANING[line.label] for line in lines if line.label in MEANING},
    }


@styled
def pipeline_figure(study: PipelineResults, lines: Sequence[MethodLine]) -> str:
    """Loss and accuracy of every method in the course of training, with the span of the seeds."""
    runs = {label: study.of(label) for label in study.labels()}
    losses = {label: [_with_gaps(row.losses, row.losses) for row in rows] for label, rows in runs.items()}
    accuracies = {label: [_with_gaps(row.accuracies, row.losses) for row in rows] for label, rows in runs.items()}
    figure = curves_figure(study.images, losses, accuracies, palette=COLOURS)
    clear(figure)
    said = "; ".join(f"{line.label}: {line.text}" for line in lines)
    return svg(figure, "pipeline", f"Training loss and test accuracy in the course of training. At the end, {said}.")


def _with_gaps(values: Sequence[float | None], losses: Sequence[float | None]) -> list[float]:
    """NaN from where a run diverged on."""
    return [math.nan if v is None or lost is None else v for v, lost in zip(values, losses, strict=True)]


def totals(study: PipelineResults) -> list[Table]:
    """One terminal table, a row a method."""
    lines = method_lines(study)
    rows = tuple(
        (
            line.label,
            spread(line.loss, line.loss_std, 3),
            "" if line.against is None else f"{line.against:.2f}",
            spread(line.accuracy, line.accuracy_std, 2),
            f"{line.diverged} of {line.seeds}",
        )
        for line in lines
    )
    name = f"Pipelined Backpropagation: mean and standard deviation of {max(line.seeds for line in lines)} seeds"
    columns = ("method", "training loss", "times SGDM's", "accuracy %", "diverged")
    return [Table(name, columns, rows, setting_text(study))]


CHAPTER = Chapter(
    template=Path(__file__).with_name("pipeline.html.j2"),
    context=context,
    totals=totals,
    verdicts=lambda study: [verdict(study)],
)
