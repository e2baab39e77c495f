"""What `recoup train` does: loads, emulates, trains, measures before and after, and keeps it all in a folder."""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError
from safetensors.torch import save
from torch import nn

from recoup.calibrate import calibrate_
from recoup.costs import assigned
from recoup.data import Dataset
from recoup.data import load as load_data
from recoup.emulate import emulate_, restore_
from recoup.errors import RecoupError, RecoupWarning
from recoup.evaluation import accuracy as top1
from recoup.evaluation import evaluate
from recoup.grammar import written
from recoup.models import load as load_model
from recoup.network.wing import Phase
from recoup.pipeline import Mitigation
from recoup.saving import load as load_network
from recoup.saving import read
from recoup.saving import save as save_network
from recoup.storage.files import write_atomically
from recoup.storage.folder import make, reserve
from recoup.storage.lock import Lock
from recoup.storage.statefile import kind_and_text, readable
from recoup.study.configs import as_config
from recoup.study.hardware import needs_scales, scaled_once_emulated
from recoup.training.checkpoint import FILE as CHECKPOINT
from recoup.training.loop import LOG, Settings, Stage, train
from recoup.training.pipelined import FILE as PIPELINE
from recoup.training.pipelined import Pipelined, delays_named, train_pipelined
from recoup.training.ranks import FOLDER as RANKS
from recoup.training.ranks import launch, train_over_ranks, under_torchrun
from recoup.training.schedule import Schedule
from recoup.training.two_stage import stages
from recoup.version import __version__
from recoup.wings import cards, wing_of

RESULT, WEIGHTS, RECIPE = "training.json", "weights.safetensors", "training-recipe.json"
RESULTS = (CHECKPOINT, PIPELINE, LOG, RESULT, WEIGHTS)


def _unit(value: Any) -> Any:
    config = as_config(value)
    written(config, "recoup train")
    if not wing_of(config, "recoup train").trains:
        able = [card for card in cards().values() if card.trains]
        named = " or ".join(card.config.__name__ for card in able)
        example = next((name for card in able for name in card.presets), named)
        raise ValueError(f"{config!r} cannot be trained with; {named} can, such as {example}")
    return config


def _mitigation(name: Any) -> str:
    Mitigation.parse(name)
    return name


Unit = Annotated[Any, PlainValidator(_unit), PlainSerializer(repr, return_type=str)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]


