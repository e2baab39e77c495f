"""A search from its recipe: load, score, sweep, measure, and leave everything in the folder."""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from recoup.costs import assigned
from recoup.data.places import HELD_OUT, TooFewError
from recoup.errors import RecoupError
from recoup.models import load_weights_
from recoup.network.copies import copied
from recoup.network.systolic import Array
from recoup.policy import Policy
from recoup.search.bench import kept
from recoup.search.fronts import Front, front
from recoup.search.joining import join, placed
from recoup.search.prices import affordable
from recoup.search.recipe import SearchRecipe, TunedPoint
from recoup.search.refining import refine
from recoup.search.results import SearchResults, results_of
from recoup.search.scoring import Plan, Scores, plan, score, sizes_of
from recoup.search.spaces import title
from recoup.search.verifying import verify
from recoup.storage.folder import make
from recoup.study import sources
from recoup.study.drawing import told_as
from recoup.study.quality import NATS
from recoup.study.sources import Samples, Texts
from recoup.tasks.performing import Progress
from recoup.tasks.shards import Shard

MANY, FEW = 1000, 256
"""Samples that options are scored on and that repairs are computed from, where a recipe does not say and there are
as many."""

Stage = Literal["plan", "score", "front", "verify", "run"]
TRAINED_ON = (
    "Options were scored on {samples} of {split!r}. A network loses less on what it was trained on, so predictions may "
    "be too small for others; measured points are not concerned."
)
TRAINING = "training-recipe.json"
"""What `recoup train` leaves beside its weights."""
TRAINED_OTHERWISE = (
    "{name}: {weights} was trained with {theirs} on {layer!r}, where the policy has {ours}. Points of a folder are "
    "numbered anew when limits or costs change: keep a copy of the policy that is trained."
)
UNDIVIDED = "refine: a shard does not walk, for each step depends on the one before: run the search without --shard."


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


@dataclass(frozen=True)
class Source:
    """A recipe's network and what it is scored, calibrated and tested on; of a text an image is a window.

    Nothing is scored or calibrated on that is tested on.
    """

    recipe: SearchRecipe
    model: nn.Module
    data: sources.Source

    @cached_property
    def tuned(self) -> list[nn.Module]:
        """The networks of the recipe's fine-tuned points.

        Raises:
            RecoupError: weights that are not there, or of another network: which names and shapes.
        """
        found = []
        for one in self.recipe.tuned:
            try:
                found.append(load_weights_(copied(self.model, "search"), one.weights))
            except RecoupError as error:
                raise RecoupError(f"tuned: {one.policy.name}: {error}") from None
        return found

    @property
    def sample(self) -> str:
        """What it is measured on is counted in."""
        return self.data.quality.sample

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the results must know of the scored samples."""
        held_out = self._is_tested(self._scored.split)
        return () if held_out else (TRAINED_ON.format(samples=f"{self.sample}s", split=self._scored.split),)

    def scoring(self) -> Iterable[Any]:
        """Batches that options are scored on, as `recoup.search.recipe.Scoring` says."""
        return self._scored.batches(self.recipe.scoring.batch_size)

    def calibration(self, seed: int) -> Iterable[Any]:
        """Batches for scales and repairs, of a draw; augmented where the recipe says so or the data know how."""
        wanted = self.recipe.calibration
        with self._told("calibration", ".images, .split"):
            samples = self._other(wanted.split, wanted.images, FEW, seed, "calibration")
        augment = samples.augmentation is not None if wanted.augment is None else wanted.augment
        return samples.batches(wanted.batch_size, augment=augment, seed=seed)

    def test(self) -> Iterable[Any]:
        """Batches that the front is measured on."""
        return self._tested.batches(self.recipe.test.batch_size)

    @cached_property
    def _tested(self) -> Samples:
        wanted = self.recipe.test
        with self._told("test", ".limit, .split"):
            try:
                return self.data.load(wanted.split, wanted.limit, self._seed)
            except TooFewError:
                if "test" in self.recipe.model_fields_set:
                    raise
                return self.data.load(wanted.split, None, self._seed)

    @cached_property
    def _limit(self) -> int | None:
        """How many are tested on: None, all, also where the recipe says nothing and there are fewer than by default."""
        limit = self.recipe.test.limit
        return limit if limit == len(self._tested) else None

    @cached_property
    def _scored(self) -> Samples:
        wanted, test = self.recipe.scoring, self.recipe.test
        with self._told("scoring", ".images, .split"):
            if wanted.split is None and self._limit is not None:
                try:
                    return self.data.rest(test.split, self._limit, self._seed, wanted.images or MANY, wanted.seed)
                except TooFewError:  # the results' notes say where they are from
                    pass
            return self._other(wanted.split or "train", wanted.images, MANY, wanted.seed, "scoring")

    def _told(self, what: str, keys: str) -> Any:
        return told_as(f"{what} {self.sample}s ({what}{keys})")

    def _other(self, split: str, count: int | None, most: int, seed: int, what: str) -> Samples:
        """``count`` samples of a split, none of which is tested on; None: ``most``, or all there are."""
        if not self._is_tested(split):
            return _at_most(lambda count: self.data.load(split, count, seed), count, most)
        test, limit = self.recipe.test, self._limit
        asked = f"{what}.split: {split!r} is tested on"
        if limit is None:
            raise RecoupError(f"{asked}, all of it; with test.limit {what} {self.sample}s are drawn from the rest")
        try:
            return _at_most(lambda count: self.data.rest(test.split, limit, self._seed, count, seed), count, most)
        except TooFewError as error:
            raise RecoupError(f"{asked}: {error}") from None

    def _is_tested(self, split: str) -> bool:
        """Whether a split is the test's, which data may call otherwise."""
        test = self.recipe.test.split
        alike = split == test or {split, test} <= set(HELD_OUT)
        return alike and self.data.load(split, 1, 0).split == self.data.load(test, 1, 0).split

    @property
    def _seed(self) -> int | None:
        """Windows follow each other, so a part of them is always drawn."""
        seed = self.recipe.test.seed
        return (seed or 0) if isinstance(self.data, Texts) else seed


