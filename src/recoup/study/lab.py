"""The network under measurement: puts it into a state, measures, and depends on nothing that was measured before."""

import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from recoup.calibrate import calibrate_
from recoup.costs import Cost, assigned, cost, told_unfit
from recoup.emulate import emulate_, restore_
from recoup.errors import RecoupError, RecoupWarning
from recoup.models.loading import FACTORIES, factory_of
from recoup.network.applied import applied
from recoup.network.batches import call
from recoup.network.emulated import emulated_layers
from recoup.network.norms import Statistics, has_norms, shift
from recoup.network.passes import Passes, keeping_passes
from recoup.network.scales import is_calibrated
from recoup.network.selection import UNMATCHED, Selection
from recoup.network.systolic import Array
from recoup.network.wing import Repair
from recoup.policy import Policy
from recoup.recalibrate import PAIRED
from recoup.storage.digest import of_state
from recoup.study.configs import Config
from recoup.study.doubts import doubts
from recoup.study.drawing import Drawing
from recoup.study.hardware import Hardware, baseline_of, has_work, name_of, needs_scales, scaled_once_emulated
from recoup.study.layouts import laid_out, takes_channels_last
from recoup.study.machine import check_device
from recoup.study.priced import notes_of, rows_of
from recoup.study.progress import Display
from recoup.study.recipe import Recipe
from recoup.study.repairs import FLOAT, NONE
from recoup.study.rows import CostRow
from recoup.study.said import Said
from recoup.study.sources import Samples, Source, loaded
from recoup.version import __version__
from recoup.wings import cards, wing_of

