"""How well a language model predicts text: nats per token."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.network.batches import call, prepared
from recoup.network.modes import evaluating


def nats_per_token(model: nn.Module, batches: Iterable[Any], *, progress: bool = False) -> float:
    """The mean cross-entropy of the next token; its exponential is the perplexity.

    Args:
        model: maps tokens [B, T] to logits [B, T, V]; it runs in eval mode.
        batches: ``(tokens, following)``, both int64 [B, T].
        progress: whether to show a progress bar.

    Raises:
        RecoupError: no batch, shapes that do not fit, an output that is not finite.
    """
    total, count = 0.0, 0
    with evaluating(model), torch.no_grad():
        for inputs, following in prepared(model, batches, "nats_per_token", progress):
            logits = call(model, inputs)
            if not isinstance(following, Tensor) or logits.shape[:-1] != following.shape:
                shapes = [list(t.shape) if isinstance(t, Tensor) else None for t in (logits, following)]
                raise RecoupError(f"nats_per_token: logits {shapes[0]} and following tokens {shapes[1]} do not fit")
            total += float(F.cross_entropy(logits.flatten(0, -2).double(), following.flatten(), reduction="sum"))
            count += following.numel()
    if not math.isfinite(total):
        raise RecoupError("nats_per_token: the model's output holds NaN or infinity")
    return total / count