def _at_most(take: Callable[[int], Samples], count: int | None, most: int) -> Samples:
    """``count`` samples; None: ``most``, or all there are."""
    try:
        return take(count or most)
    except TooFewError as error:
        if count is not None or not error.available:
            raise
        return take(error.available)


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
    return Source(recipe, model.eval(), found)


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
    asked = (recipe.cost, recipe.limits, _array(recipe), space.most_units, recipe.liberty or None)
    program = affordable(made.groups, sizes, *asked)
    for point, network in zip(recipe.tuned, loaded.tuned, strict=True):
        placed(program, made.groups, network, point.policy, point.repair)
    loaded.test()
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
        found = _measured(recipe, loaded, found, batches, how)
    return _written(recipe, found, loaded.sample)


def _measured(recipe: SearchRecipe, loaded: Source, found: Front, batches: Iterable[Any], how: How) -> Front:
    """Verified, and with the walk that the recipe asks for."""

    def verified(front: Front) -> Front:
        drawn: dict[str, Any] = {"seeds": recipe.calibration.seeds, "calibration": loaded.calibration}
        return verify(front, loaded.model, loaded.test(), **drawn, out=recipe.out, **how.options())

    if recipe.refine and how.shard is not None:
        found = replace(found, notes=(*found.notes, UNDIVIDED))
    elif recipe.refine:
        found = verified(found)
        _written(recipe, found, loaded.sample)  # what there is if the walk is interrupted
        found = _refined(recipe, loaded, found, batches, how)
    for point, network in zip(recipe.tuned, loaded.tuned, strict=True):
        found = join(found, network, point.policy, repair=point.repair, weights=point.weights)
        found = replace(found, notes=(*found.notes, *_trained_otherwise(point, network)))
    return verified(found)


def _trained_otherwise(point: TunedPoint, network: nn.Module) -> list[str]:
    """A note where the weights' own training names other hardware of some layer."""
    try:
        recipe = json.loads(Path(point.weights).with_name(TRAINING).read_text("utf-8"))
        layers = {} if recipe["config"] is not None else recipe["layers"]
        ours, theirs = (assigned(network, Policy(one), "search: tuned") for one in (point.policy, layers))
    except (OSError, ValueError, KeyError, TypeError, RecoupError):  # weights of other origin, or of another network
        return []
    if not layers:  # trained in float, or on one config everywhere
        return []
    for layer in {**theirs, **ours}:
        if theirs.get(layer) != ours.get(layer):
            told = {"theirs": title(theirs.get(layer)), "ours": title(ours.get(layer)), "layer": layer}
            return [TRAINED_OTHERWISE.format(name=point.policy.name, weights=point.weights, **told)]
    return []


def _refined(recipe: SearchRecipe, loaded: Source, found: Front, batches: Iterable[Any], how: How) -> Front:
    """A verified front with cheaper points behind the chosen one, or behind the least harmful where none is within the
    budget, measured too."""
    divided = {name: getattr(how, name) for name in ("workers", "executor", "progress")}
    try:
        start = found.within(recipe.may_lose)
    except RecoupError:
        start = min((point for point in found.points if point.allowed), key=lambda point: point.damage)
    return refine(found, loaded.model, batches, start=start, moves=recipe.refine, **divided)


def _written(recipe: SearchRecipe, found: Front, sample: str) -> SearchResults:
    folder = Path(recipe.out)
    found.save(folder)
    kind, _, place = recipe.data.partition(":")
    results = results_of(
        found,
        model=recipe.model.rpartition(":")[2],
        data=Path(place).name if sample == NATS.sample else kind,
        sample=sample,
        repair=recipe.repair,
        budget=recipe.may_lose,
        liberty=tuple(Path(path).name for path in recipe.liberty),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    results.save(folder)
    return results