class TrainingRecipe(BaseModel):
    """Everything that decides a training run; the fields are the options of `recoup train`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    model: str
    data: str
    weights: str | None = None
    norm: Literal["batch", "group", "none"] | None = None
    pipeline: Annotated[str, PlainValidator(_mitigation)] | None = None
    delays: Annotated[str | int, PlainValidator(delays_named)] = "fine-grained"
    update_size: Annotated[int, Field(ge=1)] = 1
    ranks: Annotated[int, Field(ge=1)] = 1
    reference_batch: Annotated[int, Field(ge=1)] = 128
    chip: str | None = None
    config: Unit | None = None
    layers: dict[str, Unit | None] = {}
    calibration_images: Annotated[int, Field(ge=1)] = 512
    epochs: Count = 5
    underflow_epochs: Count = 1
    one_stage: bool = False
    learning_rate: Rate = 1e-3
    underflow_learning_rate: Rate | None = None
    schedule: Schedule = "cosine"
    warm_up: Count = 0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch_size: Annotated[int, Field(ge=1)] = 128
    augment: bool = True
    seed: Count = 0
    limit: Annotated[int, Field(ge=1)] | None = None
    test_limit: Annotated[int, Field(ge=1)] | None = None
    save_every: Annotated[int, Field(ge=1)] = 100

    @classmethod
    def build(cls, values: dict[str, Any]) -> "TrainingRecipe":
        """From plain values; the error names the option."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise RecoupError(f"recoup train: {place}: {first['msg'].removeprefix('Value error, ')}") from None

    @property
    def settings(self) -> Settings:
        """The loop's part."""
        names = ("batch_size", "optimizer", "momentum", "weight_decay", "schedule", "warm_up", "augment", "seed")
        return Settings(**{name: getattr(self, name) for name in (*names, "save_every")})

    @property
    def emulates(self) -> bool:
        """Whether any layer is to run on emulated hardware."""
        return bool(self.configs)

    @property
    def configs(self) -> list[Any]:
        """The hardware of the layers, as far as they have any: a chip's own, or what the options say."""
        if self.chip is not None:
            return [_unit(text) for text in dict.fromkeys(read(self.chip)[0]["layers"].values())]
        return [config for config in (self.config, *self.layers.values()) if config is not None]

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Those of the first wing present that fine-tunes in phases, as LBA, whose underflow comes last."""
        found = [phases for config in self.configs if (phases := wing_of(config, "recoup train").phases)]
        return () if self.one_stage or not found else found[0]

    @property
    def stages(self) -> list[Stage]:
        """One, or those of the phases."""
        if not self.phases:
            return [Stage("one stage" if self.emulates else "float", self.epochs, self.learning_rate)]
        rates = (self.learning_rate, self.underflow_learning_rate)
        return stages(self.phases, self.epochs, self.underflow_epochs, *rates)


def run_training(
    recipe: TrainingRecipe,
    folder: Path,
    *,
    overwrite: bool = False,
    progress: bool = True,
    chip: str | Path | None = None,
) -> dict[str, Any]:
    """Run a recipe, or go on with it where ``folder`` says it was interrupted.

    The folder receives the recipe, checkpoint.safetensors, training.jsonl (a row per epoch), and at the end
    weights.safetensors, which loads as a float checkpoint, and training.json.

    ``chip`` is a file that also receives the trained network with its hardware (`recoup.save`).

    Returns:
        The content of training.json: accuracies in percent (float start, before training, after every stage), the
        epochs, the recipe, versions.

    Raises:
        RecoupError: a model, data or layers that do not fit; another run's folder; a loss that is not finite.
    """
    _check(recipe, chip)
    if under_torchrun() and int(os.environ["WORLD_SIZE"]) != recipe.ranks:
        raise RecoupError(
            f"recoup train: torchrun started {os.environ['WORLD_SIZE']} processes for ranks={recipe.ranks}: give "
            "--pipeline and --ranks with that number"
        )
    first = not under_torchrun() or os.environ["RANK"] == "0"
    torch.manual_seed(recipe.seed)
    model = _network(recipe)
    data, test = _images(recipe)
    _check_fits(recipe, model, data, test)
    if first:
        _reserve(recipe, folder, overwrite and not under_torchrun())
    if recipe.ranks > 1 and not under_torchrun():
        launch(folder, recipe.ranks)
        return json.loads((folder / RESULT).read_text("utf-8"))
    accuracy = _accuracy_before(model, recipe, test)
    if recipe.pipeline is None:
        epochs = train(model, data, test, recipe.stages, recipe.settings, folder=folder, progress=progress).epochs
        accuracy |= {f"after {row['stage']}": row["top1"] for row in epochs}
    else:
        epochs = _pipelined(recipe, model, data, test, folder, progress)
        accuracy |= {f"after the pipeline ({recipe.pipeline})": epochs[-1]["top1"]}
    if chip is not None:
        save_network(model, chip)
    restore_(model)
    if not first:
        return {"accuracy": accuracy, "epochs": epochs}
    write_atomically(folder / WEIGHTS, save({n: t.contiguous() for n, t in model.state_dict().items()}))
    result = {
        "accuracy": accuracy,
        "epochs": epochs,
        "recipe": recipe.model_dump(mode="json"),
        "recoup": __version__,
        "torch": torch.__version__,
    }
    write_atomically(folder / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def _pipelined(
    recipe: TrainingRecipe, model: nn.Module, data: Dataset, test: Dataset, folder: Path, progress: bool
) -> list[dict[str, Any]]:
    """Train as a pipeline does, on one process or several."""
    options: dict[str, Any] = {
        "mitigation": recipe.pipeline,
        "epochs": recipe.epochs,
        "learning_rate": recipe.learning_rate,
        "reference_batch": recipe.reference_batch,
        "delays": recipe.delays,
        "update_size": recipe.update_size,
    }
    if recipe.ranks > 1:
        plan = Pipelined.of(model, len(data), recipe.settings, **options)
        return train_over_ranks(model, data, test, plan, recipe.settings, recipe.ranks, folder)
    return train_pipelined(model, data, test, settings=recipe.settings, folder=folder, progress=progress, **options)


def _network(recipe: TrainingRecipe) -> nn.Module:
    """The network to be trained, with a chip's hardware and repairs where it comes from one."""
    options: dict[str, Any] = {} if recipe.norm is None else {"norm": recipe.norm}
    model = load_model(recipe.model, recipe.weights, **options)
    return model if recipe.chip is None else load_network(recipe.chip, model)


def _images(recipe: TrainingRecipe) -> tuple[Dataset, Dataset]:
    """To train on and to test with."""
    data = load_data(recipe.data, "train", limit=recipe.limit, seed=recipe.seed if recipe.limit else None)
    test = load_data(recipe.data, "test", limit=recipe.test_limit, seed=0 if recipe.test_limit else None)
    return data, test


