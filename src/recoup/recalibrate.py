"""Post-training BatchNorm recalibration: new running statistics, no gradient, no weight change.

Emulated hardware shifts the statistics inside a network. Recomputing only the running mean and variance of its batch
norms, with the hardware on, wins back much of the accuracy (Shomron and Weiser, "Post-Training BatchNorm
Recalibration", 2020). The paired method is ours.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from recoup.errors import RecoupError
from recoup.network import ledger
from recoup.network.batches import call, count, prepared
from recoup.network.checks import is_module
from recoup.network.emulated import emulated_layers, running
from recoup.network.modes import evaluating
from recoup.network.norms import Statistics, check_changeable, tracking_norms
from recoup.network.passes import measured, state
from recoup.network.reached import say_missed, watching
from recoup.network.wing import Repair

Method = Literal["paired", "average", "ema"]
M = TypeVar("M", bound=nn.Module)


def recalibrate_(
    model: M,
    batches: Iterable[Any],
    method: Method = "paired",
    *,
    baseline: nn.Module | None = None,
    progress: bool = False,
) -> M:
    """Recompute the running statistics of a model's batch norms, in place.

    The batch norms alone run in train mode, so every layer sees inputs normalised by batch statistics; dropout and
    everything else stay in eval mode. With batch means m_b, unbiased batch variances and their population form v_b:

    - ``average``: mean = mean of m_b, var = mean of v_b + variance of m_b, both weighted by the values of a batch per
      channel: the mean and the population variance of all samples (stored unbiased, as torch does).
    - ``ema``: PyTorch's momentum update, starting from the stored statistics (the authors' code).
    - ``paired`` (ours): both statistics are averaged twice over the same batches, with the emulation off (8-bit) and
      on, and the *stored* ones move by the difference: mean += mean_on - mean_off, var *= var_on / var_off. It
      corrects what the hardware did and nothing else, so the images need not match the training distribution and
      their sampling noise cancels. A channel keeps its variance where var_off = 0, and where var_on = 0: what the
      hardware makes constant says nothing of its scale, and a variance of 0 would multiply any other input by 300.

    LightNorm layers in ``average`` and ``ema`` measure what they measure in training, the range; in ``paired`` the mean
    and variance of their rounded inputs, since a converted network's statistics, and the other run's, are moments.

    Args:
        model: any module with batch norms that track running statistics.
        batches: calibration data, 10^3 to 10^4 images; ``average`` and ``ema`` need the training augmentation.
            Read once; each batch serves both runs of ``paired``.
        method: see above.
        baseline: for ``paired`` on a model that is not emulated: the same network without the change, with batch
            norms of the same names (left as it is).
        progress: whether to show a progress bar.

    A second call replaces the first: it starts from the statistics before it, so twice is once.

    Returns:
        The same model. After an error or an interrupt all statistics are as before.

    Raises:
        RecoupError: no batch norm with running statistics, none that ran, nothing to pair with, unknown method, no or
            bad batches, batches with one value per channel.

    Warns:
        RecoupWarning: batch norms that never ran; they keep their statistics.
    """
    _check(model, method, baseline)
    norms = _norms(model)
    kept = emulated_layers(model) or baseline is not None  # without hardware it is an ordinary re-estimation
    with ledger.whole(model):
        for norm in norms.values():
            ledger.take_back(norm, "statistics")
        before = {name: ledger.statistics(norm) for name, norm in norms.items()}
        if method == "paired":
            images = _paired(model, norms, batches, baseline, progress)
        else:
            images = (_average if method == "average" else _ema)(model, norms, batches, progress)
        if kept:
            ledger.record(model, norms, "statistics", "recalibrate_", before, images=images)
    return model


def _check(model: nn.Module, method: str, baseline: nn.Module | None) -> None:
    is_module(model, "recalibrate_")
    if not isinstance(method, str) or method not in get_args(Method):
        raise RecoupError(f"recalibrate_(method={method!r}): method must be one of {', '.join(get_args(Method))}")
    if baseline is not None:
        is_module(baseline, "recalibrate_(baseline)")
    if method != "paired" and baseline is not None:
        raise RecoupError(f"recalibrate_(method={method!r}): baseline belongs to method 'paired'")
    if method == "paired" and baseline is None and not emulated_layers(model):
        raise RecoupError(
            "recalibrate_(method='paired') compares a model with and without its hardware: emulate_ it first, pass "
            "baseline=, or choose method='average'"
        )


@dataclass
class Moments:
    """Running sums, in float64, over the batches one batch norm has seen: of n, n m, n m^2 and n v, with n the values
    of a batch per channel, m its mean and v its population variance. Batches weigh by their values."""

    batches: int = 0
    values: int = 0
    mean: Tensor | float = 0.0
    square: Tensor | float = 0.0
    variance: Tensor | float = 0.0

    def add(self, mean: Tensor, unbiased: Tensor, values: int) -> None:
        """One batch: its mean and unbiased variance per channel over ``values`` values."""
        mean, unbiased = mean.double(), unbiased.double()
        self.batches, self.values = self.batches + 1, self.values + values
        self.mean, self.square = self.mean + values * mean, self.square + values * (mean * mean)
        self.variance = self.variance + unbiased * (values - 1)

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Mean, and unbiased variance, over all batches."""
        assert isinstance(self.mean, Tensor)
        assert isinstance(self.square, Tensor)
        assert isinstance(self.variance, Tensor)
        mean = self.mean / self.values
        population = self.variance / self.values + (self.square / self.values - mean * mean).clamp_min(0)
        return mean, population * (self.values / (self.values - 1))


