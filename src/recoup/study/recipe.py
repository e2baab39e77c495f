"""A recipe: everything that decides a study's numbers, as a YAML file.

::

    model: resnet20                     # a name of recoup.models, or package.module:factory
    weights: resnet20-12fca82f.th
    data: cifar10:../shared/data/cifar10
    calibration: {images: 1024, seeds: [0, 1, 2]}
    configs:
      - nbsmt-2t
      - NBSMT(threads=4, policy='S+A')
    policy: [chipA.yaml, chipB.yaml]    # chips of several kinds of hardware, layer by layer
    out: results/resnet20

Paths are relative to the folder the study is started from.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from recoup.calibrate import Activations, Negative
from recoup.errors import RecoupError
from recoup.grammar import written
from recoup.network.wing import Card
from recoup.policy import Policy
from recoup.study.configs import as_config
from recoup.study.repairs import FLOAT, State, default
from recoup.study.yamlfile import Source, read_yaml, refuse
from recoup.wings import cards, wing_of


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError(f"{text!r} holds a NUL, which no name or path may")
    return text


def _kept(value: Any) -> Any:
    config = as_config(value)
    written(config, "a recipe")
    return config


def listed(value: Any) -> Any:
    """One value, or a list of them, as a list."""
    return [value] if isinstance(value, str | Mapping) else value


def _policy(value: Any) -> Policy:
    """A policy's file, whose own name it has where the policy has none, or what is in such a file."""
    if isinstance(value, str):
        found = Policy.load(value)
        found = found if found.name else Policy(found, Path(value).stem)
    elif isinstance(value, Policy):
        found = value
    else:
        found = Policy.from_yaml(yaml.safe_dump(value, sort_keys=False))
    if not found.name:
        raise RecoupError(f"policy of {', '.join(found)}: must have a name, by which tables call it")
    for config in found.values():
        if config is not None:
            written(config, "a recipe")
    return found


def _told(policy: Policy) -> dict[str, Any]:
    layers = {key: None if config is None else repr(config) for key, config in policy.items()}
    return {"name": policy.name, "layers": layers}


Chip = Annotated[Policy, PlainValidator(_policy), PlainSerializer(_told, return_type=dict[str, Any])]
Hardware = Annotated[Any, PlainValidator(_kept), PlainSerializer(repr, return_type=str)]
Repaired = Annotated[State, PlainValidator(State), PlainSerializer(str, return_type=str)]
Scalar = bool | int | float | str | None
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
Text = Annotated[str, Field(min_length=1, strict=True), AfterValidator(_without_nul)]


