"""Fine-tuning in phases, as the wings' cards name them: LBA's come first without underflow, then with it."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from recoup.data import Dataset
from recoup.errors import RecoupError
from recoup.network.emulated import emulated_layers
from recoup.network.wing import Phase
from recoup.training.loop import Settings, Stage, Trained, train
from recoup.wings import wing_of


def stages(
    phases: Sequence[Phase],
    epochs: int = 5,
    last_epochs: int = 1,
    learning_rate: float = 1e-3,
    last_learning_rate: float | None = None,
) -> list[Stage]:
    """The stages for `train`: every phase but the last for ``epochs``, the last, the hardware as it is, for its own.

    LBA's underflow has regions of zero gradient, which is why it comes last. 5 + 1 epochs are the paper's on ImageNet;
    the learning rates are our definition: the last stage has a tenth of the others' unless it is given.
    """
    last = learning_rate / 10 if last_learning_rate is None else last_learning_rate
    plan = [Stage(phase.name, epochs, learning_rate, phase.prepare) for phase in phases[:-1]]
    plan += [Stage(phase.name, last_epochs, last, phase.prepare) for phase in phases[-1:]]
    return [stage for stage in plan if stage.epochs]


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
        RecoupError: no layer whose hardware is fine-tuned in phases, and what `train` raises.

    Source: Blumenfeld et al., ICLR 2024 (the two stages).
    """
    cards = [wing_of(layer.config, "fine_tune") for layer in emulated_layers(model).values()]
    phases = next((card.phases for card in cards if card.phases), ())
    if not phases:
        raise RecoupError("fine_tune: the model has no layer whose hardware is fine-tuned in phases: emulate_ it first")
    plan = stages(phases, epochs, underflow_epochs, learning_rate, underflow_learning_rate)
    try:
        return train(model, data, test, plan, settings, folder=folder, progress=progress)
    finally:
        phases[-1].prepare(model)
