"""What the commands share: how errors are told, options of several commands, a study from recipe to report."""

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from recoup.errors import RecoupError

if TYPE_CHECKING:
    from recoup.network.wing import Card
    from recoup.study import Recipe, Results

T = TypeVar("T")
DEBUG: ContextVar[bool] = ContextVar("debug", default=False)

Json = Annotated[bool, typer.Option("--json", help="Print results as JSON, and nothing else, on standard output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Discard what another study left in the folder.")]
Wing = Annotated[
    list[str] | None,
    typer.Option("--wing", help="A module with hardware of your own, package.module: it registers it. Repeatable."),
]

Workers = Annotated[int | None, typer.Option(min=1, help="Processes on this machine, one thread each.")]
Cluster = Annotated[
    str | None, typer.Option("--cluster", help="tcp://HOST:PORT of a Dask scheduler, or slurm:n=8,partition=NAME.")
]
ShardOf = Annotated[str | None, typer.Option(help="i/n: make only this part of the measurements; auto: array jobs'.")]
AnyCpu = Annotated[bool, typer.Option("--any-cpu", help="Take measurements of processors with another vector width.")]


@dataclass(frozen=True)
class Divided:
    """Where measurements are made, and which part of them; options of `recoup.study.run` and searches."""

    workers: int | None = None
    cluster: str | None = None
    shard: str | None = None
    any_cpu: bool = False

    @contextmanager
    def options(self) -> "Iterator[dict[str, Any]]":
        """As keyword arguments, while the cluster is held.

        Raises:
            RecoupError: no such shard, a cluster that is none or cannot be reached, processes here and a cluster.
        """
        from recoup.tasks.cluster import cluster
        from recoup.tasks.shards import Shard

        if self.workers is not None and self.cluster is not None:
            raise RecoupError("--workers and --cluster: the cluster has workers of its own; give one of the two")
        shard = None if self.shard is None else Shard.parse(self.shard)
        with nullcontext() if self.cluster is None else cluster(self.cluster, tell=_said) as executor:
            yield {"workers": self.workers, "executor": executor, "shard": shard, "any_cpu": self.any_cpu}


def _said(line: str) -> None:
    typer.echo(f"recoup: {line}", err=True)


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Errors as one line on standard error with exit code 2; Ctrl-C with what is kept and 130."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (RecoupError, OSError) as error:
            if isinstance(error, BrokenPipeError) or DEBUG.get():
                raise
            typer.echo(f"recoup: {getattr(error, 'on_command_line', error)}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as interrupt:
            notes = getattr(interrupt, "__notes__", [])
            typer.echo("\n".join(["recoup: interrupted", *(f"recoup: {note}" for note in notes)]), err=True)
            raise typer.Exit(130) from None

    return run


def load_wings(modules: Sequence[str] | None) -> "list[Card]":
    """Import the modules that register wings of the user's own, from the folder the command is started in too.

    Returns:
        The cards that they registered.

    Raises:
        RecoupError: a module that is not there, fails, or registers nothing.
    """
    from recoup.wings import cards

    before = set(cards())
    for name in modules or []:
        known, fresh = set(cards()), name not in sys.modules
        with importable():
            try:
                importlib.import_module(name)
            except RecoupError:
                raise
            except Exception as error:  # a module of the user's may fail in any way
                raise RecoupError(f"--wing {name!r}: {type(error).__name__}: {error}") from error
        family = name.partition(".")[0]  # a package may register what a module of its own defines
        of_family = any(config.__module__.partition(".")[0] == family for config in known)
        registered = not fresh and family != "recoup" and of_family
        if set(cards()) == known and not registered:
            raise RecoupError(f"--wing {name!r}: registers no hardware; it is to call recoup.wings.register(Card(...))")
    return [card for config, card in cards().items() if config not in before]


def asked(context: typer.Context) -> list[str]:
    """The parameters that the command line itself gives."""
    source = context.get_parameter_source
    return [name for name in map(str, context.params) if getattr(source(name), "name", "") == "COMMANDLINE"]


def distinct(pairs: Iterable[tuple[str, T]], option: str) -> dict[str, T]:
    """An option's NAME=VALUE pairs as a map.

    Raises:
        RecoupError: a name that is given twice.
    """
    found: dict[str, T] = {}
    for name, value in pairs:
        if name in found:
            raise RecoupError(f"{option}: {name!r} is given twice")
        found[name] = value
    return found


def check_target(path: Path | None, option: str, made: Path | None = None) -> None:
    """An error, before anything is measured, where a file could not be written: its folder must be there, or ``made``
    by the command itself."""
    if path is not None and path.parent != made and (not path.parent.is_dir() or path.is_dir()):
        why = "is a folder" if path.is_dir() else f"there is no folder {str(path.parent)!r}"
        raise RecoupError(f"{option} {str(path)!r}: {why}")


def run_recipe(
    recipe: "Recipe",
    overwrite: bool,
    as_json: bool,
    awaited: Callable[[], object] | None = None,
    divided: Divided = Divided(),
) -> None:
    """Measure, write results, tables and report, and print them; of a shard that is not the last, say so.

    ``awaited`` is called when all is measured: what is made beside it for the same report is there when it returns.
    """
    from rich.console import Console

    from recoup.report import write_html, write_tables
    from recoup.report.terminal import tables
    from recoup.storage.files import keeping
    from recoup.study import run as run_study
    from recoup.study.measures import beside
    from recoup.tasks.shards import IncompleteError

    folder = Path(recipe.out)
    others = beside(folder)  # what of it cannot be read is told before anything is measured
    try:
        with importable(), divided.options() as options:
            results: Results = run_study(recipe, overwrite=overwrite, **options)
    except IncompleteError as left:
        if divided.shard is None:
            raise
        typer.echo(f"recoup: this shard's part is done; {left}", err=True)
        return
    if awaited is not None:
        awaited()
        others = beside(folder)
    with keeping(lambda: f"{folder / 'results.json'} is kept; `recoup report {folder}` writes tables and report anew"):
        paths = [folder / "results.json", *write_tables(results, folder), write_html(results, folder, *others)]
    if as_json:
        chapters = {study.name: study.model_dump(mode="json") for study in others}
        typer.echo(json.dumps({**results.to_dict(), **chapters}, indent=1))
        return
    console = Console()
    console.print(tables(results, *others))
    console.print("Written: " + ", ".join(str(path) for path in paths), soft_wrap=True, highlight=False)


@contextmanager
def importable() -> Iterator[None]:
    """Models beside the user may be named as module:factory, as with ``python -m``."""
    folder = os.getcwd()  # noqa: PTH109 -- a string for sys.path
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def integers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecoupError(f"{option} {text!r}: must be whole numbers separated by commas, such as 0,1,2") from None


def pair(text: str, option: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecoupError(f"{option} {text!r}: must be KEY=VALUE")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecoupError(f"{option} {text!r}: {value!r} is not a YAML value") from None
