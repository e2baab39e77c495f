"""Hyperparameters for other batch sizes."""

from recoup.errors import RecoupError


def scale_hyperparameters(lr: float, momentum: float, reference_batch: int, batch: int) -> tuple[float, float]:
    """Learning rate and momentum for another batch size, without tuning.

        m = m_r^(N / N_r),   eta = eta_r (N / N_r) (1 - m) / (1 - m_r)

    so that a gradient's contribution decays as fast per sample, and in all weighs as much.

    Returns:
        (lr, momentum) for batches of ``batch``, as the losses are means over a batch.

    Raises:
        RecoupError: lr not above 0, momentum not from 0 to below 1, batches below 1.

    Source: Kosson et al., MLSys 2021 (Chiley et al., 2019).

    >>> lr, momentum = scale_hyperparameters(0.1, 0.9, 128, 1)
    >>> f"{lr:.3g} {momentum:.6f}"
    '6.43e-06 0.999177'
    """
    if not lr > 0 or not 0 <= momentum < 1 or reference_batch < 1 or batch < 1:
        raise RecoupError(
            f"scale_hyperparameters(lr={lr!r}, momentum={momentum!r}, reference_batch={reference_batch!r}, "
            f"batch={batch!r}): lr must be above 0, momentum from 0 to below 1, batches at least 1"
        )
    ratio = batch / reference_batch
    scaled = momentum**ratio
    return lr * ratio * (1 - scaled) / (1 - momentum), scaled