def _calibrate(model: nn.Module, recipe: TrainingRecipe, data: Dataset) -> None:
    """Activation scales from training images, where the hardware works on them; they outlast `restore_`."""
    late = scaled_once_emulated(recipe.config)
    if not any(map(needs_scales, recipe.layers.values() if late else recipe.configs)):
        return
    own = assigned(model, recipe.layers, "recoup train")
    chosen: dict[str, bool | None] = {name: True for name, config in own.items() if needs_scales(config)}
    chosen |= {key: None for key, config in recipe.layers.items() if config is None}
    if late or not needs_scales(recipe.config):
        chosen["re:.*"] = None
    calibrate_(model, _calibration(recipe, data), chosen)


def _calibration(recipe: TrainingRecipe, data: Dataset) -> Any:
    return data.subset(min(recipe.calibration_images, len(data)), recipe.seed).batches(recipe.batch_size)


def _accuracy_before(model: nn.Module, recipe: TrainingRecipe, test: Dataset) -> dict[str, float]:
    """Of the float network, unless a chip brought its own hardware, and on the hardware, which it is put on."""
    accuracy = {}
    if recipe.chip is None:
        accuracy["float, before"] = evaluate(model, test.batches(250)).top1
        if recipe.emulates:
            emulate_(model, recipe.config, recipe.layers)
    if recipe.emulates:
        accuracy["emulated, before"] = evaluate(model, test.batches(250)).top1
    return accuracy


def _check(recipe: TrainingRecipe, chip: str | Path | None) -> None:
    """Refuse options that do not go together."""
    if chip is not None and recipe.ranks > 1:
        raise RecoupError("recoup train: save_chip: several processes write weights alone; leave out --ranks")
    if sum(stage.epochs for stage in recipe.stages) == 0:
        raise RecoupError("recoup train: epochs: there is nothing to train")
    if recipe.pipeline is not None and recipe.phases:
        raise RecoupError("recoup train: pipeline: fine-tuning in two stages has no pipeline; add --one-stage")
    if recipe.pipeline is None:
        for name in ("delays", "update_size", "ranks"):
            if getattr(recipe, name) != TrainingRecipe.model_fields[name].default:
                raise RecoupError(f"recoup train: {name}: only a pipeline has it; add --pipeline none, or a mitigation")
    if recipe.layers and not recipe.emulates:
        raise RecoupError("recoup train: layers: no layer has a config, and there is none for the others")


def _check_fits(recipe: TrainingRecipe, model: nn.Module, data: Dataset, test: Dataset) -> None:
    """Find what does not fit before the folder is claimed: a run that is refused leaves it to others."""
    if len(data) < recipe.batch_size and recipe.pipeline is None:
        raise RecoupError(f"train: {len(data)} images are less than a batch of {recipe.batch_size}")
    few = [next(iter(test.batches(2)))]
    try:
        top1(model, few)
    except RecoupError:
        raise
    except Exception as error:  # a network of the user's may fail in any way
        first = (str(error).splitlines() or ["no message"])[0]
        raise RecoupError(
            f"recoup train: model {recipe.model!r} does not take the images of {recipe.data!r}, "
            f"{list(few[0][0].shape[1:])} each: {type(error).__name__}: {first}"
        ) from error
    if recipe.emulates and recipe.chip is None:
        _calibrate(model, recipe, data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RecoupWarning)  # said when it is emulated to stay
            emulate_(model, recipe.config, recipe.layers)
            if scaled_once_emulated(recipe.config):
                calibrate_(model, _calibration(recipe, data))
            restore_(model)


def _reserve(recipe: TrainingRecipe, folder: Path, overwrite: bool) -> None:
    """Make sure that the folder holds this run or nothing."""
    ours = recipe.model_dump(mode="json")
    # a recipe written before an option existed has its default
    defaults = {name: field.default for name, field in TrainingRecipe.model_fields.items()}

    def damaged(error: Exception) -> str:
        return (
            f"{folder / RECIPE} is no recipe of a training run ({kind_and_text(error)}): choose another folder with "
            "--out, or use --overwrite"
        )

    def same(text: str) -> bool:
        theirs = defaults | readable(lambda: dict(json.loads(text)), damaged)
        others = theirs["ranks"]
        elsewhere = isinstance(others, int) and others != recipe.ranks and min(others, recipe.ranks) > 1
        for name, value in ours.items():
            if theirs[name] != value and not (elsewhere and name == "ranks"):
                raise RecoupError(
                    f"{folder} holds another run ({name} was {theirs[name]!r} and is {value!r}): choose another "
                    "folder with --out, or use --overwrite"
                )
        if elsewhere:  # a pipeline may go on over other ranks, once those before have left it
            make(folder / RANKS)
            Lock(folder / RANKS / "rank0.lock", "recoup train", 0.0).release()
        return not elsewhere

    reserve(folder, RECIPE, json.dumps(ours, indent=1) + "\n", same, results=RESULTS, overwrite=overwrite)
    if overwrite:
        shutil.rmtree(folder / RANKS, ignore_errors=True)