def _forward(model: nn.Module, norms: dict[str, _BatchNorm], inputs: Any, into: dict[str, Moments] | None) -> None:
    """One forward pass with ``norms`` on batch statistics, added to ``into``; stored statistics are overwritten."""

    def observe(name: str) -> Any:
        def hook(norm: _BatchNorm, args: tuple, _: Any) -> None:
            assert into is not None
            into[name].add(*_stored(norm), args[0].numel() // args[0].shape[1])

        return hook

    hooks = [norm.register_forward_hook(observe(name)) for name, norm in norms.items()] if into is not None else []
    try:
        call(model, inputs)
    except ValueError as error:
        if isinstance(error, RecoupError) or "more than 1 value per channel" not in str(error):
            raise
        raise RecoupError(f"recalibrate_: a batch is too small for batch statistics: {error}") from None
    finally:
        for hook in hooks:
            hook.remove()


Seen = tuple[dict[str, Moments], int]  # what each norm saw, and how many images that was


def _paired(
    model: nn.Module, norms: dict[str, _BatchNorm], batches: Iterable[Any], baseline: nn.Module | None, progress: bool
) -> int:
    other = norms if baseline is None else _norms(baseline)
    if other.keys() != norms.keys():
        odd = sorted(other.keys() ^ norms.keys())[0]
        raise RecoupError(f"recalibrate_: batch norm {odd!r} is in only one of model and baseline")

    def off() -> AbstractContextManager[None]:
        return running(model, "baseline") if baseline is None else nullcontext()

    def make(places: Sequence[int]) -> list[Seen]:
        """The run with the emulation off, at place 0, on, at 1, or both, batch by batch."""
        seen, images = [{name: Moments() for name in norms} for _ in range(2)], 0
        for inputs, _ in prepared(model, batches, "recalibrate_ (paired)", progress):
            if 0 in places:
                with off():
                    _forward(baseline or model, other, inputs, seen[0])
            if 1 in places:
                _forward(model, norms, inputs, seen[1])
            images += count(inputs)
        return [(seen[place], images) for place in places]

    with ExitStack() as both:  # entered in this order: each changes what the one before found
        both.enter_context(_measuring(model, norms))
        if baseline is not None:
            both.enter_context(_measuring(baseline, other))
        both.enter_context(_by_moments([*norms.values(), *other.values()]))
        with off():
            states = [None if baseline is not None else _state(model, norms)]
        states += [None if baseline is not None else _state(model, norms)]
        (before, _), (after, images) = measured(states, make, _left(model, norms))
    _say_missed(norms, *([before] if baseline is None else []), after)
    moved = {}
    for name, norm in norms.items():
        if not after[name].batches:
            continue  # a batch norm the model never ran keeps its statistics
        (mean_off, var_off), (mean_on, var_on) = before[name].pooled(), after[name].pooled()
        mean, variance = _stored(norm)
        ratio = torch.where((var_off > 0) & (var_on > 0), var_on / var_off, 1.0)
        moved[norm] = (mean.double() + (mean_on - mean_off), variance.double() * ratio)
    _store(model, moved)
    return images


def _average(model: nn.Module, norms: dict[str, _BatchNorm], batches: Iterable[Any], progress: bool) -> int:
    def make(_wanted: Sequence[int]) -> list[Seen]:
        seen, images = {name: Moments() for name in norms}, 0
        for inputs, _ in prepared(model, batches, "recalibrate_ (average)", progress):
            _forward(model, norms, inputs, seen)
            images += count(inputs)
        return [(seen, images)]

    with _measuring(model, norms):
        ((seen, images),) = measured([_state(model, norms)], make, _left(model, norms))
    _say_missed(norms, seen)
    _store(model, {norm: seen[name].pooled() for name, norm in norms.items() if seen[name].batches})
    return images


def _state(model: nn.Module, norms: dict[str, _BatchNorm]) -> Hashable:
    """What decides the batch statistics: that some norms estimate and others measure, too."""
    return state(model, "moments", tuple((name, getattr(norm, "by_moments", None)) for name, norm in norms.items()))


def _left(model: nn.Module, norms: dict[str, _BatchNorm]) -> Callable[[], Hashable]:
    """The network but for the statistics, which are put back."""
    return lambda: state(model, writes=set(norms.values()))


def _say_missed(norms: dict[str, _BatchNorm], *seen: dict[str, Moments]) -> None:
    missed = {name: norm for name, norm in norms.items() if not any(one[name].batches for one in seen)}
    say_missed(missed, len(norms), "recalibrate_", kind="batch norms")


def _ema(model: nn.Module, norms: dict[str, _BatchNorm], batches: Iterable[Any], progress: bool) -> int:
    images = 0
    watch = watching(norms, "recalibrate_", kind="batch norms")
    with Statistics.all_or_none(model), watch, _training(model, norms), torch.no_grad():
        for inputs, _ in prepared(model, batches, "recalibrate_ (ema)", progress):
            _forward(model, norms, inputs, None)
            images += count(inputs)
    return images


def _stored(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


@torch.no_grad()
def _store(model: nn.Module, moved: dict[_BatchNorm, tuple[Tensor, Tensor]]) -> None:
    """Write all statistics, or none."""
    with Statistics.all_or_none(model):
        for norm, values in moved.items():
            for buffer, value in zip(_stored(norm), values, strict=True):
                buffer.copy_(value)


def _training(model: nn.Module, norms: dict[str, _BatchNorm]) -> AbstractContextManager[None]:
    """These batch norms in train mode, everything else in eval mode."""
    chosen = set(norms.values())
    return evaluating(model, lambda module: module in chosen)


@contextmanager
def _measuring(model: nn.Module, norms: dict[str, _BatchNorm]) -> Iterator[None]:
    """Batch norms in train mode with momentum 1, so that after a forward they hold that batch's statistics; then both
    as before."""
    statistics, momenta = Statistics.of(model), {norm: norm.momentum for norm in norms.values()}
    try:
        with _training(model, norms), torch.no_grad():
            for norm in momenta:
                norm.momentum = 1.0
            yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        statistics.put(model)


@contextmanager
def _by_moments(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Norms that estimate the variance (LightNorm, by the range) measure it, as those they are paired with do."""
    others = [norm for norm in norms if hasattr(norm, "by_moments")]
    try:
        for norm in others:
            norm.by_moments = True  # type: ignore[assignment]
        yield
    finally:
        for norm in others:
            norm.by_moments = False  # type: ignore[assignment]


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    norms = tracking_norms(model)
    check_changeable(model, "recalibrate_")
    if not norms:
        raise RecoupError(
            "recalibrate_: the model has no batch norm with running statistics; for other networks use correct_bias_"
        )
    for name, norm in norms.items():
        if not norm.eps > 0:
            raise RecoupError(
                f"recalibrate_: batch norm {name!r} has eps={norm.eps!r}; with statistics of a batch it must be above 0"
            )
    return norms


AVERAGE = Repair(
    "recalibrated on hardware",
    "statistics",
    "BatchNorm statistics averaged over the calibration images with the hardware on.",
    "recalibration on the hardware",
    lambda model, batches: recalibrate_(model, batches, "average"),
    needs_norms=True,
    short="average",
    records=True,
)
PAIRED = Repair(
    "paired",
    "statistics",
    "The same images run with the hardware off and on, and the stored statistics move by the difference: recoup's "
    "repair. It corrects what the hardware did and nothing else.",
    "paired recalibration",
    lambda model, batches: recalibrate_(model, batches, "paired"),
    needs_norms=True,
    records=True,
)
