"""The network under measurement: puts it into a state, measures, and depends on nothing that was measured before."""

from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from recoup.calibrate import calibrate_
from recoup.data import Dataset
from recoup.data import load as load_data
from recoup.emulate import emulate_, restore_
from recoup.errors import RecoupError
from recoup.evaluation import Accuracy, evaluate
from recoup.models import load as load_model
from recoup.network.norms import Statistics, has_norms, only_norms, shift
from recoup.network.selection import Selection
from recoup.network.wing import Repair
from recoup.recalibrate import PAIRED
from recoup.storage.digest import of_state
from recoup.study.configs import Config
from recoup.study.machine import check_device
from recoup.study.progress import Display
from recoup.study.recipe import Recipe
from recoup.study.repairs import NONE, repair
from recoup.wings import wing_of

Shifts = dict[str, tuple[float, float]]


def baseline_of(config: Config) -> Config | None:
    """The baseline hardware of a config's wing; None is the float network."""
    of = wing_of(config, "baseline").baseline.of
    return None if of is None else of(config)


def needs_scales(config: Config | None) -> bool:
    """Whether hardware works on activation scales, which calibration images decide."""
    return config is not None and not wing_of(config, "calibration").seedless


def _told(error: Exception) -> str:
    """An error of others in a line: its kind and its first sentence."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


class Lab:
    """A model, its data and the float BatchNorm statistics it came with.

    Every measurement starts from the float checkpoint, so its number is the same whether the study ran through or was
    interrupted and taken up again.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.display = Display()
        self.device = check_device(recipe.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a factory without weights: the same network when the study is taken up again
            model = self._built()
        self.model: nn.Module = model.to(self.device).eval()
        self.has_norms = has_norms(model)
        self._float = Statistics.of(model)
        self._on_baseline: dict[tuple[str, int, str], Statistics] = {}
        self._weights = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self._calibrated: int | None = None

    def _built(self) -> nn.Module:
        recipe = self.recipe
        try:
            return load_model(recipe.model, recipe.weights, **cast("dict[str, Any]", recipe.model_options))
        except (RecoupError, OSError):
            raise
        except Exception as error:  # a factory of the user's may fail in any way
            raise RecoupError(f"model {recipe.model!r}: its factory failed: {_told(error)}") from error

    def check(self) -> None:
        """Find what does not fit before anything is measured: layer names, image counts, shapes, outputs and classes.

        Raises:
            RecoupError: a layer name that matches nothing, more images than there are, images that the model does not
                take, fewer outputs than classes.
        """
        modules = {name: module for name, module in self.model.named_modules() if name}
        Selection(self.recipe.layers, modules, "layers", modules)
        self._drawn(self.recipe.calibration.seeds[0])
        inputs = next(iter(self.test.batches(2)))[0].to(self.device)
        with torch.no_grad():
            try:
                output = self.model(inputs)
            except Exception as error:  # a network of the user's may fail in any way
                raise RecoupError(
                    f"model {self.recipe.model!r} does not take the images of {self.recipe.data!r}, "
                    f"{list(inputs.shape[1:])} each: {_told(error)}"
                ) from error
        classes = len(self.test.classes)
        if isinstance(output, torch.Tensor) and output.dim() == 2 and output.shape[1] < classes:
            raise RecoupError(
                f"model {self.recipe.model!r}: labels lie in 0..{classes - 1}, but the model has {output.shape[1]} "
                "classes"
            )

    @cached_property
    def digest(self) -> str:
        """A fingerprint of every parameter and buffer of the float model."""
        return of_state(self.model)

    @cached_property
    def test(self) -> Dataset:
        """The test images."""
        test = self.recipe.test
        return load_data(self.recipe.data, test.split, limit=test.limit, seed=test.seed)

    def images(self, seed: int, count: int | None = None) -> Dataset:
        """The calibration images of a seed, or the first ``count`` of them."""
        calibration = self.recipe.calibration
        limit = min(count or calibration.images, calibration.images)
        return load_data(self.recipe.data, calibration.split, limit=limit, seed=seed)

    def augmented(self, images: Dataset) -> bool:
        """Whether calibration images are augmented: as the recipe says, else where the data set knows how."""
        wanted = self.recipe.calibration.augment
        return images.augmentation is not None if wanted is None else wanted

    def accuracy(self, config: Config | None, state: str, seed: int) -> tuple[Accuracy, Shifts]:
        """Accuracy of a state (``config`` None: the float network), and how far ``paired`` moved the statistics."""
        self._prepare(config, state, seed)
        moved = shift(self._float, Statistics.of(self.model)) if state == PAIRED.name else {}
        batches = self.test.batches(self.recipe.test.batch_size)
        return evaluate(self.model, self.display.watch(batches, "test")), moved

    def profiled(self, config: Config, seed: int) -> Any:
        """Calibration images for the per-layer figures; the model now runs on a config's hardware without repair."""
        self._prepare(config, NONE, seed)
        return self._batches(self.images(seed, self.recipe.profile_images or 1), seed, "profile")

    def _prepare(self, config: Config | None, state: str, seed: int) -> None:
        self._reset()
        if config is None:
            return
        batches = self._batches(self._drawn(seed), seed, "calibrate")
        if self._calibrates(config):
            self._calibrate(seed, batches)
        repaired = repair(config, state)
        elsewhere = None
        if repaired is not None and repaired.on_baseline:
            elsewhere = self._measured_on_baseline(config, repaired, seed, batches)
        self._emulate(config)
        if elsewhere is not None:
            elsewhere.put(self.model)
        elif repaired is not None:
            repaired.apply(self.model, batches)

    def _measured_on_baseline(self, config: Config, repaired: Repair, seed: int, batches: Any) -> Statistics:
        """The statistics that a repair finds on a wing's baseline, once a seed."""
        key = (repaired.name, seed, repr(baseline_of(config)))
        if key not in self._on_baseline:
            self._emulate(baseline_of(config))
            repaired.apply(self.model, batches)
            self._on_baseline[key] = Statistics.of(self.model)
            self._reset()
        return self._on_baseline[key]

    def _reset(self) -> None:
        restore_(self.model)
        self._float.put(self.model)
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                if not torch.equal(value, self._weights[name]):  # a repair of a wing may change weights
                    value.copy_(self._weights[name])

    def _emulate(self, config: Config) -> None:
        """Under a wing's baseline, layers with a config of that wing of their own run its baseline too."""
        alike = type(config) if baseline_of(config) == config else None
        layers = {
            name: baseline_of(own) if alike is not None and type(own) is alike else own
            for name, own in self.recipe.layers.items()
        }
        emulate_(self.model, config, layers)

    def _calibrates(self, config: Config) -> bool:
        """Whether a config, or a layer's own, works on activation scales."""
        return any(needs_scales(hardware) for hardware in (config, *self.recipe.layers.values()))

    def _calibrate(self, seed: int, batches: Any) -> None:
        if self._calibrated != seed:
            others = {name: own for name, own in self.recipe.layers.items() if not only_norms(self.model, name)}
            chosen = {name: True if needs_scales(own) else None for name, own in others.items()}
            calibrate_(self.model, batches, chosen, negative=self.recipe.calibration.negative)
            self._calibrated = seed

    def _drawn(self, seed: int) -> Dataset:
        if self._images is None or self._images[0] != seed:
            self._images = (seed, self.images(seed))
        return self._images[1]

    _images: tuple[int, Dataset] | None = None

    def _batches(self, images: Dataset, seed: int, what: str) -> Any:
        batches = images.batches(self.recipe.calibration.batch_size, augment=self.augmented(images), seed=seed)
        return self.display.watch(batches, what)
