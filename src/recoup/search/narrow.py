"""The narrowest accumulator of every layer that keeps a network within an accuracy budget."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from recoup.emulate import emulate_, restore_
from recoup.errors import RecoupError
from recoup.evaluation import evaluate
from recoup.lba.config import LBA
from recoup.lba.profiling import profile
from recoup.lba.repair import correct_gain_
from recoup.network.emulated import emulated_layers
from recoup.storage.digest import of_batches, of_model
from recoup.storage.files import write_atomically

CANDIDATES = tuple(
    LBA.biased(m, e) for m, e in ((10, 5), (9, 5), (8, 5), (7, 4), (6, 4), (5, 4), (4, 4), (4, 3), (3, 3))
)
"""Accumulators from 16 to 7 bits, the widest first."""


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
    """Search the narrowest accumulator per layer by coordinate descent.

    First the narrowest candidate that all layers bear together; from there each layer in turn, the one with the least
    residual first, takes the narrowest candidate that keeps the network's accuracy within ``budget`` points of float.
    A layer that the first batch does not run keeps the common one.
    It is deterministic; a general optimiser would spend its trials on learning what the ordering says already.

    Args:
        model: in float; it is given back in float.
        batches: labelled; what accuracy is measured on. Search on training or validation images, not on the test set.
        budget: points of top-1 that may be lost.
        candidates: the accumulators to choose from, the widest first.
        calibration: inputs for a gain per channel, fitted anew for every network measured; None: no repair.
        log: a JSON file that keeps every measurement, so that an interrupted search goes on where it stopped. It
            belongs to the model's tensors and to both sets of batches in their order.
        progress: called with a line per measurement.

    Raises:
        RecoupError: an emulated model, no candidates, no candidate within the budget, a log of another search.
    """
    if emulated_layers(model):
        raise RecoupError("search.narrowest: the model is emulated already: restore_ it first")
    if not candidates:
        raise RecoupError("search.narrowest: candidates is empty")
    trial = _Trial(model, batches, calibration, log, progress)
    reference = trial.accuracy(None)
    names, uniform = trial.names(candidates[0]), {}
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
    chosen, best = dict.fromkeys(names, start), uniform[start]
    for name in trial.by_residual(candidates[-1]):
        for config in reversed(candidates[candidates.index(start) + 1 :]):
            accuracy = trial.accuracy({**chosen, name: config})
            if accuracy >= reference - budget:
                chosen[name], best = config, accuracy
                break
    bits = sum(config.accumulator.bits for config in chosen.values()) / len(chosen)
    return Found(chosen, best, reference, uniform, bits, trial.evaluations)


class _Trial:
    """Measures assignments, each once."""

    def __init__(self, model: nn.Module, batches: Any, calibration: Any, log: Any, progress: Any) -> None:
        self.model, self.batches, self.calibration, self.progress = model, batches, calibration, progress
        self.path = None if log is None else Path(log)
        self.identity = {}
        self.known: dict[str, float] = {}
        self.evaluations = 0
        if self.path is not None:
            fitted = None if calibration is None else of_batches(calibration)
            self.identity = {"model": of_model(model), "batches": of_batches(batches), "calibration": fitted}
            if self.path.exists():
                self.known = self._kept(self.path)

    def _kept(self, path: Path) -> dict[str, float]:
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

    def names(self, config: LBA) -> list[str]:
        """The layers an LBA takes."""
        emulate_(self.model, config)
        try:
            return list(emulated_layers(self.model))
        finally:
            restore_(self.model)

    def by_residual(self, config: LBA) -> list[str]:
        """Layers that run, the one that a narrow accumulator disturbs least first."""
        emulate_(self.model, config)
        try:
            rows = profile(self.model, self.batches, outputs=512)
        finally:
            restore_(self.model)
        return [row.name for row in sorted(rows, key=lambda row: row.residual)]

    def accuracy(self, assignment: dict[str, LBA] | None) -> float:
        """Top-1 with an assignment; None is float."""
        key = json.dumps({name: repr(config) for name, config in (assignment or {}).items()})
        if key not in self.known:
            self.known[key] = self._measure(assignment)
            self.evaluations += 1
            if self.path is not None:
                write_atomically(self.path, json.dumps({**self.identity, "accuracy": self.known}, indent=1))
            if self.progress is not None:
                self.progress(f"{self.evaluations} networks measured, the last {self.known[key]:.2f} %")
        return self.known[key]

    def _measure(self, assignment: dict[str, LBA] | None) -> float:
        if assignment is None:
            return evaluate(self.model, self.batches).top1
        try:
            emulate_(self.model, None, layers=assignment)
            if self.calibration is not None:
                correct_gain_(self.model, self.calibration)
            return evaluate(self.model, self.batches).top1
        finally:
            restore_(self.model)
