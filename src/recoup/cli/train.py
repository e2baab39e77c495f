"""`recoup train`: fine-tune on narrow accumulators, train with LightNorm, as a pipeline does, or in float."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from recoup.cli.chip import Chip, SaveChip, refuse_beside_chip
from recoup.cli.common import Wing, check_target, distinct, importable, load_wings
from recoup.errors import RecoupError
from recoup.policy import Policy
from recoup.study.configs import examples, layer_option
from recoup.training.run import TrainingRecipe, run_training
from recoup.wings import cards

TRAINABLE = [name for card in cards().values() if card.trains for name in card.presets]


def train(
    model: Annotated[str, typer.Option(help="A name such as resnet20, or package.module:factory.")],
    data: Annotated[str, typer.Option(help="digits, cifar10:DIR, mnist:DIR, imagefolder:DIR or hf:NAME.")],
    weights: Annotated[
        str | None, typer.Option(help="The float checkpoint to start from.", show_default="none")
    ] = None,
    norm: Annotated[str | None, typer.Option(help="batch, group or none, for recoup's own models.")] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            help="Batch one with a pipeline's delays: none, stash, sc, lwpv, lwpw, lwpv+sc, lwpw+sc, spectrain."
        ),
    ] = None,
    delays: Annotated[
        str,
        typer.Option(
            help="Pipeline: fine-grained, 1f1b, or the updates that all stages are late; 0 is plain SGD at batch one."
        ),
    ] = "fine-grained",
    update_size: Annotated[
        int, typer.Option(help="Pipeline: samples whose gradients are averaged into one update.")
    ] = 1,
    ranks: Annotated[
        int, typer.Option(help="Pipeline: processes of this machine that share it; or start them with torchrun.")
    ] = 1,
    reference_batch: Annotated[
        int,
        typer.Option(help="Pipeline: batch size that --lr and --momentum belong to; they are scaled to --update-size."),
    ] = 128,
    config: Annotated[
        str | None,
        typer.Option(help=f"Hardware: {', '.join(TRAINABLE)}, or as in Python: {examples()}.", show_default="float"),
    ] = None,
    chip: Chip = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(help="NAME=CONFIG or re:PATTERN=CONFIG, or =float. Repeatable, first match wins."),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(help="A policy's YAML file: which layer runs on what; without --config."),
    ] = None,
    calibration_images: Annotated[
        int, typer.Option(help="Training images that decide activation scales, where the hardware works on them.")
    ] = 512,
    epochs: Annotated[int, typer.Option(help="Epochs; of fine-tuning in two stages, the first.")] = 5,
    underflow_epochs: Annotated[int, typer.Option(help="Epochs of the second stage, the hardware as it is.")] = 1,
    one_stage: Annotated[bool, typer.Option("--one-stage", help="All epochs with the unit as it is.")] = False,
    learning_rate: Annotated[float, typer.Option("--lr", help="Highest learning rate of the first stage.")] = 1e-3,
    underflow_learning_rate: Annotated[
        float | None, typer.Option("--underflow-lr", help="Of the second stage.", show_default="a tenth")
    ] = None,
    schedule: Annotated[str, typer.Option(help="constant, linear or cosine.")] = "cosine",
    warm_up: Annotated[int, typer.Option(help="Steps of linear rise.")] = 0,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw.")] = "sgd",
    momentum: Annotated[float, typer.Option(help="Of sgd.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Of either.")] = 1e-4,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 128,
    augment: Annotated[bool, typer.Option("--augment/--no-augment", help="As the data set knows how.")] = True,
    seed: Annotated[int, typer.Option(help="Of order, augmentation, initial weights and random rounding.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Training images to use.", show_default="all")] = None,
    test_limit: Annotated[int | None, typer.Option(help="Test images to use.", show_default="all")] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, log, weights and training.json.")] = Path(
        "recoup-training"
    ),
    save_chip: SaveChip = None,
    wing: Wing = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results as JSON on standard output.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard what another run left there.")] = False,
) -> None:
    """Train, or fine-tune on narrow accumulators in two stages; interrupted or killed, the same command goes on."""
    load_wings(wing)
    refuse_beside_chip(chip, {"config": config, "layers": layers, "policy": policy, "weights": weights})
    if policy is not None and (config is not None or layers):
        raise RecoupError("--policy names the hardware of every layer: leave out --config and --layers")
    values: dict[str, Any] = {name: value for name, value in locals().items() if name in TrainingRecipe.model_fields}
    named = (layer_option(text) for text in layers or []) if policy is None else Policy.load(policy).items()
    values["layers"] = distinct(named, "--layers")
    check_target(save_chip, "--save-chip", out)
    recipe = TrainingRecipe.build(values)
    with importable():
        result = run_training(recipe, out, overwrite=overwrite, progress=not as_json, chip=save_chip)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    for name, value in result["accuracy"].items():
        typer.echo(f"{name:24} {value:6.2f} %")
    typer.echo(f"Written: {out / 'weights.safetensors'}, {out / 'training.json'}")
