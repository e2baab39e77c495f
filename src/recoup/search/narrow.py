"""The narrowest accumulator of every layer that keeps a network within an accuracy budget."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recoup.costs import takes
from recoup.errors import RecoupError
from recoup.knapsack import Quantity, choose
from recoup.lba.config import LBA
from recoup.network.batches import call, prepared
from recoup.network.checks import instance
from recoup.network.emulated import emulated_layers
from recoup.network.modes import evaluating
from recoup.search.bench import Bench, kept
from recoup.storage.digest import of_batches, of_model
from recoup.storage.files import write_atomically

CANDIDATES = tuple(
    LBA.biased(m, e) for m, e in ((10, 5), (9, 5), (8, 5), (7, 4), (6, 4), (5, 4), (4, 4), (4, 3), (3, 3))
)
"""Accumulators from 16 to 7 bits, the widest first."""
METRICS = ("top1", "kl")


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        layers: layer name -> config: a layer map for `emulate_`. It holds no gains: if the search fitted them, call
            `recoup.lba.correct_gain_` after `emulate_`, or the accuracy is another.
        accuracy: top-1 with it, in percent, on the batches searched with.
        reference: top-1 of the float network.
        uniform: top-1 with every candidate in all layers, as far as they were tried.
        bits: mean accumulator bits over the layers.
        evaluations: networks measured.
    """

    layers: dict[str, LBA]
    accuracy: float
    reference: float
    uniform: dict[LBA, float]
    bits: float
    evaluations: int


def narrowest(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: float = 0.5,
    candidates: Sequence[LBA] = CANDIDATES,
    calibration: Iterable[Any] | None = None,
    log: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Found:
    """Search the narrowest accumulator per layer: `recoup.search.score` and a knapsack for one wing and one cost.

    First the narrowest candidate that all layers bear together. From there every narrower candidate is scored in each
    layer alone (KL of the outputs from float, less that of the common candidate), and a knapsack finds for a number of
    bits the layers that bear it best; bisection finds the least number whose network keeps the accuracy within
    ``budget`` points of float. Every reported network was measured. A layer that never runs keeps the common one.

    Args:
        model: in float; it is not touched.
        batches: labelled; what accuracy is measured on. Search on training or validation images, not on the test set.
        budget: points of top-1 that may be lost.
        candidates: the accumulators to choose from, the widest first.
        calibration: inputs for a gain per channel, fitted anew for every network measured; None: no repair.
        log: a JSON file that keeps every measurement, so that an interrupted search goes on where it stopped. It
            belongs to the model's tensors and to both sets of batches in their order.
        progress: called with a line per measurement.

    Raises:
        RecoupError: an emulated model, a budget below 0 or NaN, no candidates, no candidate within the budget, a log of
            another search.
    """
    if emulated_layers(model, "search.narrowest"):
        raise RecoupError("search.narrowest: the model is emulated already: restore_ it first")
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 <= budget < float("inf"):
        raise RecoupError(f"search.narrowest(budget={budget!r}): budget must be a number of points, 0 or more")
    if not isinstance(candidates, Sequence) or not candidates:
        raise RecoupError(f"search.narrowest(candidates={candidates!r}): candidates must be a list of LBA configs")
    for candidate in candidates:
        instance(candidate, LBA, "search.narrowest", "every one of candidates", "LBA.m7e4()")
    trial = _Trial(model, kept(batches), None if calibration is None else kept(calibration), log, progress)
    reference = trial.accuracy({})
    names, uniform = [name for name, module in model.named_modules() if takes(LBA, module)], {}
    if not names:
        raise RecoupError("search.narrowest: the model has no layer that runs on narrow accumulators")
    start: LBA | None = None
    for config in candidates:
        uniform[config] = trial.accuracy(dict.fromkeys(names, config))
        if uniform[config] < reference - budget:
            break
        start = config
    if start is None:
        raise RecoupError(
            f"search.narrowest: even {candidates[0]!r} in all layers falls from {reference:.2f} to "
            f"{uniform[candidates[0]]:.2f} %, more than budget={budget}: offer wider candidates or a repair"
        )
    narrower = [start, *candidates[candidates.index(start) + 1 :]]
    common = dict.fromkeys(names, start)
    chosen, best = trial.narrowed(common, narrower, uniform[start], reference - budget)
    bits = sum(config.accumulator.bits for config in chosen.values()) / len(chosen)
    return Found(chosen, best, reference, uniform, bits, trial.evaluations)


def _that_run(model: nn.Module, batches: Iterable[Any], names: Sequence[str]) -> list[str]:
    """Of some layers, those that the first batch runs."""
    ran: dict[str, None] = {}

    def note(name: str) -> Any:
        return lambda *_: ran.setdefault(name)

    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_pre_hook(note(name)) for name in names]
    try:
        with evaluating(model), torch.no_grad():
            call(model, next(prepared(model, batches, "search.narrowest"))[0])
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in names if name in ran]


