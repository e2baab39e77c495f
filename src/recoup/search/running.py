"""A search from its recipe: load, score, sweep, measure, and leave everything in the folder."""

from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from recoup.data import Dataset
from recoup.data import load as load_data
from recoup.data.loading import TooFewError, rest
from recoup.errors import RecoupError
from recoup.network.systolic import Array
from recoup.search.bench import kept
from recoup.search.fronts import Front, Point, front
from recoup.search.prices import affordable
from recoup.search.recipe import SearchRecipe
from recoup.search.refining import ENOUGH, refine
from recoup.search.results import SearchResults, results_of
from recoup.search.scoring import Plan, Scores, plan, score, sizes_of
from recoup.search.tasks import Progress, Shard
from recoup.search.verifying import verify
from recoup.storage.folder import make
from recoup.study import sources
from recoup.study.quality import NATS, TOP1
from recoup.study.sources import Texts

Stage = Literal["plan", "score", "front", "verify", "run"]
TRAINED_ON = (
    "Options were scored on {samples} of the {part} part of the data. A network loses less on what it was trained on, "
    "so predictions may be too small for others; measured points are not concerned."
)


@dataclass(frozen=True)
class How:
    """Where and how measurements are made, and who is told."""

    workers: int = 1
    executor: Executor | None = None
    shard: Shard | None = None
    any_cpu: bool = False
    progress: Progress | None = None

    def options(self) -> dict[str, Any]:
        """For `score` and `verify`."""
        return {name: getattr(self, name) for name in ("workers", "executor", "shard", "any_cpu", "progress")}


class Source(Protocol):
    """A recipe's network and the batches it is scored, calibrated and tested on."""

    @property
    def model(self) -> nn.Module:
        """In float."""
        ...

    @property
    def sample(self) -> str:
        """What it is measured on is counted in."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the results must know of the scored samples."""
        ...

    def scoring(self) -> Iterable[Any]:
        """Batches that options are scored on."""
        ...

    def calibration(self, seed: int) -> Iterable[Any]:
        """Batches for scales and repairs, of a draw."""
        ...

    def test(self) -> Iterable[Any]:
        """Batches that the front is measured on."""
        ...


@dataclass(frozen=True)
class Images:
    """A network and labelled images."""

    recipe: SearchRecipe
    model: nn.Module
    sample = TOP1.sample

    def scoring(self) -> Iterable[Any]:
        """Drawn from the split for scoring, never from what is tested on."""
        return self._scored.batches(self.recipe.scoring.batch_size)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the scoring images may be too kind to."""
        return (
            () if self._scored.split == self._tested.split else (TRAINED_ON.format(samples="images", part="training"),)
        )

    @cached_property
    def _scored(self) -> Dataset:
        """As `recoup.search.recipe.Scoring` says."""
        wanted, test, data = self.recipe.scoring, self.recipe.test, self.recipe.data
        if wanted.split not in (None, test.split):
            return load_data(data, wanted.split, limit=wanted.images, seed=wanted.seed)
        try:
            most = test.limit or len(self._tested)
            return rest(data, test.split, limit=most, seed=test.seed, take=wanted.images, drawn=wanted.seed)
        except TooFewError as error:
            if wanted.split == test.split:
                raise RecoupError(f"scoring.split, scoring.images: images that are not tested on: {error}") from None
            return load_data(data, "train", limit=wanted.images, seed=wanted.seed)

    @cached_property
    def _tested(self) -> Dataset:
        wanted = self.recipe.test
        return load_data(self.recipe.data, wanted.split, limit=wanted.limit, seed=wanted.seed)

    def calibration(self, seed: int) -> Iterable[Any]:
        """Drawn with ``seed``, augmented where the recipe says so or the data set knows how."""
        wanted = self.recipe.calibration
        images = load_data(self.recipe.data, wanted.split, limit=wanted.images, seed=seed)
        augment = images.augmentation is not None if wanted.augment is None else wanted.augment
        return images.batches(wanted.batch_size, augment=augment, seed=seed)

    def test(self) -> Iterable[Any]:
        """Of the test split."""
        return self._tested.batches(self.recipe.test.batch_size)


@dataclass(frozen=True)
class Text:
    """A language model and windows of a text: the first nine tenths are for training, the rest is the test; an image
    of the recipe is a window."""

    recipe: SearchRecipe
    model: nn.Module
    text: Texts
    sample = NATS.sample
    notes = (TRAINED_ON.format(samples="windows", part="first"),)

    def scoring(self) -> Iterable[Any]:
        """Windows drawn from the first part."""
        wanted = self.recipe.scoring
        return self._windows(wanted.split or "train", wanted.images, wanted.seed, wanted.batch_size)

    def calibration(self, seed: int) -> Iterable[Any]:
        """Windows drawn from the first part with ``seed``."""
        wanted = self.recipe.calibration
        return self._windows(wanted.split, wanted.images, seed, wanted.batch_size)

    def test(self) -> Iterable[Any]:
        """Windows of the last part: all, or ``limit`` drawn with the recipe's seed, 0 if it has none."""
        wanted = self.recipe.test
        return self._windows(wanted.split, wanted.limit, wanted.seed or 0, wanted.batch_size)

    def _windows(self, split: str, limit: int | None, seed: int, size: int) -> list[Any]:
        whole = self.text.load(split)
        return whole.subset(limit or len(whole), seed).batches(size)


