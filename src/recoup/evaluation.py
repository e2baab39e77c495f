"""How well a network does: accuracy of a classifier, nats per token of a language model, distance from float."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.network import ledger
from recoup.network.batches import call, count, prepared, split
from recoup.network.checks import is_module
from recoup.network.emulated import emulated_layers, running
from recoup.network.meters import METERS, Accuracy, Meter, Metric, Top1
from recoup.network.modes import compiled, evaluating
from recoup.network.reached import watching
from recoup.network.saturation import watching_sums
from recoup.storage.digest import OfSamples

__all__ = ["Accuracy", "Function", "Metric", "accuracy", "evaluate", "measure", "nats_per_token", "observe"]

Function = Callable[[nn.Module, Iterable[Any]], Any]
"""A measure of the user's own: ``measure(model, batches) -> float``, or a `Metric`."""


@overload
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    metric: Literal["top1"] = "top1",
    *,
    reference: nn.Module | None = None,
    progress: bool = False,
) -> Accuracy: ...
@overload
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    metric: str | Function,
    *,
    reference: nn.Module | None = None,
    progress: bool = False,
) -> Accuracy | Metric: ...
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    metric: str | Function = "top1",
    *,
    reference: nn.Module | None = None,
    progress: bool = False,
) -> Accuracy | Metric:
    """How well a network does on batches.

    =========  ========================================================================================================
    ``top1``   accuracy of a classifier: labels are class indices [N], outputs logits [N, V]
    ``nats``   mean cross-entropy: of a classifier, or of a language model's next token, whose labels are the following
               tokens [N, T] (-100: no label) and outputs [N, T, V]; its exponential is the perplexity
    ``kl``     mean over samples (tokens) of sum p log(p / q): p of the reference, q of the network, in nats; no labels
    ``mse``    mean squared difference from the reference's outputs; no labels
    callable   ``metric(model, batches)``, a float or a `Metric`; less or more may be better, as it likes
    =========  ========================================================================================================

    Args:
        model: it runs in eval mode without gradients and gets its own mode back, also after an error or an interrupt.
        batches: iterable of ``(input, label)`` (see `recoup.network.batches`).
        metric: see above.
        reference: of ``kl`` and ``mse``; by default the same network in mode float, with the batch norm statistics
            from before their repair.
        progress: whether to show a progress bar on standard error.

    Returns:
        For ``top1`` an `Accuracy`, which knows how every sample was answered, else a `Metric`. With fewer than five
        classes top5 counts all of them. Between equal outputs the class with the lower index comes first, so a
        constant network scores its share, not 100 %.

    Raises:
        RecoupError: no such metric; no batch, no labels, labels outside the classes, NaN or infinity in inputs or
            outputs; a float network without a reference; a callable that raises, or gives NaN: the batch is named.

    Warns:
        RecoupWarning: repairs that were fitted for other weights; layers whose sums saturate (unless compiled).

    >>> model = nn.Identity()
    >>> batches = [(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))]
    >>> evaluate(model, batches)
    Accuracy(top1=50.0, top5=100.0, count=2)
    >>> round(evaluate(model, batches, "nats").value, 4)
    0.7043
    """
    is_module(model, "evaluate")
    ledger.warn_stale(model, "evaluate")
    if callable(metric):
        with _saying_saturated(model):
            return _own(model, batches, metric, progress)
    if metric not in METERS:
        legal = ", ".join(map(repr, METERS))
        raise RecoupError(f"evaluate(metric={metric!r}): metric must be one of {legal}, or a callable(model, batches)")
    meter = Top1("evaluate", OfSamples()) if metric == Top1.name else METERS[metric]("evaluate")
    refer = _reference(model, reference, metric) if meter.relative else None
    with _saying_saturated(model):
        measure(model, batches, [meter], refer=refer, progress=progress)
    return meter.result()


def accuracy(model: nn.Module, batches: Iterable[Any], *, progress: bool = False) -> Accuracy:
    """Top-1 without a look at the ledger: for those who change hardware for the time of a measurement."""
    meter = Top1("evaluate")
    measure(model, batches, [meter], progress=progress)
    return meter.result()


def nats_per_token(model: nn.Module, batches: Iterable[Any], *, progress: bool = False) -> float:
    """The mean cross-entropy of the next token: `evaluate` with ``nats``, as a number."""
    return evaluate(model, batches, "nats", progress=progress).value


