"""What is measured of a network's outputs, batch by batch: accuracy, nats, distance from a reference.

Legend: N samples, T tokens of a sample, V classes or vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.errors import RecoupError
from recoup.network.answers import Answers, Z
from recoup.storage.digest import OfSamples

PADDING = -100  # what torch and transformers put where a token has no label


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How often the label is the highest (top1) or among the five highest (top5) outputs, in percent of ``count``.

    ``answers`` says of each sample whether its label was the highest: ``now.answers.flips(before.answers)`` are the
    samples that two networks answer otherwise, and the paired interval of what the first one loses.
    """

    top1: float
    top5: float
    count: int
    answers: Answers | None = field(default=None, repr=False, compare=False)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval of ``top1``, in percent: what a test set of this size can tell."""
        z, n, p = Z, self.count, self.top1 / 100
        centre, spread = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        low, high = (100 * (centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
        # At 0 and 100 % a bound is the accuracy itself, which the quotient misses by its rounding.
        return max(0.0, min(low, self.top1)), min(100.0, max(high, self.top1))

    @property
    def value(self) -> float:
        """``top1``: the number that a `Metric` has under this name."""
        return self.top1


@dataclass(frozen=True, slots=True)
class Metric:
    """One number about a network.

    Attributes:
        value: the mean over ``count``.
        count: samples; of a language model, tokens.
        interval: 95 %, from the spread over samples; None where that is unknown: fewer than two samples, samples that
            do not differ, or a measure of one's own that gives a bare number.
    """

    value: float
    count: int
    interval: tuple[float, float] | None = None


class Meter:
    """Adds up one measure, batch by batch.

    Attributes:
        name: of the measure.
        relative: whether it compares with a reference.
        rises: whether more is better.
        purpose: heads errors.
    """

    name: ClassVar[str]
    relative: ClassVar[bool] = False
    rises: ClassVar[bool] = False

    def __init__(self, purpose: str) -> None:
        self.purpose = purpose
        self.means_N: list[Tensor] = []
        self.counts_N: list[Tensor] = []

    def add(self, output: Any, label: Any, reference: Any, number: int) -> None:
        """One batch: the network's output, its labels and the reference's output."""
        raise NotImplementedError  # each measure's own

    def seen(self, inputs: Any, label: Any) -> None:
        """One batch as it came, before `add`; most measures need outputs alone."""

    def kept(self) -> dict[str, Any]:
        """Plain values of every sample by which networks are compared one by one; nothing of most measures."""
        return {}

    def _keep(self, values_NT: Tensor, mask_NT: Tensor | None = None) -> None:
        """A value for each token of each sample."""
        values = values_NT.double().flatten(1) if values_NT.dim() > 1 else values_NT.double()[:, None]
        mask = torch.ones_like(values) if mask_NT is None else mask_NT.reshape(values.shape).double()
        counts = mask.sum(1)
        self.means_N.append((values * mask).sum(1) / counts.clamp_min(1))
        self.counts_N.append(counts)

    @property
    def samples(self) -> list[float]:
        """The mean of every sample, in the order they came."""
        return [value for means in self.means_N for value in means.tolist()]

    @property
    def labelled(self) -> list[int]:
        """How many tokens every sample's mean is over."""
        return [round(value) for counts in self.counts_N for value in counts.tolist()]

    def result(self) -> Any:
        """Mean, how many, and the interval."""
        means, counts = torch.cat(self.means_N), torch.cat(self.counts_N)
        if not bool((counts > 0).any()):
            raise RecoupError(f"{self.purpose}: no label at all (all are {PADDING})")
        value, half = over_samples(means, counts)
        interval = (max(value - half, 0.0), value + half) if half else None
        return Metric(value, round(float(counts.sum())), interval)


def over_samples(means_N: Tensor, counts_N: Tensor) -> tuple[float, float]:
    """The mean of samples, each weighed by how many tokens it has, and half its 95 % interval over the samples.

        m = sum c x / sum c,    1.96 sqrt(n / (n - 1) sum (c (x - m))^2) / sum c      (of a ratio of sums)

    Half is 0 of fewer than two samples. With differences of two networks on the same samples it is paired.
    """
    means, counts = means_N[counts_N > 0], counts_N[counts_N > 0]
    total, n = float(counts.sum()), len(means)
    value = float((means * counts).sum()) / total
    spread = float((counts * (means - value)).square().sum()) ** 0.5 / total
    return value, Z * spread * (n / (n - 1)) ** 0.5 if n > 1 else 0.0


