"""`recoup run`: a study from its recipe."""

from pathlib import Path
from typing import Annotated

import typer

from recoup.cli.common import AnyCpu, Cluster, Divided, Json, Overwrite, ShardOf, Wing, Workers, load_wings, run_recipe
from recoup.study import Recipe


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, for example one that `recoup evaluate` left.")],
    change: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, such as calibration.images=512.")
    ] = None,
    workers: Workers = None,
    cluster: Cluster = None,
    shard: ShardOf = None,
    any_cpu: AnyCpu = False,
    wing: Wing = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure what a recipe asks for; interrupted, the same command goes on where it stopped."""
    load_wings(wing)
    run_recipe(Recipe.load(recipe, change), overwrite, as_json, divided=Divided(workers, cluster, shard, any_cpu))
