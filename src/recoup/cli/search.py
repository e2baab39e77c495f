"""`recoup search`: the cheapest hardware, layer by layer, from a recipe."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from recoup.cli.common import AnyCpu, Cluster, Divided, Json, ShardOf, Wing, Workers, importable, load_wings
from recoup.errors import RecoupError
from recoup.search.recipe import SearchRecipe
from recoup.search.running import How, planned, run
from recoup.search.scoring import Scores
from recoup.tasks.shards import IncompleteError

STAGES = {
    "plan": "say what would be measured",
    "score": "measure every layer on every option",
    "front": "sweep budgets, measuring nothing more",
    "verify": "measure every point of the front",
    "run": "all of it",
}

Stage = Annotated[str, typer.Argument(help="; ".join(f"{name}: {what}" for name, what in STAGES.items()))]
RecipeFile = Annotated[Path, typer.Argument(help="A search recipe: model, data, space, cost.")]
Change = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, such as scoring.images=2000.")]
Budget = Annotated[float | None, typer.Option(help="Points of top-1 (nats) that may be lost.", show_default="recipe's")]
Limits = Annotated[list[str] | None, typer.Option("--limit", help="COST=SHARE of the first option's, or with a unit.")]
Tuned = Annotated[
    list[str] | None, typer.Option(help="POLICY.yaml=WEIGHTS of recoup train: joins the front. Repeatable.")
]
Liberty = Annotated[
    list[str] | None, typer.Option(help="A cell library for energy and area. Repeatable: read together.")
]


def search(
    stage: Stage,
    recipe: RecipeFile,
    change: Change = None,
    budget: Budget = None,
    limit: Limits = None,
    liberty: Liberty = None,
    tuned: Tuned = None,
    workers: Workers = None,
    cluster: Cluster = None,
    shard: ShardOf = None,
    any_cpu: AnyCpu = False,
    wing: Wing = None,
    as_json: Json = False,
) -> None:
    """The cheapest hardware layer by layer within an accuracy budget, and the whole front, measured."""
    load_wings(wing)
    if stage not in STAGES:
        raise RecoupError(f"search {stage!r}: the first argument must be one of {', '.join(STAGES)}")
    changes = [*(change or []), *([f"budget={budget}"] if budget is not None else [])]
    changes += [f"liberty={json.dumps(liberty)}"] if liberty else []
    changes += [f"tuned={json.dumps([_tuned(text) for text in tuned])}"] if tuned else []
    made = SearchRecipe.load(recipe, [*changes, *(f"limits.{text}" for text in limit or [])])
    with importable():
        if stage == "plan":
            _say_plan(planned(made), as_json)
            return
        with Divided(workers, cluster, shard, any_cpu).options() as options:
            options["workers"] = workers or 1  # a search is on one thread in this process too
            how = How(**options, progress=lambda line: typer.echo(line, err=True))
            try:
                found = run(made, stage, how)  # type: ignore[arg-type]
            except IncompleteError as others:
                if how.shard is None:
                    raise
                typer.echo(f"recoup: this shard's part is done; {others}", err=True)
                return
    if isinstance(found, Scores):
        _say_scores(found, as_json)
    else:
        _report(made, found, as_json)


def _tuned(text: str) -> dict[str, str]:
    found = re.fullmatch(r"(.+?\.ya?ml)=(.+)", text) or re.fullmatch("([^=]+)=(.+)", text)
    if found is None:
        raise RecoupError(f"--tuned {text!r}: must be POLICY.yaml=WEIGHTS")
    return {"policy": found[1], "weights": found[2]}


def _say_plan(labels: list[str], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"measurements": labels}, indent=1))
        return
    typer.echo("\n".join(labels))
    typer.echo(f"{len(labels)} measurements, each independent of the others", err=True)


def _say_scores(scores: Scores, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(scores.to_dict(), indent=1))
        return
    typer.echo(f"{scores.total} measurements, {scores.made} of them new; {scores.surrogate}")


def _report(recipe: SearchRecipe, found: Any, as_json: bool) -> None:
    from rich.console import Console, Group
    from rich.text import Text

    from recoup.report.alone import write_alone
    from recoup.report.chapters import parts_beside
    from recoup.report.terminal import drawn

    folder = Path(recipe.out)
    page = write_alone(folder, f"{found.model} on {found.data}: search", f"{found.date[:10]}", [found])
    if as_json:
        typer.echo(json.dumps(found.model_dump(mode="json"), indent=1))
        return
    console = Console()
    for chapter, study in parts_beside([found]):
        tables = [drawn(table) for table in chapter.totals(study)]
        console.print(Group(*tables, *(Text(text, style="bold") for text in chapter.verdicts(study))))
    written = ", ".join(str(path) for path in (folder / "search.json", folder / "front.csv", page))
    console.print(f"Written: {written}", soft_wrap=True, highlight=False)