def observe(model: nn.Module, batches: Iterable[Any], meter: Meter) -> None:
    """`evaluate` with a meter of one's own, from which more than its result can be read.

    Args:
        model, batches: as in `evaluate`.
        meter: of `recoup.network.meters`, one that needs no reference; it is added to.
    """
    ledger.warn_stale(model, "evaluate")
    with _saying_saturated(model):
        measure(model, batches, [meter])


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    meters: Sequence[Meter],
    *,
    refer: Callable[[Any], Tensor] | None = None,
    progress: bool = False,
) -> None:
    """Show a network's outputs to several meters in one pass.

    Args:
        model: in eval mode without gradients.
        batches: see `evaluate`.
        meters: are added to.
        refer: the reference's output for an input, for meters that compare.
        progress: whether to show a progress bar.
    """
    purpose = meters[0].purpose

    def seen(inputs: Any, label: Any) -> None:
        for meter in meters:
            meter.seen(inputs, label)

    with _scoring(model, purpose):
        for number, (inputs, label) in enumerate(prepared(model, batches, purpose, progress, seen)):
            expected = None if refer is None else refer(inputs)
            output = call(model, inputs)
            for meter in meters:
                meter.add(output, label, expected, number)


def _reference(model: nn.Module, other: nn.Module | None, metric: str) -> Callable[[Any], Tensor]:
    if other is not None:
        if not isinstance(other, nn.Module):
            raise RecoupError(f"evaluate: reference must be a torch.nn.Module; got {type(other).__name__}")

        def of_other(inputs: Any) -> Tensor:
            with evaluating(other, eager=False):
                return call(other, inputs)

        return of_other
    if not emulated_layers(model):
        raise RecoupError(f"evaluate(metric={metric!r}): the model is in float, so reference= is needed")

    def in_float(inputs: Any) -> Tensor:
        with running(model, "float"), ledger.unrepaired_statistics(model):
            return call(model, inputs)

    return in_float


class _Watched:
    """Batches of a measure of the user's own: how many samples they hold, and which one was given last."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches, self.given, self.samples = batches, -1, 0

    def __iter__(self) -> Iterator[Any]:
        self.given, self.samples = -1, 0
        for batch in self.batches:
            self.given, self.samples = self.given + 1, self.samples + count(split(batch)[0])
            yield batch

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def _own(model: nn.Module, batches: Iterable[Any], metric: Function, progress: bool) -> Metric:  # noqa: ARG001
    name = getattr(metric, "__name__", type(metric).__name__)
    watched = _Watched(batches if hasattr(batches, "__len__") else list(batches))
    with _scoring(model, "evaluate"):
        value = _called(metric, name, model, watched)
        if isinstance(value, float) and math.isnan(value):
            raise RecoupError(f"evaluate: metric {name} gives NaN, {_where(metric, model, watched)}")
    if isinstance(value, Metric):
        return value
    return Metric(value, watched.samples)


def _called(metric: Function, name: str, model: nn.Module, batches: _Watched) -> Any:
    try:
        value = metric(model, batches)
    except RecoupError:
        raise
    except Exception as error:  # a measure of the user's own may fail in any way
        at = f" at batch {batches.given}" if batches.given >= 0 else ""
        raise RecoupError(f"evaluate: metric {name} failed{at}: {type(error).__name__}: {error}") from error
    if isinstance(value, Accuracy):
        return Metric(value.top1, value.count, value.interval)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = float(value)
    number = value.value if isinstance(value, Metric) else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise RecoupError(f"evaluate: metric {name} must give a number or a Metric; got {type(value).__name__}")
    return float("nan") if math.isnan(number) else value if isinstance(value, Metric) else float(number)


def _where(metric: Function, model: nn.Module, batches: _Watched) -> str:
    """Which batch alone gives NaN."""
    for number, batch in enumerate(batches.batches):
        try:
            value = metric(model, [batch])
            if math.isnan(float(value.value if isinstance(value, Metric | Accuracy) else value)):
                return f"from batch {number} on"
        except Exception:  # noqa: S112 -- it may be no measure of one batch
            continue
    return "from no batch alone"


def _saying_saturated(model: nn.Module) -> AbstractContextManager[None]:
    """Warn of layers whose sums saturate; compiled code does not count them."""
    return nullcontext() if compiled(model) else watching_sums(model, "evaluate")


@contextmanager
def _scoring(model: nn.Module, purpose: str) -> Iterator[None]:
    """In eval mode without gradients, compiled where it is compiled; emulated layers that never ran are said, unless
    compiled code, which calls no hooks, runs them."""
    layers = {} if compiled(model) else emulated_layers(model)
    with watching(layers, purpose, refuse=False), evaluating(model, eager=False), torch.no_grad():
        yield
