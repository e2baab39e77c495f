"""Throttling: fewer threads in the layers where they hurt, until the accuracy is within a budget."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.evaluation import Accuracy
from recoup.evaluation import accuracy as measured
from recoup.knapsack import Quantity, choose
from recoup.nbsmt.observe import Layer, Unit, in_mode, nbsmt_units
from recoup.network import ledger
from recoup.network.batches import call, prepared, reread
from recoup.network.modes import evaluating

M = TypeVar("M", bound=nn.Module)
Step = tuple[str, int]
"""A layer and the threads it goes down to."""


@dataclass(frozen=True, slots=True)
class Throttling:
    """Which layers to slow down, and what it does to the accuracy on the batches it was planned with.

    Attributes:
        threads: the slowed layers and the threads they keep.
        baseline: accuracy with 8-bit arithmetic in all NB-SMT layers.
        before: accuracy of the model as it was.
        after: accuracy with ``threads`` applied.
    """

    threads: dict[str, int]
    baseline: Accuracy
    before: Accuracy
    after: Accuracy

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def throttle_(model: M, batches: Iterable[Any], budget: float, *, progress: bool = False) -> M:
    """Apply `plan_throttling`: slow few layers, so that top-1 stays within ``budget`` points of 8-bit arithmetic.

    A slowed layer gets a config with fewer threads. Repairs that were fitted for more of them are taken back, all over
    the network, and a warning says so: run `recoup.repair_` afterwards. The plan is measured before that.

    Returns:
        The same model. After an error or an interrupt it is as before.
    """
    layers = nbsmt_units(model, "throttle_")
    with ledger.whole(model):
        threads = {name: layer.config.threads for name, layer in layers.items()}
        for layer in layers.values():
            ledger.take_back(layer, "threads")
        plan = plan_throttling(model, batches, budget, progress=progress)
        if any(plan.threads.get(name, layer.config.threads) != threads[name] for name, layer in layers.items()):
            ledger.begin_structure(model, "throttle_")
        slowed = {name: layer for name, layer in layers.items() if name in plan.threads}
        before = {name: {"config": layer.config} for name, layer in slowed.items()}
        for name, layer in slowed.items():
            layer.config = layer.config.replace(threads=plan.threads[name])
        ledger.record(model, slowed, "structure", "throttle_", before, slot="threads")
    return model


def plan_throttling(model: nn.Module, batches: Iterable[Any], budget: float, *, progress: bool = False) -> Throttling:
    """Find few layers to slow down, so that top-1 stays within ``budget`` points of 8-bit arithmetic.

    1. In one pass every layer is emulated alone, all others in 8 bits; its harm is the mean squared change of the
       model's output: with each of its numbers of threads, and with one thread too where it has an accumulator (one
       thread alone is 8-bit arithmetic, which does no harm).
    2. Bisection finds how many steps 4 -> 2 and 2 -> 1 meet the budget; for a number of steps, those that leave the
       least harm are a knapsack (`recoup.knapsack`). Where those found miss it, all steps there are are tried.
    3. From the least useful one on, steps are taken back where the budget allows it.

    What is minimised is the number of steps: each halves the speed of one layer, or of both products of one attention.
    Accuracy need not be monotonic in them, so a smaller set may exist; the one returned is measured to meet the budget.

    Args:
        model: a classifier after `emulate_`; run after `reorder_` and before repairs, or on a repaired model.
        batches: labelled data, read about 2 + log2(steps) + (slowed layers) times (the batches of a generator are kept
            in memory); they must be the same on every reading.
        budget: percentage points of top-1 that may be lost against 8-bit arithmetic on the same batches, 0 or more.
        progress: whether to show progress bars.

    Returns:
        The plan; the model is as before.

    Raises:
        RecoupError: a negative or non-finite budget, no NB-SMT layer, an output that is no tensor of logits, no or
            bad batches, no labels, batches that differ from reading to reading, accumulators that miss the budget with
            one thread in every layer.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 <= budget < float("inf"):
        raise RecoupError(f"throttle_(budget={budget!r}): budget must be a number of percentage points, 0 or more")
    layers = nbsmt_units(model, "throttle_")
    batches = reread(batches, "throttle_")
    with in_mode(layers, "baseline"):
        baseline = measured(model, batches, progress=progress)
    floor = baseline.top1 - budget - 1e-9  # 1e-9: percentages are quotients, rounded

    def accuracy(steps: Sequence[Step]) -> Accuracy:
        with in_mode(layers, "emulate"), _slowed(layers, steps):
            return measured(model, batches, progress=progress)

    before = after = accuracy(())
    if before.top1 >= floor:
        return Throttling({}, baseline, before, before)
    harm = _harm(model, layers, batches, progress)
    every = sum(len(_ladder(layer)) for layer in layers.values())
    kept, found = _fewest(every, floor, lambda count: _of_least_harm(harm, layers, count), accuracy)
    after = accuracy(kept) if found is None else found
    if after.top1 < floor:  # layers that do no harm alone take no step, and may do some together
        kept = _every_step(layers)
        after = accuracy(kept)
    if after.top1 < floor:
        raise RecoupError(
            f"throttle_(budget={budget!r}): with one thread in every layer top-1 is {after.top1:.4g}, with 8-bit "
            f"arithmetic {baseline.top1:.4g}: {_why(layers)}"
        )
    kept, after = _taken_back(kept, after, floor, accuracy)
    slowed = dict(kept)  # where a layer takes both steps, the one to a single thread comes last
    return Throttling(slowed, baseline, before, after)


