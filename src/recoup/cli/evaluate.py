"""`recoup evaluate`: a study from options."""

from pathlib import Path
from typing import Annotated, Any

import typer

from recoup.cli.chip import Chip, SaveChip, check_saved, evaluate_chip, refuse_beside_chip
from recoup.cli.chip import save_chip as write_chip
from recoup.cli.common import (
    AnyCpu,
    Cluster,
    Divided,
    Json,
    Overwrite,
    ShardOf,
    Wing,
    Workers,
    asked,
    check_target,
    distinct,
    importable,
    integers,
    load_wings,
    pair,
    run_recipe,
)
from recoup.errors import RecoupError
from recoup.network.wing import Card
from recoup.storage.files import write_atomically
from recoup.study import Recipe
from recoup.study.configs import examples, layer_option, presets
from recoup.study.repairs import states
from recoup.wings import cards

WITH_CHIP = {"chip", "model", "data", "limit", "batch_size", "model_option"}
WITH_CHIP |= {"test_split", "test_seed", "wing", "as_json", "window"}
"""The options of a chip; about all others it leaves nothing to say."""

Model = Annotated[str, typer.Option(help="A name such as resnet20, package.module:factory, or hf:FOLDER.")]
Data = Annotated[
    str,
    typer.Option(
        help="digits, cifar10:DIR, mnist:DIR, imagefolder:DIR or hf:NAME; text:FILE for a language model, in windows."
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context", min=1, help="Tokens a window of a text.", show_default="as many as the network takes, up to 1024"
    ),
]
Weights = Annotated[
    str | None, typer.Option(help="The float checkpoint: .safetensors or a torch file; FILE#KEY of several in it.")
]
Threads = Annotated[
    str | None, typer.Option(help="Threads a multiplier, comma-separated.", show_default="2,4 without --config")
]
Configs = Annotated[
    list[str] | None,
    typer.Option(
        help=f"Hardware: a preset ({', '.join(presets())}), or as in Python: {examples()}. Repeatable.",
        show_default=False,
    ),
]
Policies = Annotated[
    list[str] | None,
    typer.Option("--policy", help="A policy's YAML file: which layer runs on what. Repeatable: they are ranked."),
]
LayerMap = Annotated[
    list[str] | None,
    typer.Option(help="NAME=CONFIG or re:PATTERN=CONFIG, or =float. Repeatable, first match wins."),
]
States = Annotated[
    list[str] | None,
    typer.Option(
        help=f"A state to measure: {', '.join(states(cards().values()))}. Repeatable.",
        show_default="those that belong to the hardware",
    ),
]
ActivationCodes = Annotated[
    str, typer.Option(help="Activation codes: auto (signed where a layer's inputs are negative), unsigned, signed.")
]
NegativeInputs = Annotated[
    str, typer.Option(help="Layers with negative inputs under unsigned codes: error, or float to leave them so.")
]
CalibrationImages = Annotated[
    int | None,
    typer.Option(
        help="Training images (windows) to calibrate and repair with.",
        show_default="1024, or all if fewer",
    ),
]
Augment = Annotated[
    bool | None,
    typer.Option("--augment/--no-augment", help="Augment them.", show_default="where the data know how"),
]
Seeds = Annotated[str, typer.Option(help="Draws of calibration images, comma-separated.")]
Limit = Annotated[int | None, typer.Option(help="Test images (windows) to use.", show_default="all")]
TestSeed = Annotated[int | None, typer.Option(help="Draw them with this seed.", show_default="the first ones")]
TestSplit = Annotated[str, typer.Option(help="The split they are from.")]
CalibrationSplit = Annotated[
    str, typer.Option(help="The split these are from; of the tested one, what --limit leaves.")
]
BatchSize = Annotated[int, typer.Option(help="Test images (windows) a batch.")]
ProfileImages = Annotated[int, typer.Option(help="Images (windows) for the per-layer figures; 0: none.")]
ArrayShape = Annotated[str, typer.Option(help="Rows x columns of the array.")]
Liberty = Annotated[
    list[str] | None, typer.Option(help="A cell library: energy and area of policies too. Repeatable: read together.")
]
ModelOptions = Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the factory. Repeatable.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
CpuThreads = Annotated[int | None, typer.Option(help="CPU threads for torch.", show_default="torch's choice")]
Out = Annotated[str, typer.Option(help="Folder for results.json, CSV tables and report.html.")]
SaveRecipe = Annotated[Path | None, typer.Option(help="Also write the recipe to this file.")]


