"""Pipelined Backpropagation on handwritten digits: one small network, several mitigations, several seeds, all at once.

The network is a residual MLP with layer norm, a stage a block, at any batch size; SGDM is the same pipeline with no
delay. The seed decides initial weights and the order of the images, the same for all methods: methods are compared
seed by seed.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from recoup.data import load
from recoup.errors import RecoupError
from recoup.pipeline import Batched, Mitigation, Run, delays, scale_hyperparameters
from recoup.study.beside import Beside
from recoup.study.rows import Frozen, Percent

SCHEMA = 1
POINTS = 4  # of a curve, an epoch
SGDM, PB = "SGDM", "PB"
REFERENCE_BATCH, REFERENCE_MOMENTUM = 32, 0.9

Count = Annotated[int, Field(ge=1)]


class Setting(Frozen):
    """What all runs share.

    Attributes:
        stages, width: of the residual MLP; the first stage is a linear layer, the last the classifier.
        epochs: passes over the training images; the learning rate falls linearly to zero in them.
        batch: N images an update, whose mean loss is descended.
        reference_lr: eta_r at batch 32 and momentum 0.9; `scale_hyperparameters` makes eta and m for ``batch`` of them.
    """

    stages: Annotated[int, Field(ge=3)] = 16
    width: Count = 32
    epochs: Count = 3
    batch: Count = 1
    reference_lr: Annotated[float, Field(gt=0)] = 0.064

    @property
    def scaled(self) -> tuple[float, float]:
        """eta (before it falls) and m."""
        return scale_hyperparameters(self.reference_lr, REFERENCE_MOMENTUM, REFERENCE_BATCH, self.batch)


class Case(NamedTuple):
    """One run: a method by its label, its mitigation, delays times ``factor``, and a seed."""

    label: str
    mitigation: Mitigation
    factor: float
    seed: int


class PipelineRow(Frozen):
    """One run's curves: at each point the mean training loss since the last point, and the test accuracy, percent.

    From the update on at which the loss was no longer finite, losses are null; the accuracy is then that of the last
    finite weights.
    """

    label: str
    mitigation: str
    seed: int
    losses: tuple[float | None, ...]
    accuracies: tuple[Percent, ...]

    @property
    def loss(self) -> float:
        """The mean training loss of the last epoch; NaN if the run diverged."""
        return fmean(math.nan if value is None else value for value in self.losses[-POINTS:])

    @property
    def accuracy(self) -> float:
        """Of the last point, percent; NaN if the run diverged."""
        return math.nan if self.losses[-1] is None else self.accuracies[-1]


class PipelineResults(Beside):
    """A chapter of a report: pipeline.json, beside or without results.json.

    ``chapter`` is the module of that chapter. ``images`` holds the training images seen at each point of the curves.
    """

    file: ClassVar[str] = "pipeline.json"
    what: ClassVar[str] = "a pipeline study"
    name: ClassVar[str] = "pipeline"
    chapter: ClassVar[str] = "recoup.report.chapters.pipeline"

    schema_version: Literal[1] = SCHEMA
    setting: Setting
    data_name: str
    test_images: int
    delays: tuple[int, ...]
    images: tuple[int, ...]
    rows: tuple[PipelineRow, ...]

    def labels(self) -> list[str]:
        """The methods, in the order they were asked for."""
        return list(dict.fromkeys(row.label for row in self.rows))

    def of(self, label: str) -> list[PipelineRow]:
        """A method's runs, one a seed."""
        return [row for row in self.rows if row.label == label]


RESULTS = PipelineResults


class Residual(nn.Module):
    """x + relu(W norm(x) + b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, width] to the same."""
        return x + torch.relu(self.linear(self.norm(x)))


def residual_mlp(stages: int, width: int, seed: int, pixels: int = 64, classes: int = 10) -> nn.Sequential:
    """The MLP with a seed's initial weights, a stage an element; torch's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [Residual(width) for _ in range(stages - 2)]
        return nn.Sequential(nn.Linear(pixels, width), *blocks, nn.Linear(width, classes))


def study(setting: Setting, cases: Sequence[Case], told: Callable[[int, int], None] | None = None) -> PipelineResults:
    """Train all cases on scikit-learn's digits in one batched network.

    Args:
        setting: what they share.
        cases: the runs; delays are D_s = 2 (S - 1 - s) times the case's factor, rounded down, in updates.
        told: called with (updates done, updates in all) at each point.

    Raises:
        RecoupError: no case; a batch of more than the training images.
    """
    (x, y), test = _images("train"), _images("test")
    per_epoch = len(x) // setting.batch
    if not cases or not per_epoch:
        raise RecoupError(
            f"pipeline study: {len(cases)} cases at batch {setting.batch}; there must be a case, and a batch of at "
            f"most {len(x)} images"
        )
    steps = setting.epochs * per_epoch
    (rate, momentum), full = setting.scaled, delays(setting.stages)
    runs = [
        Run([int(case.factor * d) for d in full], case.mitigation, lambda k: rate * (1 - k / steps), momentum)
        for case in cases
    ]
    models = [residual_mlp(setting.stages, setting.width, case.seed) for case in cases]
    batched = Batched(models, [[str(i)] for i in range(setting.stages)], runs, nn.functional.cross_entropy)
    order = _orders([case.seed for case in cases], len(x), setting)
    marks = [round(j * steps / (setting.epochs * POINTS)) for j in range(1, setting.epochs * POINTS + 1)]
    losses, accuracies, total, last = [], [], torch.zeros(len(cases)), 0
    for step in range(steps):
        total += batched.step(x[order[step]], y[order[step]])
        if step + 1 in marks:
            losses.append((total / (step + 1 - last)).tolist())
            accuracies.append([_accuracy(batched.load(run, model), *test) for run, model in enumerate(models)])
            total, last = torch.zeros(len(cases)), step + 1
            if told is not None:
                told(last, steps)
    rows = [
        PipelineRow(
            label=case.label,
            mitigation=repr(case.mitigation),
            seed=case.seed,
            losses=tuple(point[run] if math.isfinite(point[run]) else None for point in losses),
            accuracies=tuple(point[run] for point in accuracies),
        )
        for run, case in enumerate(cases)
    ]
    return PipelineResults(
        setting=setting,
        data_name="digits",
        test_images=len(test[1]),
        delays=tuple(full),
        images=tuple(mark * setting.batch for mark in marks),
        rows=tuple(rows),
    )


def _images(split: str) -> tuple[Tensor, Tensor]:
    """All images of a split, flat, and their labels."""
    data = load("digits", split)
    x, y = next(iter(data.batches(len(data))))
    return x.flatten(1), y


def _orders(seeds: Sequence[int], images: int, setting: Setting) -> Tensor:
    """The images of each update and run, [steps, R, N]: every epoch a new order, what fills no batch left out."""
    kept = images // setting.batch * setting.batch
    orders = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        epochs = [torch.randperm(images, generator=generator)[:kept] for _ in range(setting.epochs)]
        orders.append(torch.cat(epochs).view(-1, setting.batch))
    return torch.stack(orders, 1)


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * int((model(x).argmax(1) == y).sum()) / len(y)