def _why(layers: dict[str, Unit]) -> str:
    """Why one thread everywhere is not 8-bit arithmetic."""
    if any(layer.config.accumulator is not None for layer in layers.values()):
        return "the accumulators cost more than the budget, and fewer threads do not widen them"
    return "though both are the same: the batches differ from reading to reading"


def _fewest(
    every: int,
    floor: float,
    steps_of: Callable[[int], Sequence[Step]],
    accuracy: Callable[[Sequence[Step]], Accuracy],
) -> tuple[Sequence[Step], Accuracy | None]:
    """By bisection few steps that reach ``floor``, and their accuracy; None where those of all were not measured."""
    low, high = 0, every  # `low` steps miss the budget, `high` meet it or are not measured
    kept, after = steps_of(high), None
    while high - low > 1:
        middle = (low + high) // 2
        steps = steps_of(middle)
        found = accuracy(steps)
        if found.top1 >= floor:
            high, kept, after = middle, steps, found
        else:
            low = middle
    return kept, after


def _taken_back(
    kept: Sequence[Step], after: Accuracy, floor: float, accuracy: Callable[[Sequence[Step]], Accuracy]
) -> tuple[Sequence[Step], Accuracy]:
    """The steps without those that the budget can spare, the least useful tried first, and their accuracy."""
    for step in reversed(kept):
        name, threads = step
        if threads == 2 and (name, 1) in kept:
            continue
        rest = [other for other in kept if other != step]
        found = accuracy(rest)
        if found.top1 >= floor:
            kept, after = rest, found
    return kept, after


@contextmanager
def _slowed(layers: dict[str, Unit], steps: Sequence[Step]) -> Iterator[None]:
    """The layers with those steps taken; then as before."""
    before = {name: layers[name].config for name, _ in steps}
    corrected = {name: layer for name, _ in steps if isinstance(layer := layers[name], Layer)}
    corrections = {name: layer.bias_correction for name, layer in corrected.items()}
    try:
        for name, threads in steps:
            layers[name].config = layers[name].config.replace(threads=threads)
        for layer in corrected.values():
            layer.bias_correction = None
        yield
    finally:
        for name, config in before.items():
            layers[name].config = config
        for name, layer in corrected.items():
            layer.bias_correction = corrections[name]


@torch.no_grad()
def _harm(
    model: nn.Module, layers: dict[str, Unit], batches: Iterable[Any], progress: bool
) -> dict[str, dict[int, float]]:
    """Squared change of the model's output by each layer alone, by its number of threads, summed over the batches."""
    harm = {name: dict.fromkeys(_measured(layer), 0.0) for name, layer in layers.items()}
    with evaluating(model), in_mode(layers, "baseline"):
        for inputs, _ in prepared(model, batches, "throttle_ (rank)", progress):
            exact = call(model, inputs)
            for name, by_threads in harm.items():
                for threads in by_threads:
                    steps = [(name, threads)] if threads != layers[name].config.threads else []
                    with in_mode({name: layers[name]}, "emulate"), _slowed(layers, steps):
                        difference: Tensor = call(model, inputs) - exact
                    by_threads[threads] += float(difference.double().square().sum())
    return harm


def _ladder(layer: Unit) -> list[int]:
    """The thread counts above one that a layer may run: its own and, for four, two."""
    return [] if layer.caveat() is not None else [t for t in (4, 2) if t <= layer.config.threads]


def _measured(layer: Unit) -> list[int]:
    """The thread counts that may do harm: one thread does where its accumulator is too narrow."""
    ladder = _ladder(layer)
    return [*ladder, 1] if ladder and layer.config.accumulator is not None else ladder


def _every_step(layers: dict[str, Unit]) -> list[Step]:
    """All steps there are, a layer's in order."""
    return [(name, threads) for name, layer in layers.items() for _, threads in pairwise([*_ladder(layer), 1])]


def _of_least_harm(harm: dict[str, dict[int, float]], layers: dict[str, Unit], count: int) -> list[Step]:
    """The steps, ``count`` at most, that leave the least harm; those that remove the most first, a layer's in order."""
    able = {name: [*_ladder(layers[name]), 1] for name in harm if _ladder(layers[name])}
    left = [[harm[name].get(threads, 0.0) for threads in ladder] for name, ladder in able.items()]
    steps = Quantity([list(range(len(row))) for row in left])
    found = choose(Quantity(left), [(steps, count)])
    assert found is not None  # no step at all is always a choice
    scored: list[tuple[float, int, Step]] = []
    for (name, ladder), taken in zip(able.items(), found.options, strict=True):
        least = float("inf")
        for before, threads in pairwise(ladder[: taken + 1]):
            least = min(least, harm[name][before] - harm[name].get(threads, 0.0))
            scored.append((-least, -threads, (name, threads)))
    return [step for _, _, step in sorted(scored, key=lambda entry: entry[:2])]