class Strict(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class AnyRecipe(Strict):
    """A recipe of any kind, which is read from a YAML file."""

    called: ClassVar[str] = "recipe"

    @model_serializer(mode="wrap")
    def _said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Who has no text need not learn what its context is."""
        return {name: value for name, value in handler(self).items() if name != "context" or value is not None}

    @classmethod
    def from_yaml(cls, text: str, name: str | None = None) -> Self:
        """Read a recipe; errors name ``name``, the line and the field."""
        source = read_yaml(text, name or cls.called)
        return cls._validated(source.values, source)

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> Self:
        """Read a recipe file, with ``key=value`` overrides (dotted keys, YAML values).

        Raises:
            RecoupError: no such file, not YAML, not a recipe, an unknown or missing field, a value out of range.
        """
        source = Source.load(Path(path))
        return cls._validated(source.override(overrides or []), source)

    @classmethod
    def build(cls, values: Mapping[str, Any], name: str | None = None) -> Self:
        """A recipe from plain values, with the same errors as from a file."""
        return cls._validated(values, Source(name or cls.called, dict(values)))

    @classmethod
    def _validated(cls, values: Mapping[str, Any], source: Source) -> Self:
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise refuse(error, source, cls) from None


class Calibration(Strict):
    """The images that activation scales and repairs are computed from; each seed draws its own.

    ``images``: how many; null: 1,024, or all there are where those are fewer, which the recipe in a study's folder then
    says. ``augment``: vary them as in training; null: where the data set knows how. ``split``: what they are drawn
    from. ``activations``: codes for hardware of 8-bit activations: ``auto`` (signed where a layer's inputs are
    negative, else unsigned), ``unsigned`` or ``signed``. ``negative``: what becomes of layers with negative inputs
    under ``unsigned``: an ``error``, or they stay in ``float``.
    """

    images: Count | None = None
    augment: bool | None = None
    batch_size: Count = 128
    seeds: tuple[Seed, ...] = Field(default=(0, 1, 2), min_length=1)
    split: Text = "train"
    activations: Activations = "auto"
    negative: Negative = "error"

    @model_validator(mode="after")
    def _distinct(self) -> "Calibration":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} must differ from each other")
        return self


class Test(Strict):
    """The images that accuracy is measured on: the first ``limit``, or as many drawn with ``seed``; null is all."""

    limit: Count | None = None
    seed: Seed | None = None
    batch_size: Count = 250
    split: Text = "test"

    __test__ = False  # no test case for pytest


class Array(Strict):
    """The output-stationary array whose cycles are counted."""

    rows: Count = 16
    columns: Count = 16


def first_presets() -> tuple[Any, ...]:
    """The hardware that is measured where a recipe names none: the presets of the first wing."""
    return tuple(next(iter(cards().values())).presets.values())


class Recipe(AnyRecipe):
    """What to measure; see the module's docstring for its YAML.

    Attributes:
        model: a name of `recoup.models` or ``package.module:factory``.
        weights: the float checkpoint; null keeps what the factory gives.
        model_options: keyword arguments of the factory.
        data: ``digits``, ``cifar10:DIR``, ``imagefolder:DIR``, ``hf:NAME`` ..., or ``text:FILE`` for a language model:
            what counts images then counts windows of the text.
        context: tokens a window of a text; null: as many as the network says.
        calibration, test: which images.
        configs: the hardware to try; presets or reprs. None by default where there are policies.
        policy: chips to try, each a policy's file or what such a file holds (in a recipe that recoup writes, the
            latter); they are ranked with the configs.
        layers: name or ``re:...`` -> config, or null for float; first match wins, the rest follow ``configs``. Policies
            have maps of their own.
        states: the repairs to measure under every config; none: those that the cards of the wings present name,
            of policies alone without those that are measured on a baseline.
        profile_images: calibration images for the per-layer figures; 0 leaves all but cycles out.
        array: rows and columns for the cycle count.
        liberty: a cell library's file, or several: policies' energy and area are counted too.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        cpu_threads: torch's threads; null leaves torch's choice.
        out: the folder for results.
    """

    model: Text
    weights: Text | None = None
    model_options: dict[Text, Scalar] = {}
    data: Text
    context: Count | None = None
    calibration: Calibration = Calibration()
    test: Test = Test()
    configs: tuple[Hardware, ...] = Field(default_factory=first_presets)
    policy: Annotated[tuple[Chip, ...], BeforeValidator(listed)] = ()
    layers: dict[Text, Hardware | None] = {}
    states: tuple[Repaired, ...] = ()
    profile_images: Annotated[int, Field(ge=0, strict=True)] = 256
    array: Array = Array()
    liberty: Annotated[tuple[Text, ...], BeforeValidator(listed)] = ()
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    cpu_threads: Count | None = None
    out: Text = "recoup-results"

    @model_validator(mode="after")
    def _sensible(self) -> "Recipe":
        if not self.chips:
            raise ValueError("configs: must name one or more, or policy must")
        if self.policy:
            if "configs" not in self.model_fields_set:
                object.__setattr__(self, "configs", ())
            if self.layers and not self.configs:
                raise ValueError("layers: is about configs, and there are none; a policy names its layers itself")
        elif "configs" not in self.model_fields_set and any(own is not None for own in self.layers.values()):
            raise ValueError(
                "configs: missing: the layer map has hardware, so name that of the layers that it does not mention"
            )
        if self.liberty and not self.policy:
            raise ValueError(
                "liberty: is for the energy and area of policies, and there are none; recoup silicon area --study has "
                "those of configs"
            )
        for config in self.configs:
            baseline = wing_of(config, "configs").baseline
            alone = all(own is None or type(own) is type(config) for own in self.layers.values())
            if alone and baseline.of is not None and baseline.of(config) == config:
                raise ValueError(
                    f"configs: {baseline.hardware} is the {baseline.name} baseline, which is always measured; leave it "
                    "out"
                )
        for name in ("spec", "weights"):
            if name in self.model_options:
                raise ValueError(f"model_options: {name!r} is not for the factory; give model and weights themselves")
        for name in ("configs", "states"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: the same one is given twice")
        if not self.states:
            object.__setattr__(self, "states", tuple(map(State, default(self.wings, baselines=bool(self.configs)))))
        self._check_names()
        return self

    def _check_names(self) -> None:
        """Of policies: rows of results are told apart by them."""
        taken = {FLOAT, *map(repr, self.configs), *(card.baseline.name for card in cards().values())}
        for policy in self.policy:
            if policy.name in taken:
                raise ValueError(f"policy: the name {policy.name!r} is taken; give each policy a name of its own")
            taken.add(policy.name)

    @property
    def chips(self) -> tuple[Any, ...]:
        """All that is measured beside baselines: configs, then policies."""
        return (*self.configs, *self.policy)

    @property
    def wings(self) -> tuple[Card, ...]:
        """The wings present, in the order in which they were registered."""
        own = (config for policy in self.policy for config in policy.values())
        present = {type(config) for config in (*self.configs, *self.layers.values(), *own)}
        return tuple(card for config, card in cards().items() if config in present)

    def identity(self) -> dict[str, Any]:
        """What decides a single measurement: all but which of them to make, how fast, and where results go."""
        values = self.model_dump(mode="json", exclude={"configs", "policy", "states", "out", "cpu_threads", "liberty"})
        values["calibration"].pop("seeds")
        return values

    def to_yaml(self) -> str:
        """The recipe as YAML, every default written out; `Recipe.from_yaml` reads it back as the same recipe."""
        none = set() if self.policy else {"policy"}  # who has no policies need not learn what they are
        none |= set() if self.liberty else {"liberty"}
        return yaml.safe_dump(
            self.model_dump(mode="json", exclude=none), sort_keys=False, allow_unicode=True, width=110
        )
