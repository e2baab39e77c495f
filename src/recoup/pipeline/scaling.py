"""Hyperparameters for other batch sizes, and learning rates that torch's schedulers make."""

import math
from collections.abc import Callable
from typing import Any

import torch

from recoup.errors import RecoupError
from recoup.fields import integer, is_number, number


def scale_hyperparameters(lr: float, momentum: float, reference_batch: int, batch: int) -> tuple[float, float]:
    """Learning rate and momentum for another batch size, without tuning.

        m = m_r^(N / N_r),   eta = eta_r (N / N_r) (1 - m) / (1 - m_r)

    so that a gradient's contribution decays as fast per sample, and in all weighs as much.

    Returns:
        (lr, momentum) for batches of ``batch``, as the losses are means over a batch.

    Raises:
        RecoupError: lr not above 0 or infinite, momentum not from 0 to below 1, batches that are not integers from 1.

    Source: Kosson et al., MLSys 2021 (Chiley et al., 2019).

    >>> lr, momentum = scale_hyperparameters(0.1, 0.9, 128, 1)
    >>> f"{lr:.3g} {momentum:.6f}"
    '6.43e-06 0.999177'
    """
    numbers = is_number(lr) and is_number(momentum)
    if not numbers or not 0 < lr < math.inf or not 0 <= momentum < 1:
        raise RecoupError(
            f"scale_hyperparameters(lr={lr!r}, momentum={momentum!r}): lr must be above 0 and finite, momentum from 0 "
            "to below 1"
        )
    owner, legal = "scale_hyperparameters", (1, 1 << 62)
    ratio = integer(owner, "batch", batch, legal) / integer(owner, "reference_batch", reference_batch, legal)
    scaled = momentum**ratio
    return lr * ratio * (1 - scaled) / (1 - momentum), scaled


def scheduled(scheduler: Callable[[torch.optim.Optimizer], Any], lr: float) -> Callable[[int], float]:
    """The learning rates of one of torch's schedulers, as the function of the update's number that `Simulator` takes.

    The scheduler steps an optimizer of nothing, once an update, and its rates are kept: a run that is taken up again
    asks for the same.

    Args:
        scheduler: makes it, of an optimizer; not one that waits for a metric.
        lr: the rate that it begins with.

    Raises:
        RecoupError: a scheduler whose step needs a metric, or no scheduler.

    >>> rate = scheduled(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), 0.1)
    >>> [rate(k) for k in range(4)]
    [0.1, 0.1, 0.05, 0.05]
    """
    number("pipeline.scheduled", "lr", lr, (0.0, 1e30))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr)
    made = scheduler(optimizer)
    if not hasattr(made, "step") or isinstance(made, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise RecoupError(f"pipeline.scheduled: {type(made).__name__} is no scheduler that only counts updates")
    rates: list[float] = []

    def rate(update: int) -> float:
        while len(rates) <= update:
            rates.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            made.step()
        return rates[update]

    return rate
