"""Networks with their hardware and repairs in one file, for the commands: what `recoup.save` writes and reads."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from recoup.emulate import restore_
from recoup.errors import RecoupError
from recoup.evaluation import Accuracy
from recoup.network.answers import Answers
from recoup.repair import describe
from recoup.saving import load, save
from recoup.study import Recipe
from recoup.study.hardware import name_of
from recoup.study.lab import Lab
from recoup.study.quality import Quality, perplexity_text
from recoup.study.repairs import NONE, State
from recoup.study.sources import difference_of, numbers_of, source_of

Chip = Annotated[
    str | None,
    typer.Option(help="A file of recoup.save, or hf:FOLDER with recoup.safetensors: weights, hardware and repairs."),
]
SaveChip = Annotated[
    Path | None, typer.Option(help="Also write the network with its hardware and repairs to this file (recoup.save).")
]


def refuse_beside_chip(chip: str | None, options: dict[str, Any]) -> None:
    """A chip brings its own hardware and weights.

    Raises:
        RecoupError: an option that says otherwise, by name.
    """
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if chip is not None and given:
        raise RecoupError(
            f"--chip {chip!r} brings its own weights, hardware and repairs: leave out {', '.join(given)}, or take only "
            "its float network with --weights"
        )


def evaluate_chip(
    chip: str,
    model: str,
    data: str,
    limit: int | None,
    batch_size: int,
    options: dict[str, Any],
    as_json: bool,
    *,
    split: str = "test",
    seed: int | None = None,
    context: int | None = None,
) -> None:
    """The accuracy, or nats, of a file's network on its hardware, and of its float network."""
    network = load(chip, model, **options).eval()
    source = source_of(data, model, network, context)
    test = source.load(split, limit, seed)
    told = describe(network)
    found = {"chip": source.judged(network, test.batches(batch_size))}
    found["float"] = source.judged(restore_(network), test.batches(batch_size))
    lost = _lost(source.quality, found)
    if source.quality.paired:
        found = {name: numbers_of(value) for name, value in found.items()}
    else:
        found = {name: {k: v for k, v in value.items() if k != "answers"} for name, value in found.items()}
    found["lost"] = lost
    if as_json:
        typer.echo(json.dumps({**found, "layers": told.to_dict()}, indent=1))
        return
    typer.echo(told)
    for name in ("float", "chip"):
        typer.echo(f"{name:6} {_told(found[name])}")
    quality = source.quality
    least, low, high = (quality.signed(lost[name]) for name in (quality.unit, "low", "high"))
    flips = "" if quality.paired else f": {lost['wrong_now']} are wrong now, {lost['right_now']} right now"
    typer.echo(f"{'lost':6} {least} {quality.unit} ({low} to {high}), on the same {quality.samples}{flips}")


def _lost(quality: Quality, found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What a chip loses against float and its interval: points, paired image by image, or nats, window by window."""
    if quality.paired:
        return difference_of(found["chip"]["windows"], found["float"]["windows"])
    now, before = (Answers.from_dict(found[name]["answers"]) for name in ("chip", "float"))
    flips = now.flips(before)
    low, high = flips.interval
    return {quality.unit: flips.points, "low": low, "high": high, "wrong_now": flips.lost, "right_now": flips.won}


def check_saved(recipe: Recipe, shard: str | None = None) -> None:
    """A file holds one network, and is written once.

    Raises:
        RecoupError: several configs or policies; a shard of a study.
    """
    if shard is not None:
        raise RecoupError("--save-chip: a shard makes a part of the measurements; give it to the run without --shard")
    if len(recipe.chips) > 1:
        named = ", ".join(map(name_of, recipe.chips))
        raise RecoupError(f"--save-chip: a file holds one network, and there are {len(recipe.chips)} configs: {named}")


def save_chip(recipe: Recipe, path: Path) -> None:
    """Write a study's network as its first seed repaired it: in the state that a verdict quotes before the others."""
    lab = Lab(recipe)
    config = recipe.chips[0]
    states = [State(name) for name in lab.hardware(config).quoted if name in recipe.states]
    state = next((one for one in states if lab.has_norms or not one.needs_norms), NONE)
    save(lab.repaired(config, state, recipe.calibration.seeds[0]), path)
    typer.echo(f"recoup: {path} holds {name_of(config)}, {state}", err=True)


def _told(found: dict[str, Any]) -> str:
    if "nats" in found:
        interval = f"({found['low']:.4f} to {found['high']:.4f})"
        reached = f"{found['nats']:.4f} nats a token {interval}"
        return f"{reached}, perplexity {perplexity_text(found['perplexity'])}, {found['count']} tokens"
    accuracy = Accuracy(**found)
    low, high = accuracy.interval
    return f"{accuracy.top1:6.2f} % top-1 ({low:.2f} to {high:.2f}), {accuracy.count} images"