class _Trial:
    """Measures assignments, each once."""

    def __init__(self, model: nn.Module, batches: Any, calibration: Any, log: Any, progress: Any) -> None:
        self.model, self.batches, self.progress = model, batches, progress
        repaired = calibration is not None
        self.bench = Bench(
            model, batches, METRICS, calibration if repaired else batches, "gain" if repaired else "none"
        )
        self.path = None if log is None else Path(log)
        self.identity = {}
        self.known: dict[str, dict[str, float]] = {}
        self.evaluations = 0
        if self.path is not None:
            fitted = None if calibration is None else of_batches(calibration)
            self.identity = {"model": of_model(model), "batches": of_batches(batches), "calibration": fitted}
            if self.path.exists():
                self.known = self._kept(self.path)

    def _kept(self, path: Path) -> dict[str, dict[str, float]]:
        """What an earlier run measured, if it was this search."""
        try:
            content = json.loads(path.read_text("utf-8"))
            theirs, known = {name: content.get(name) for name in self.identity}, dict(content["accuracy"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecoupError(f"search.narrowest: {path} is no log of a search ({error})") from None
        others = {"model": "another model", "batches": "other batches", "calibration": "another calibration"}
        for name, other in others.items():
            if theirs[name] != self.identity[name]:
                raise RecoupError(
                    f"search.narrowest: {path} is the log of a search with {other}: choose another file, or delete it"
                )
        return known

    def narrowed(
        self, common: dict[str, LBA], options: Sequence[LBA], accuracy: float, floor: float
    ) -> tuple[dict[str, LBA], float]:
        """The assignment with the fewest bits that reaches ``floor``, from the common one that does; its accuracy."""
        layers = _that_run(self.model, self.batches, list(common))
        base = self.measured(common)["kl"]
        damages = [
            [max(self.measured({**common, name: option})["kl"] - base, 0.0) for option in options] for name in layers
        ]
        bits = Quantity([[option.accumulator.bits for option in options] for _ in layers])
        chosen, best = common, accuracy
        widest = bits.of([0] * len(layers))
        low, high = (
            min(map(min, bits.each)) * len(layers) - 1,
            int(widest),
        )  # `low` bits are none, `high` reach the floor
        while high - low > 1:
            middle = (low + high) // 2
            found = choose(Quantity(damages), [(bits, middle)])
            assert found is not None  # the narrowest option everywhere
            tried = {**common, **{name: options[o] for name, o in zip(layers, found.options, strict=True)}}
            reached = self.accuracy(tried)
            if reached >= floor:
                chosen, best, high = tried, reached, int(bits.of(found.options))
            else:
                low = middle
        return chosen, best

    def accuracy(self, assignment: Mapping[str, LBA]) -> float:
        """Top-1 with an assignment; an empty one is float."""
        return self.measured(assignment)["top1"]

    def measured(self, assignment: Mapping[str, LBA]) -> dict[str, float]:
        """Top-1 and KL from float, once."""
        key = json.dumps({name: repr(config) for name, config in assignment.items()})
        if not isinstance(self.known.get(key), dict):
            value = self.bench.measured(assignment, "of the search")
            self.known[key] = {name: value[name]["value"] for name in METRICS}
            self.evaluations += 1
            if self.path is not None:
                write_atomically(self.path, json.dumps({**self.identity, "accuracy": self.known}, indent=1))
            if self.progress is not None:
                self.progress(f"{self.evaluations} networks measured, the last {self.known[key]['top1']:.2f} %")
        return self.known[key]
