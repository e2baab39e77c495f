"""The network under measurement: puts it into a state, measures, and depends on nothing that was measured before."""

import hashlib
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from recoup.calibrate import calibrate_
from recoup.data import Dataset
from recoup.data import load as load_data
from recoup.emulate import emulate_, restore_
from recoup.evaluation import Accuracy, evaluate
from recoup.lba import choose_chunks_, correct_gain_
from recoup.lba import profile as lba_profile
from recoup.lba.config import LBA
from recoup.lba.profiling import LayerProfile as UnitProfile
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.cost import LayerTraffic, traffic
from recoup.models import load as load_model
from recoup.nbsmt.bias import correct_bias_
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.cost import Array, Cost, cycles
from recoup.nbsmt.profiling import LayerProfile, profile
from recoup.network.norms import Statistics, has_norms, only_norms, shift
from recoup.recalibrate import recalibrate_
from recoup.study.configs import Config
from recoup.study.machine import check_device
from recoup.study.progress import Display
from recoup.study.recipe import Recipe
from recoup.study.states import State

Shifts = dict[str, tuple[float, float]]
UNIT_OUTPUTS = 512  # sampled outputs a layer; every one takes K reference steps


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
            model = load_model(recipe.model, recipe.weights, **cast("dict[str, Any]", recipe.model_options))
        self.model: nn.Module = model.to(self.device).eval()
        self.has_norms = has_norms(model)
        self._float = Statistics.of(model)
        self._eight_bit: dict[int, Statistics] = {}
        self._calibrated: int | None = None

    @cached_property
    def digest(self) -> str:
        """A fingerprint of every parameter and buffer of the float model."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

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

    def accuracy(self, config: Config | None, state: State, seed: int) -> tuple[Accuracy, Shifts]:
        """Accuracy of a state (``config`` None: the float network), and how far ``paired`` moved the statistics."""
        self._prepare(config, state, seed)
        moved = shift(self._float, Statistics.of(self.model)) if state is State.PAIRED else {}
        batches = self.test.batches(self.recipe.test.batch_size)
        return evaluate(self.model, self.display.watch(batches, "test")), moved

    def profile(self, config: NBSMT, seed: int) -> tuple[list[LayerProfile], Cost]:
        """The per-layer figures of a config without repair, on the first calibration images of a seed; its cost."""
        batches = self._profiled(config, seed)
        array = Array(self.recipe.array.rows, self.recipe.array.columns)
        cost = cycles(self.model, next(iter(batches))[0][:1], array)
        return profile(self.model, batches) if self.recipe.profile_images else [], cost

    def profile_units(self, config: LBA, seed: int) -> list[UnitProfile]:
        """The per-layer figures of a narrow accumulator without repair."""
        batches = self._profiled(config, seed)
        return lba_profile(self.model, batches, outputs=UNIT_OUTPUTS) if self.recipe.profile_images else []

    def traffic(self, config: LightNorm, seed: int) -> list[LayerTraffic]:
        """What every batch norm moves for one image in a training step: a model, from shapes."""
        batches = self._profiled(config, seed)
        return list(traffic(self.model, next(iter(batches))[0][:1]).layers)

    def _profiled(self, config: Config, seed: int) -> Any:
        self._prepare(config, State.NONE, seed)
        return self._batches(self.images(seed, self.recipe.profile_images or 1), seed, "profile")

    def _prepare(self, config: Config | None, state: State, seed: int) -> None:
        self._reset()
        if config is None:
            return
        batches = self._batches(self._drawn(seed), seed, "calibrate")
        if self._calibrates(config):
            self._calibrate(seed, batches)
        if state is State.EIGHT_BIT and seed not in self._eight_bit:
            self._emulate(NBSMT(threads=1))
            recalibrate_(self.model, batches, "average")
            self._eight_bit[seed] = Statistics.of(self.model)
            self._reset()
        self._emulate(config)
        if state is State.EIGHT_BIT:
            self._eight_bit[seed].put(self.model)
        if state is State.AVERAGE:
            recalibrate_(self.model, batches, "average")
        if state in (State.BIAS, State.PAIRED_BIAS):
            correct_bias_(self.model, batches)
        if state is State.CHUNKS:
            choose_chunks_(self.model)
        if state in (State.LAYER_GAIN, State.GAIN, State.GAIN_PAIRED):
            correct_gain_(self.model, batches, "layer" if state is State.LAYER_GAIN else "channel")
        if state in (State.PAIRED, State.PAIRED_BIAS, State.GAIN_PAIRED):
            recalibrate_(self.model, batches, "paired")

    def _reset(self) -> None:
        restore_(self.model)
        self._float.put(self.model)

    def _emulate(self, config: Config) -> None:
        """The baseline, NB-SMT with one thread, is that of a layer's own config too."""
        single = isinstance(config, NBSMT) and config.threads == 1
        layers = {
            name: own.replace(threads=1) if single and isinstance(own, NBSMT) else own
            for name, own in self.recipe.layers.items()
        }
        emulate_(self.model, config, layers)

    def _calibrates(self, config: Config) -> bool:
        """Whether a config, or a layer's own, works on calibrated 8-bit codes."""
        return any(isinstance(hardware, NBSMT) for hardware in (config, *self.recipe.layers.values()))

    def _calibrate(self, seed: int, batches: Any) -> None:
        if self._calibrated != seed:
            others = {name: own for name, own in self.recipe.layers.items() if not only_norms(self.model, name)}
            chosen = {name: True if isinstance(own, NBSMT) else None for name, own in others.items()}
            calibrate_(self.model, batches, chosen)
            self._calibrated = seed

    def _drawn(self, seed: int) -> Dataset:
        if self._images is None or self._images[0] != seed:
            self._images = (seed, self.images(seed))
        return self._images[1]

    _images: tuple[int, Dataset] | None = None

    def _batches(self, images: Dataset, seed: int, what: str) -> Any:
        batches = images.batches(self.recipe.calibration.batch_size, augment=self.augmented(images), seed=seed)
        return self.display.watch(batches, what)
