"""LBA's fine-tuning in two stages: first without underflow, then with it."""

from pathlib import Path

from torch import nn

from recoup.data import Dataset
from recoup.lba.repair import lba_modules, set_underflow_
from recoup.training.loop import Settings, Stage, Trained, train


def stages(
    epochs: int = 5,
    underflow_epochs: int = 1,
    learning_rate: float = 1e-3,
    underflow_learning_rate: float | None = None,
) -> list[Stage]:
    """The two stages for `train`: truncation and overflow alone, then everything the unit does.

    Underflow has regions of zero gradient, which is why it comes last. 5 + 1 epochs are the paper's on ImageNet; the
    learning rates are our definition: the second stage has a tenth of the first's unless it is given.
    """
    second = learning_rate / 10 if underflow_learning_rate is None else underflow_learning_rate
    first = Stage("without underflow", epochs, learning_rate, lambda model: set_underflow_(model, False))
    last = Stage("with underflow", underflow_epochs, second, lambda model: set_underflow_(model, True))
    return [stage for stage in (first, last) if stage.epochs]


def fine_tune(
    model: nn.Module,
    data: Dataset,
    test: Dataset | None = None,
    *,
    epochs: int = 5,
    underflow_epochs: int = 1,
    learning_rate: float = 1e-3,
    underflow_learning_rate: float | None = None,
    settings: Settings = Settings(),  # noqa: B008 -- frozen
    folder: str | Path | None = None,
    progress: bool = False,
) -> Trained:
    """Fine-tune a network whose layers run on narrow accumulators, in place.

    Args:
        model: trained in float, then ``emulate_(model, LBA(...))``; ends with underflow on.
        data, test, settings, folder, progress: as for `train`.
        epochs, underflow_epochs, learning_rate, underflow_learning_rate: see `stages`.

    Raises:
        RecoupError: no LBA layer, and what `train` raises.

    Source: Blumenfeld et al., ICLR 2024 (the two stages).
    """
    lba_modules(model, "fine_tune")
    plan = stages(epochs, underflow_epochs, learning_rate, underflow_learning_rate)
    try:
        return train(model, data, test, plan, settings, folder=folder, progress=progress)
    finally:
        set_underflow_(model, True)