def evaluate(
    context: typer.Context,
    model: Model,
    data: Data,
    weights: Weights = None,
    window: Context = None,
    threads: Threads = None,
    config: Configs = None,
    policy: Policies = None,
    layers: LayerMap = None,
    state: States = None,
    calibration_images: CalibrationImages = None,
    calibration_split: CalibrationSplit = "train",
    augment: Augment = None,
    activations: ActivationCodes = "auto",
    negative: NegativeInputs = "error",
    seeds: Seeds = "0,1,2",
    limit: Limit = None,
    test_seed: TestSeed = None,
    test_split: TestSplit = "test",
    batch_size: BatchSize = 250,
    profile_images: ProfileImages = 256,
    array: ArrayShape = "16x16",
    liberty: Liberty = None,
    model_option: ModelOptions = None,
    device: Device = "cpu",
    cpu_threads: CpuThreads = None,
    out: Out = "recoup-results",
    save_recipe: SaveRecipe = None,
    workers: Workers = None,
    cluster: Cluster = None,
    shard: ShardOf = None,
    any_cpu: AnyCpu = False,
    chip: Chip = None,
    save_chip: SaveChip = None,
    wing: Wing = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """The main job: float accuracy, the hardware's before and after repair, layers, cycles and traffic."""
    own = load_wings(wing)
    given = dict(locals(), context=window)
    factory = distinct((pair(text, "--model-option") for text in model_option or []), "--model-option")
    refuse_beside_chip(chip, {name: True for name in asked(context) if name not in WITH_CHIP})
    check_target(save_recipe, "--save-recipe")
    check_target(save_chip, "--save-chip", Path(out))
    if chip is not None:
        with importable():
            drawn = {"split": test_split, "seed": test_seed, "context": window}
            evaluate_chip(chip, model, data, limit, batch_size, factory, as_json, **drawn)
        return
    recipe = _recipe(given, factory)
    if save_chip is not None:
        check_saved(recipe, shard)
    if save_recipe is not None:
        write_atomically(save_recipe, recipe.to_yaml())
    run_recipe(recipe, overwrite, as_json, divided=Divided(workers, cluster, shard, any_cpu))
    if save_chip is not None:
        with importable():
            write_chip(recipe, save_chip)


def _recipe(given: dict[str, Any], factory: dict[str, Any]) -> Recipe:
    """What the options say."""
    layers = distinct(map(layer_option, given["layers"] or []), "--layers")
    same = ("model", "weights", "data", "context", "profile_images", "device", "cpu_threads", "out")
    values: dict[str, Any] = {
        **{name: given[name] for name in same},
        "model_options": factory,
        "calibration": {
            "images": given["calibration_images"],
            "split": given["calibration_split"],
            "augment": given["augment"],
            "seeds": integers(given["seeds"], "--seeds"),
            "activations": given["activations"],
            "negative": given["negative"],
        },
        "test": {"limit": given["limit"], "batch_size": given["batch_size"]}
        | {"seed": given["test_seed"], "split": given["test_split"]},
        "layers": layers,
        "array": _array(given["array"]),
        "liberty": given["liberty"] or [],
    }
    if given["policy"]:
        values["policy"] = given["policy"]
    if not given["policy"] or given["threads"] or given["config"]:
        values["configs"] = _configs(given["threads"], given["config"], given["own"], layers)
    if given["state"]:
        values["states"] = given["state"]
    return Recipe.build(values, "recoup evaluate")


def _configs(
    threads: str | None, configs: list[str] | None, own: list[Card], layers: dict[str, str | None]
) -> list[str]:
    """The configs asked for; ``--threads`` is short for the first wing's, whose single thread is always measured.

    Where none is asked for: the presets of the user's ``own`` wings, else two and four threads.
    """
    if threads is None and configs:
        return configs
    if threads is None and any(config is not None for config in layers.values()):
        raise RecoupError(
            "--layers: name the hardware of all other layers with --config; to leave them in float, give --config the "
            "same hardware, and --layers re:.*=float after the others"
        )
    if threads is None and own:
        found = [name for card in own for name in card.presets]
        if found:
            return found
        named = ", ".join(f"{name}(...)" for card in own for name in card.callables)
        raise RecoupError(f"--wing: it has no presets, so name its hardware with --config: {named}")
    first = next(iter(cards().values())).config
    counts = [count for count in integers(threads or "2,4", "--threads") if count != 1]
    asked = [f"{first.__name__}(threads={count})" for count in counts] + (configs or [])
    if not asked:
        raise RecoupError(f"--threads {threads!r}: name 2, 4 or both; one thread is the baseline and always measured")
    return asked


def _array(text: str) -> dict[str, int]:
    rows, x, columns = text.lower().partition("x")
    if not x or not rows.isdecimal() or not columns.isdecimal():
        raise RecoupError(f"--array {text!r}: must be ROWSxCOLUMNS, such as 16x16")
    return {"rows": int(rows), "columns": int(columns)}
