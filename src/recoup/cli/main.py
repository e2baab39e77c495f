"""The command line: parses, calls, prints. Heavy libraries are imported by the commands that need them."""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recoup.cli.train import train
from recoup.errors import RecoupError
from recoup.version import __version__

if TYPE_CHECKING:
    from recoup.study import Recipe, Results

app = typer.Typer(
    name="recoup",
    help="What cost-cutting neural-network hardware does to your network's accuracy, and how to win it back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEBUG: ContextVar[bool] = ContextVar("debug", default=False)

Json = Annotated[bool, typer.Option("--json", help="Print results as JSON, and nothing else, on standard output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Discard what another study left in the folder.")]


def print_version(asked: bool) -> None:
    """Answer ``--version``."""
    if asked:
        typer.echo(f"recoup {__version__}")
        raise typer.Exit


@app.callback()
def main(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command."""
    DEBUG.set(debug)


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Errors as one line on standard error with exit code 2; Ctrl-C with what is kept and 130."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (RecoupError, OSError) as error:
            if isinstance(error, BrokenPipeError) or DEBUG.get():
                raise
            typer.echo(f"recoup: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as interrupt:
            notes = getattr(interrupt, "__notes__", [])
            typer.echo("\n".join(["recoup: interrupted", *(f"recoup: {note}" for note in notes)]), err=True)
            raise typer.Exit(130) from None

    return run


@app.command()
@reported
def evaluate(
    model: Annotated[str, typer.Option(help="A name such as resnet20, or package.module:factory.")],
    data: Annotated[str, typer.Option(help="digits, cifar10:DIR, mnist:DIR, imagefolder:DIR or hf:NAME.")],
    weights: Annotated[str | None, typer.Option(help="The float checkpoint: .safetensors or a torch file.")] = None,
    threads: Annotated[str | None, typer.Option(help="Threads a multiplier, comma-separated. [default: 2,4]")] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            help="Hardware: nbsmt-2t, nbsmt-4t, lba-m7e4, lightnorm or NBSMT(threads=4, policy='S'). Repeatable."
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(help="NAME=CONFIG or re:PATTERN=CONFIG, or =float. Repeatable, first match wins."),
    ] = None,
    state: Annotated[list[str] | None, typer.Option(help="A repair to measure, such as paired. Repeatable.")] = None,
    calibration_images: Annotated[int, typer.Option(help="Training images to calibrate and repair with.")] = 1024,
    augment: Annotated[
        bool | None, typer.Option("--augment/--no-augment", help="Augment them. [default: where the data know how]")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Draws of calibration images, comma-separated.")] = "0,1,2",
    limit: Annotated[int | None, typer.Option(help="Test images to use. [default: all]")] = None,
    batch_size: Annotated[int, typer.Option(help="Test images a batch.")] = 250,
    profile_images: Annotated[int, typer.Option(help="Images for the per-layer figures; 0: none.")] = 256,
    array: Annotated[str, typer.Option(help="Rows x columns of the array.")] = "16x16",
    model_option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the factory. Repeatable.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    cpu_threads: Annotated[int | None, typer.Option(help="CPU threads for torch. [default: torch's choice]")] = None,
    out: Annotated[str, typer.Option(help="Folder for results.json, CSV tables and report.html.")] = "recoup-results",
    save_recipe: Annotated[Path | None, typer.Option(help="Also write the recipe to this file.")] = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """The main job: float accuracy, the hardware's before and after repair, layers, cycles and traffic."""
    from recoup.storage.files import write_atomically
    from recoup.study import Recipe
    from recoup.study.configs import layer_option

    values: dict[str, Any] = {
        "model": model,
        "weights": weights,
        "model_options": dict(_pair(text, "--model-option") for text in model_option or []),
        "data": data,
        "calibration": {"images": calibration_images, "augment": augment, "seeds": _integers(seeds, "--seeds")},
        "test": {"limit": limit, "batch_size": batch_size},
        "configs": _configs(threads, config),
        "layers": dict(layer_option(text) for text in layers or []),
        "profile_images": profile_images,
        "array": _array(array),
        "device": device,
        "cpu_threads": cpu_threads,
        "out": out,
    }
    if state:
        values["states"] = state
    recipe = Recipe.build(values, "recoup evaluate")
    if save_recipe is not None:
        write_atomically(save_recipe, recipe.to_yaml())
    _study(recipe, overwrite, as_json)


@app.command()
@reported
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, for example one that `recoup evaluate` left.")],
    change: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, such as calibration.images=512.")
    ] = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure what a recipe asks for; interrupted, the same command goes on where it stopped."""
    from recoup.study import Recipe

    _study(Recipe.load(recipe, change), overwrite, as_json)


app.command()(reported(train))


@app.command()
@reported
def report(folder: Annotated[Path, typer.Argument(help="A folder with results.json.")]) -> None:
    """Write report.html and the CSV tables anew from a folder's results.json."""
    from recoup.report import write_html, write_tables
    from recoup.study import Results
    from recoup.study.pipeline import PipelineResults

    results = Results.load(folder)
    place = folder if folder.is_dir() else folder.parent
    pipeline = PipelineResults.load(place)
    for path in [*write_tables(results, place), write_html(results, place, pipeline)]:
        typer.echo(path)


@app.command()
@reported
def demo(
    out: Annotated[Path, typer.Option(help="Folder for weights and results.")] = Path("recoup-demo"),
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """The whole story on scikit-learn's handwritten digits: trains a small network first, needs no download."""
    from recoup.cli.demo import demo_recipe, run_pipelines, train_weights

    if train_weights(out):
        typer.echo(f"recoup: trained a small network on scikit-learn's digits, kept in {out}", err=True)
    if run_pipelines(out, overwrite=overwrite):
        typer.echo(f"recoup: trained the pipelines at batch one, kept in {out}", err=True)
    _study(demo_recipe(out), overwrite, as_json)


@app.command()
@reported
def doctor(as_json: Json = False) -> None:
    """Versions, the processor, and which path the emulation takes; exit code 1 if something does not work."""
    from recoup.cli.doctor import examine

    checks = examine()
    if as_json:
        typer.echo(json.dumps([{"name": c.name, "value": c.value, "ok": c.ok} for c in checks], indent=1))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            typer.echo(f"{'ok   ' if check.ok else 'FAULT'}  {check.name:{width}}  {check.value}")
    raise typer.Exit(0 if all(check.ok for check in checks) else 1)


def _study(recipe: "Recipe", overwrite: bool, as_json: bool) -> None:
    from rich.console import Console

    from recoup.report import write_html, write_tables
    from recoup.report.terminal import tables
    from recoup.study import run as run_study
    from recoup.study.pipeline import PipelineResults

    with _importable(os.getcwd()):  # noqa: PTH109 -- a string for sys.path
        results: Results = run_study(recipe, overwrite=overwrite)
    folder = Path(recipe.out)
    pipeline = PipelineResults.load(folder)
    paths = [folder / "results.json", *write_tables(results, folder), write_html(results, folder, pipeline)]
    if as_json:
        chapter = {} if pipeline is None else {"pipeline": pipeline.model_dump(mode="json")}
        typer.echo(json.dumps({**results.to_dict(), **chapter}, indent=1))
        return
    console = Console()
    console.print(tables(results, pipeline))
    console.print("Written: " + ", ".join(str(path) for path in paths), soft_wrap=True, highlight=False)


@contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Models beside the user may be named as module:factory, as with ``python -m``."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _integers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecoupError(f"{option} {text!r}: must be whole numbers separated by commas, such as 0,1,2") from None


def _configs(threads: str | None, configs: list[str] | None) -> list[str]:
    """The configs asked for; one thread is the baseline, which is measured anyway."""
    if threads is None and configs:
        return configs
    counts = [count for count in _integers(threads or "2,4", "--threads") if count != 1]
    asked = [f"NBSMT(threads={count})" for count in counts] + (configs or [])
    if not asked:
        raise RecoupError(f"--threads {threads!r}: name 2, 4 or both; one thread is the baseline and always measured")
    return asked


def _pair(text: str, option: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecoupError(f"{option} {text!r}: must be KEY=VALUE")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecoupError(f"{option} {text!r}: {value!r} is not a YAML value") from None


def _array(text: str) -> dict[str, int]:
    rows, x, columns = text.lower().partition("x")
    if not x or not rows.isdecimal() or not columns.isdecimal():
        raise RecoupError(f"--array {text!r}: must be ROWSxCOLUMNS, such as 16x16")
    return {"rows": int(rows), "columns": int(columns)}