class Top1(Meter):
    """Accuracy.

    Args:
        purpose: heads errors.
        digest: of the samples, so that answers are compared with those to the same ones alone; None: they are not
            compared, or who keeps them adds it.
    """

    name, rises = "top1", True

    def __init__(self, purpose: str, digest: OfSamples | None = None) -> None:
        super().__init__(purpose)
        self.digest = digest
        self.hits_5 = 0
        self.right_N: list[Tensor] = []

    def seen(self, inputs: Any, label: Any) -> None:
        """Samples."""
        if self.digest is not None:
            self.digest.add(inputs, label)

    def add(self, output: Any, label: Any, reference: Any, number: int) -> None:  # noqa: ARG002
        """Ranks of the labels."""
        logits = _logits(output, label, number)
        rank = _rank(logits, label)
        self.right_N.append((rank < 1).cpu())
        self.hits_5 += int((rank < 5).sum())

    @property
    def answers(self) -> Answers:
        """Right or wrong, sample by sample."""
        return Answers.of(torch.cat(self.right_N), "" if self.digest is None else self.digest.text)

    def kept(self) -> dict[str, Any]:
        """The answers."""
        return {"answers": self.answers.to_dict()}

    def result(self) -> Accuracy:
        """Percentages."""
        answers = self.answers
        return Accuracy(100 * answers.right / answers.count, 100 * self.hits_5 / answers.count, answers.count, answers)


class Nats(Meter):
    """Cross-entropy."""

    name = "nats"

    def add(self, output: Any, label: Any, reference: Any, number: int) -> None:  # noqa: ARG002
        """Of every token or sample that has a label."""
        fits = isinstance(output, Tensor) and isinstance(label, Tensor) and output.shape[:-1] == label.shape
        if not fits or label.is_floating_point() or label.dtype == torch.bool:
            shapes = [list(t.shape) if isinstance(t, Tensor) else None for t in (output, label)]
            raise RecoupError(f"{self.purpose}: logits {shapes[0]} and following tokens {shapes[1]} do not fit")
        _check_finite(output, number, self.purpose)
        label = label.long()
        known = label != PADDING
        if bool(((label < 0) & known).any()) or int(label.max()) >= output.shape[-1]:
            raise RecoupError(
                f"{self.purpose}: labels lie in {int(label[known].min())}..{int(label.max())}, but the model has "
                f"{output.shape[-1]} outputs"
            )
        losses = F.cross_entropy(output.flatten(0, -2).double(), label.flatten(), reduction="none")
        self._keep(losses.view(label.shape), known)

    def kept(self) -> dict[str, Any]:
        """Every sample's mean, and how many tokens it is over; one number where all have as many."""
        alike = set(self.labelled)
        labels = list(alike) if len(alike) == 1 else self.labelled
        return {"samples": [round(value, 9) for value in self.samples], "labels": labels}


class KL(Meter):
    """sum p log(p / q), p of the reference."""

    name, relative = "kl", True

    def add(self, output: Any, label: Any, reference: Any, number: int) -> None:  # noqa: ARG002
        """Of every token or sample."""
        _check_pair(output, reference, number, self.purpose)
        log_q, log_p = (F.log_softmax(logits.double(), -1) for logits in (output, reference))
        self._keep((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0))  # below 0 by rounding alone


class MSE(Meter):
    """Squared differences."""

    name, relative = "mse", True

    def add(self, output: Any, label: Any, reference: Any, number: int) -> None:  # noqa: ARG002
        """Of every sample's outputs."""
        _check_pair(output, reference, number, self.purpose, dims=1)
        self._keep((output.double() - reference.double()).square().reshape(len(output), -1).mean(1))


METERS: dict[str, type[Meter]] = {meter.name: meter for meter in (Top1, Nats, KL, MSE)}


def _rank(logits: Tensor, label: Tensor) -> Tensor:
    """How many classes come before the label's."""
    label = label.long()
    own = logits.gather(1, label[:, None])
    index = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > own) | ((logits == own) & (index < label[:, None]))
    return before.sum(1)


def _check_pair(output: Any, reference: Any, number: int, purpose: str, dims: int = 2) -> None:
    for tensor in (output, reference):
        if not isinstance(tensor, Tensor) or tensor.dim() < dims:
            shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            legal = "[N, ..., V]" if dims > 1 else "[N, ...]"
            raise RecoupError(f"{purpose}: model and reference must return outputs {legal}; got {shape}")
        _check_finite(tensor, number, purpose)
    if output.shape != reference.shape:
        shapes = f"{list(output.shape)} and {list(reference.shape)}"
        raise RecoupError(f"{purpose}: outputs of model and reference differ in shape: {shapes}")


def _check_finite(output: Tensor, number: int, purpose: str) -> None:
    if not bool(torch.isfinite(output).all()):
        raise RecoupError(f"{purpose}: the model's output holds NaN or infinity (batch {number})")


def _logits(output: Any, label: Tensor | None, number: int) -> Tensor:
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
    _check_finite(output, number, "evaluate")
    return output