def source(recipe: SearchRecipe) -> Source:
    """Load a recipe's network, its weights random but always the same where none are given, and find its data.

    Raises:
        RecoupError: whatever is missing or does not fit; a text for a network whose alphabet is not known.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, found = sources.loaded(recipe)
    if isinstance(found, Texts):
        found.check(model.eval(), recipe.model)
        return Text(recipe, model, found)
    return Images(recipe, model.eval())


def planned(recipe: SearchRecipe) -> list[str]:
    """What scoring would measure, a line each.

    Raises:
        RecoupError: a space, costs or limits that do not fit the network.
    """
    loaded = source(recipe)
    return [task.label for task in _checked(recipe, loaded, loaded.scoring()).tasks]


def _checked(recipe: SearchRecipe, loaded: Source, batches: Iterable[Any]) -> Plan:
    """The plan, after all has been refused that needs no measurement: costs, limits, layers without sizes."""
    space = recipe.space_of()
    made = plan(loaded.model, space, reference=recipe.reference, probes=recipe.probes)
    sizes = sizes_of(loaded.model, batches)
    affordable(made.groups, sizes, recipe.cost, recipe.limits, _array(recipe), space.most_units, recipe.liberty or None)
    return made


def _array(recipe: SearchRecipe) -> Array:
    return Array(recipe.array.rows, recipe.array.columns)


def run(recipe: SearchRecipe, stage: Stage, how: How) -> SearchResults | Scores:
    """Make what a stage needs, each measurement once, and write it into the recipe's folder.

    Raises:
        RecoupError: whatever does not fit; see `score`, `front` and `verify`.
    """
    loaded, folder = source(recipe), Path(recipe.out)
    batches = kept(loaded.scoring())
    _checked(recipe, loaded, batches)
    make(folder)
    seeds = recipe.calibration.seeds
    scores = score(
        loaded.model,
        batches,
        recipe.space_of(),
        repair=recipe.repair,
        metric=recipe.metric,
        calibration=loaded.calibration(seeds[0]),
        reference=recipe.reference,
        probes=recipe.probes,
        out=folder,
        **how.options(),
    )
    if stage == "score":
        return scores
    how_priced: dict[str, Any] = {"array": _array(recipe), "liberty": recipe.liberty or None}
    found = front(scores, recipe.cost, limits=recipe.limits, points=recipe.points, **how_priced)
    found = replace(found, notes=(*loaded.notes, *found.notes))
    if stage != "front":
        found = _verified(recipe, loaded, found, batches, how)
    return _written(recipe, found, folder, loaded.sample)


def _verified(recipe: SearchRecipe, loaded: Source, found: Front, batches: Iterable[Any], how: How) -> Front:
    """Measured, with cheaper points around the chosen one where the recipe wants them or predictions rank poorly."""
    about: dict[str, Any] = {"seeds": recipe.calibration.seeds, "calibration": loaded.calibration, "out": recipe.out}
    found = verify(found, loaded.model, loaded.test(), **about, **how.options())
    poorly = found.scores.surrogate.error is not None and not found.scores.surrogate.trusted
    moves = (ENOUGH if poorly else 0) if recipe.refine is None else recipe.refine
    if not moves or how.shard is not None:
        return found
    divided = {name: getattr(how, name) for name in ("workers", "executor", "progress")}
    found = refine(found, loaded.model, batches, start=_best(found, recipe.budget), moves=moves, **divided)
    return verify(found, loaded.model, loaded.test(), **about, **how.options())


def _best(found: Front, budget: float) -> Point | None:
    """The cheapest point within the budget, if there is one."""
    try:
        return found.within(budget)
    except RecoupError:
        return None


def _written(recipe: SearchRecipe, found: Front, folder: Path, sample: str) -> SearchResults:
    found.save(folder)
    kind, _, place = recipe.data.partition(":")
    results = results_of(
        found,
        model=recipe.model.rpartition(":")[2],
        data=Path(place).name if sample == NATS.sample else kind,
        sample=sample,
        repair=recipe.repair,
        budget=recipe.budget,
        liberty=tuple(Path(path).name for path in recipe.liberty),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    results.save(folder)
    return results