LEFT = (
    "In float under {hardware}: {names}. Calibration leaves out the first and the last layer that multiply{more}, "
    "unless the layer map (layers, --layers NAME=CONFIG) names their hardware."
)
Shifts = dict[str, tuple[float, float]]


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
            model, self.source = self._loaded()
            self.drawing = Drawing(recipe, self.source)
        self.recipe = self.drawing.recipe
        self.model: nn.Module = model.to(self.device).eval()
        self.has_norms = has_norms(model)
        self._working = {type(config): has_work(config, model) for config in recipe.configs}
        self._float = Statistics.of(model)
        self._on_baseline: dict[tuple[str, int, str], tuple[Statistics, Said]] = {}
        self._weights = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self._calibrated: tuple[int, bool] | None = None  # the seed, and whether for policies
        self._said = Said()  # by that calibration
        self._passes = Passes()
        self.known: dict[str, Hardware] = {}  # by name, once it was tried
        self._costs: dict[str, Cost] = {}
        self.outputs: int | None = None  # known after `check`, if the model gives a row of them an image

    def _loaded(self) -> tuple[nn.Module, Source]:
        try:
            return loaded(self.recipe)
        except (RecoupError, OSError):
            raise
        except Exception as error:  # a factory of the user's may fail in any way
            raise RecoupError(f"model {self.recipe.model!r}: its factory failed: {_told(error)}") from error

    def check(self) -> None:
        """Find what does not fit before anything is measured: layer names, image counts, shapes, outputs and classes.

        Raises:
            RecoupError: a layer name that matches nothing, hardware that takes no layer, more images than there are,
                images that the model does not take, fewer outputs than classes.
        """
        modules = {name: module for name, module in self.model.named_modules() if name}
        Selection(self.recipe.layers, modules, "layers", modules)
        if self.source.quality.paired and len(self.test) < 2:
            raise RecoupError("test: one window leaves no interval: take two or more (test.limit, --limit; context)")
        inputs = next(iter(self.test.batches(2)))[0].to(self.device)
        self.drawing.kept(self.recipe.calibration.seeds[0])
        named = self.recipe.model
        with torch.no_grad():
            try:
                output = call(self.model, inputs)
            except Exception as error:  # a network of the user's may fail in any way
                raise RecoupError(
                    f"model {named!r} does not take the {self.drawing.named} of {self.recipe.data!r}, "
                    f"{list(inputs.shape[1:])} each: {_told(error)}"
                ) from error
            self.outputs = self.source.outputs(self.model, inputs, output, named)
        for config in self.recipe.configs:
            if self.has_work(config):
                self.hardware(config)
        for policy in self.recipe.policy:
            if not assigned(self.model, policy, f"policy {policy.name!r}"):
                why = told_unfit(self.model, policy)
                raise RecoupError(f"policy {policy.name!r}: takes no layer of model {self.recipe.model!r}{why}")
        for policy in self.recipe.policy:
            self.hardware(policy)

    @property
    def untrained(self) -> bool:
        """Whether the network is known to have its initial weights: one of recoup's own, without a checkpoint."""
        return self.recipe.weights is None and factory_of(self.recipe.model) in FACTORIES.values()

    def identity(self) -> dict[str, Any]:
        """What decides every number of a study."""
        made: dict[str, Any] = {"parameters": self.digest, "recoup": __version__, "torch": torch.__version__}
        made["channels_last"] = self.takes_channels_last  # on which the last bits of float layers depend
        return {**self.recipe.identity(), **self.source.identity(), **made}

    def doubts(self) -> list[str]:
        """What makes accuracies say nothing, as far as it shows before they are measured."""
        return doubts(self.untrained, self.outputs, self.source.classes())

    def has_work(self, config: Config) -> bool:
        """Whether the network has something for a config's hardware."""
        return self._working[type(config)]

    def hardware(self, config: Config | Policy) -> Hardware:
        """What the layers run on under a config and the recipe's layer map, or under a policy.

        Raises:
            RecoupError: a config of the map or the policy, or this one, that takes no layer.
        """
        name = name_of(config)
        if name not in self.known:
            plain = Hardware.plain(config)
            # A map of floats alone may leave nothing to a config.
            looked = bool(self.recipe.policy or self.recipe.layers) or plain.conditional
            self.known[name] = self._found(config, plain) if looked else plain
        return self.known[name]

    def _found(self, config: Config | Policy, plain: Hardware) -> Hardware:
        """What becomes of the network under a config or a policy, which is tried."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RecoupWarning)  # the measurement says it again
            self._prepare(config, NONE, self.recipe.calibration.seeds[0])
            if self.recipe.policy:
                self._costs[name_of(config)] = self._cost()
        running = {layer: module.config for layer, module in emulated_layers(self.model).items()}
        mixed = isinstance(config, Policy) or any(own is not None for own in self.recipe.layers.values())
        found = (Hardware.found(config, running) if mixed else plain).on(self.model)
        self._reset()
        return found

    def _cost(self) -> Cost:
        """Of the network as it is, for one image."""
        array = self.recipe.array
        one = next(iter(self.test.batches(1)))[0]
        shape = tuple(one.shape[1:]) if one.is_floating_point() else one.to(self.device)  # tokens cannot be made up
        return cost(self.model, None, shape, Array(array.rows, array.columns), liberty=self.recipe.liberty or None)

    def costs(self, names: Sequence[str]) -> tuple[list[CostRow], list[str]]:
        """What the float network and some hardware cost, where the recipe has policies, and what is not in it."""
        if not self.recipe.policy:
            return [], []
        self._reset()
        found = {FLOAT: self._cost(), **{name: self._costs[name] for name in names}}
        return rows_of(found, priced=bool(self.recipe.liberty)), notes_of(found, priced=bool(self.recipe.liberty))

    @cached_property
    def takes_channels_last(self) -> bool:
        """Whether the float network takes test images in that layout; found out in every process that measures."""
        self._reset()
        return takes_channels_last(self.model, next(iter(self.test.batches(2)))[0].to(self.device))

    @cached_property
    def digest(self) -> str:
        """A fingerprint of every parameter and buffer of the float model."""
        return of_state(self.model)

    @property
    def test(self) -> Samples:
        """The test images, or windows."""
        return self.drawing.test

    def accuracy(self, config: Config | Policy | None, state: str, seed: int) -> tuple[dict[str, Any], Shifts]:
        """What the source judges a state by, accuracy or nats (``config`` None: the float network), and how far
        ``paired`` moved the statistics."""
        # First, for what is not known yet is tried, which leaves the network in float.
        hardware = self.hardware(config) if config is not None and self.takes_channels_last else None
        self._prepare(config, state, seed)
        moved = shift(self._float, Statistics.of(self.model)) if state == PAIRED.name else {}
        batches = self.test.batches(self.recipe.test.batch_size)
        if hardware is not None:
            batches = laid_out(batches, hardware)
        return self.source.judged(self.model, self.display.watch(batches, "test")), moved

    def left(self, config: Config | Policy | None) -> list[str]:
        """A note of the layers that a config is meant for and calibration left in float, which `emulate_` does in
        silence, once the network is on it; a policy names its layers itself, and its costs say what is in float."""
        if config is None or isinstance(config, Policy):
            return []
        card = wing_of(config, "study")
        modules = {name: module for name, module in self.model.named_modules() if name}
        chosen = Selection(self.recipe.layers, modules, "layers", modules)
        left = [
            name
            for name, module in modules.items()
            if chosen.of(name) is UNMATCHED
            and card.stand_in(module) is not None
            and card.declined(module)
            and not card.ready(module)
        ]
        more = ", and here those with negative inputs" if self.recipe.calibration.negative == "float" else ""
        return [LEFT.format(hardware=type(config).__name__, names=", ".join(left), more=more)] if left else []

    def repaired(self, config: Config | Policy, state: str, seed: int) -> nn.Module:
        """The network on the hardware of a config or policy, in a state."""
        self._prepare(config, state, seed)
        return self.model

    def profiled(self, config: Config | Policy, seed: int) -> Any:
        """Calibration images for the per-layer figures; the model now runs on a config's hardware without repair."""
        self._prepare(config, NONE, seed)
        return self.display.watch(self.drawing.batches(seed, self.recipe.profile_images or 1), "profile")

    def _prepare(self, config: Config | Policy | None, state: str, seed: int) -> None:
        self._reset()
        if config is None:
            return
        # First, for what hardware is, is tried with another seed's scales where it is not known yet.
        repaired = None if state == NONE else self._repair(config, state)
        batches = self.display.watch(self.drawing.batches(seed), "calibrate")
        if self._calibrates(config):
            self._calibrate(seed, batches, isinstance(config, Policy))
        with keeping_passes(self._passes, seed):
            elsewhere = None
            if repaired is not None and repaired.on_baseline:
                elsewhere = self._measured_on_baseline(config, repaired, seed, batches)
            self._emulate(config)
            if not isinstance(config, Policy) and scaled_once_emulated(config):
                calibrate_(self.model, batches, activations=self.recipe.calibration.activations)
                self._calibrated = None  # other hardware leaves the first and the last layer in float
            if elsewhere is not None:
                elsewhere.put(self.model)
            elif repaired is not None:
                applied(self.model, repaired, batches)

    def _repair(self, config: Config | Policy, state: str) -> Repair:
        hardware = self.hardware(config)
        found = hardware.repair(state)
        if found is None:
            raise RecoupError(f"state {state!r}: {hardware.title} has no such repair")
        return found

    def _measured_on_baseline(self, config: Config | Policy, repaired: Repair, seed: int, batches: Any) -> Statistics:
        """The statistics that a repair finds on a wing's baseline, once a seed."""
        compared = self.hardware(config).compared
        key = (repaired.name, seed, repr(compared))
        if key not in self._on_baseline:
            said = Said()
            with said.heard():
                self._emulate(compared)
                applied(self.model, repaired, batches)
            self._on_baseline[key] = Statistics.of(self.model), said
            self._reset()
        found, said = self._on_baseline[key]
        said.again()
        return found

    def _reset(self) -> None:
        restore_(self.model)
        self._float.put(self.model)
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                if not torch.equal(value, self._weights[name]):  # a repair of a wing may change weights
                    value.copy_(self._weights[name])

    def _emulate(self, config: Config | Policy) -> None:
        """Under a wing's baseline, layers with a config of that wing of their own run its baseline too."""
        if isinstance(config, Policy):
            emulate_(self.model, None, self._of_policy(config))
            return
        alike = {type(one) for one in (config, *self.recipe.configs) if baseline_of(one) == config}
        layers = {name: baseline_of(own) if type(own) in alike else own for name, own in self.recipe.layers.items()}
        emulate_(self.model, config, layers)

    def _of_policy(self, policy: Policy) -> dict[str, Config]:
        """A policy's layers by name, but for those that calibration left in float, as it says."""
        modules = dict(self.model.named_modules())
        found = assigned(self.model, policy, "emulate_")
        calibration = self.recipe.calibration
        if calibration.negative == "error" or calibration.activations != "unsigned":
            return found
        scaled = {name for name in found if is_calibrated(modules[name])}
        return {name: config for name, config in found.items() if name in scaled or not needs_scales(config)}

    def _calibrates(self, config: Config | Policy) -> bool:
        """Whether a config, or a layer's own, works on activation scales."""
        if isinstance(config, Policy):
            return any(map(needs_scales, config.values()))
        own = () if scaled_once_emulated(config) else (config,)
        return any(needs_scales(hardware) for hardware in (*own, *self.recipe.layers.values()))

    def _calibrate(self, seed: int, batches: Any, for_policies: bool) -> None:
        """Once a seed for all configs, and once for all policies, which choose other layers than the default."""
        if self._calibrated != (seed, for_policies):
            chosen = self._scaled_by_policies() if for_policies else self._scaled_by_configs()
            try:
                wanted = self.recipe.calibration
                with self._said.heard():
                    calibrate_(self.model, batches, chosen, activations=wanted.activations, negative=wanted.negative)
            except RecoupError as error:
                if not for_policies or str(error) == error.on_command_line:
                    raise
                raise error.advising(
                    "calibration.activations: auto (--activations auto) gives them signed codes, calibration.negative: "
                    "float (--negative float) leaves all of them in float; a policy without "
                    f"{error.layers[0]!r} leaves one"
                ) from None
            self._calibrated = (seed, for_policies)
        self._said.again()

    def _scaled_by_policies(self) -> dict[str, bool | None]:
        """Every layer that some policy puts on hardware of activation scales, and no other."""
        pairs = (pair for policy in self.recipe.policy for pair in assigned(self.model, policy, "calibrate_").items())
        return {**{name: True for name, config in pairs if needs_scales(config)}, "re:.*": None}

    def _scaled_by_configs(self) -> dict[str, bool | None]:
        layers = self.recipe.layers.items()
        return {name: True if needs_scales(own) else None for name, own in layers if self._may_scale(name)}

    def _may_scale(self, key: str) -> bool:
        """Whether a key of the layer map names what may have an activation scale; calibration has no use for others."""
        takes = [card for card in cards().values() if not card.seedless]
        modules = dict(self.model.named_modules())
        chosen = Selection({key: True}, modules, "layers", modules)
        named = [module for name, module in modules.items() if chosen.of(name) is not UNMATCHED]
        return any(card.stand_in(module) is not None for card in takes for module in named)
