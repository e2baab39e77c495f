"""What a training run is told: its stages, and the settings they share."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from recoup.errors import RecoupError
from recoup.fields import boolean, choice, integer
from recoup.training.schedule import SCHEDULES, Schedule

LARGEST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Stage:
    """Some epochs at one base learning rate.

    Attributes:
        name: in the log.
        epochs: how many.
        learning_rate: at its highest; every stage runs the schedule anew, with a fresh optimiser.
        prepare: called with the model when the stage begins, and again when a run is resumed within it.

    Raises:
        RecoupError: epochs below 0, a learning rate that is no finite number of at least 0.
    """

    name: str
    epochs: int
    learning_rate: float
    prepare: Callable[[nn.Module], object] = field(default=lambda _: None, compare=False)

    def __post_init__(self) -> None:
        integer("Stage", "epochs", self.epochs, (0, LARGEST))
        number("Stage", "learning_rate", self.learning_rate, lambda x: x >= 0, "a number of at least 0")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a network is trained.

    Attributes:
        batch_size: images a step; the last, shorter batch of an epoch is left out.
        optimizer: ``sgd`` (with momentum, Nesterov if asked) or ``adamw``.
        momentum, nesterov, weight_decay: the optimiser's.
        schedule: of the learning rate: ``constant``, ``linear`` or ``cosine``, over a stage's steps.
        warm_up: steps of linear rise at the start of every stage.
        label_smoothing: of the cross-entropy.
        clip: largest norm of the gradient, None for no limit.
        augment: vary the images as the data set knows how.
        seed: of the images' order and augmentation, and of dropout and stochastic rounding.
        save_every: steps between checkpoints; the end of an epoch is always one.

    Raises:
        RecoupError: a field of another type or range; the message names it and what is legal.
    """

    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: Schedule = "cosine"
    warm_up: int = 0
    label_smoothing: float = 0.0
    clip: float | None = None
    augment: bool = True
    seed: int = 0
    save_every: int = 200

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("save_every", 1), ("warm_up", 0), ("seed", 0)):
            integer("Settings", name, getattr(self, name), (least, LARGEST))
        choice("Settings", "optimizer", self.optimizer, ("sgd", "adamw"))
        choice("Settings", "schedule", self.schedule, SCHEDULES)
        for name in ("nesterov", "augment"):
            boolean("Settings", name, getattr(self, name))
        number("Settings", "momentum", self.momentum, lambda x: 0 <= x < 1, "a number from 0 to below 1")
        number("Settings", "weight_decay", self.weight_decay, lambda x: x >= 0, "a number of at least 0")
        number("Settings", "label_smoothing", self.label_smoothing, lambda x: 0 <= x <= 1, "a number from 0 to 1")
        if self.clip is not None:
            number("Settings", "clip", self.clip, lambda x: x > 0, "a number above 0, or None")
        if self.nesterov and self.momentum == 0:
            raise RecoupError("Settings(nesterov=True): nesterov needs a momentum above 0")


def number(owner: str, name: str, value: Any, fits: Callable[[float], bool], legal: str) -> None:
    """Refuse what is no finite number, or does not fit."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not fits(value):
        raise RecoupError(f"{owner}({name}={value!r}): {name} must be {legal}")
