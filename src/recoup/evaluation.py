"""How well a network does: top-1 and top-5 accuracy of a classifier, nats per token of a language model."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.network import ledger
from recoup.network.batches import call, prepared
from recoup.network.emulated import emulated_layers
from recoup.network.modes import compiled, evaluating
from recoup.network.reached import watching


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How often the label is the highest (top1) or among the five highest (top5) outputs, in percent of ``count``."""

    top1: float
    top5: float
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval of ``top1``, in percent: what a test set of this size can tell."""
        z, n, p = 1.959964, self.count, self.top1 / 100
        centre, spread = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        low, high = (100 * (centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
        # At 0 and 100 % a bound is the accuracy itself, which the quotient misses by its rounding.
        return max(0.0, min(low, self.top1)), min(100.0, max(high, self.top1))


def evaluate(model: nn.Module, batches: Iterable[Any], *, progress: bool = False) -> Accuracy:
    """The accuracy of a classifier on labelled batches.

    Args:
        model: maps an input batch to logits [N, classes]; it runs in eval mode without gradients and gets its own
            mode back, also after an error or an interrupt.
        batches: iterable of ``(input, label)`` (see `recoup.network.batches`), labels as class indices [N].
        progress: whether to show a progress bar on standard error.

    Returns:
        Percentages and the number of samples. With fewer than five classes top5 counts all of them. Between equal
        outputs the class with the lower index comes first, so a constant network scores its share, not 100 %.

    Raises:
        RecoupError: no batch, no labels, labels outside the classes, NaN or infinity in inputs or outputs.

    >>> model = nn.Identity()
    >>> evaluate(model, [(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))])
    Accuracy(top1=50.0, top5=100.0, count=2)
    """
    ledger.warn_stale(model, "evaluate")
    return accuracy(model, batches, progress=progress)


def accuracy(model: nn.Module, batches: Iterable[Any], *, progress: bool = False) -> Accuracy:
    """`evaluate` without a look at the ledger: for those who change hardware for the time of a measurement."""
    hits1 = hits5 = total = 0
    with _scoring(model, "evaluate"):
        for inputs, label in prepared(model, batches, "evaluate", progress):
            logits = _logits(call(model, inputs), label)
            assert label is not None
            rank = _rank(logits, label)
            hits1 += int((rank < 1).sum())
            hits5 += int((rank < 5).sum())
            total += label.numel()
    return Accuracy(100 * hits1 / total, 100 * hits5 / total, total)


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
    with _scoring(model, "nats_per_token"):
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


@contextmanager
def _scoring(model: nn.Module, purpose: str) -> Iterator[None]:
    """In eval mode without gradients, compiled where it is compiled; emulated layers that never ran are said, unless
    compiled code, which calls no hooks, runs them."""
    layers = {} if compiled(model) else emulated_layers(model)
    with watching(layers, purpose, refuse=False), evaluating(model, eager=False), torch.no_grad():
        yield


def _rank(logits: Tensor, label: Tensor) -> Tensor:
    """How many classes come before the label's."""
    label = label.long()
    own = logits.gather(1, label[:, None])
    index = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > own) | ((logits == own) & (index < label[:, None]))
    return before.sum(1)


def _logits(output: Any, label: Tensor | None) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 2:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise RecoupError(f"evaluate: the model must return logits [N, classes]; it returned {shape}")
    if (
        not isinstance(label, Tensor)
        or label.shape != output.shape[:1]
        or label.is_floating_point()
        or label.dtype == torch.bool
    ):
        got = "no labels" if label is None else f"a {type(label).__name__}"
        got = f"{label.dtype} {list(label.shape)}" if isinstance(label, Tensor) else got
        raise RecoupError(f"evaluate: labels must be class indices of shape [{output.shape[0]}]; got {got}")
    if int(label.min()) < 0 or int(label.max()) >= output.shape[1]:
        raise RecoupError(
            f"evaluate: labels lie in {int(label.min())}..{int(label.max())}, but the model has "
            f"{output.shape[1]} classes"
        )
    if not bool(torch.isfinite(output).all()):
        raise RecoupError("evaluate: the model's output holds NaN or infinity")
    return output
