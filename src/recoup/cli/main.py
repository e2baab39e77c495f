"""The command line's entry: which commands there are. A command's module is imported when it is called."""

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from recoup.cli.common import DEBUG, reported
from recoup.kernels import process
from recoup.version import __version__

COMMANDS = {
    "evaluate": "The main job: float accuracy, and the hardware's before and after repair.",
    "run": "Measure what a recipe asks for; interrupted, the same command goes on where it stopped.",
    "search": "The cheapest hardware, layer by layer, within an accuracy budget; the whole front, measured.",
    "train": "Train with emulated hardware, with late gradients, or in float.",
    "describe": "What a file of recoup.save holds: hardware and repairs, layer by layer.",
    "silicon": "Hardware from configs: Verilog, proof, area, delay, energy.",
    "report": "Write report.html and the CSV tables anew from a folder's results.json.",
    "demo": "The whole story on scikit-learn's handwritten digits; needs no download.",
    "doctor": "Versions, the processor, and which path the emulation takes.",
}
"""Name of a command, of its function and of its module in `recoup.cli` -> what the list of commands says."""


class Commands(TyperGroup):
    """Lists the commands without importing them: their libraries take seconds."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """For the list of commands: the name and what it does."""
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """For a call: the command itself."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else _loaded(name), rest


app = typer.Typer(
    name="recoup",
    cls=Commands,
    help="What cost-cutting neural-network hardware does to your network's accuracy, and how to win it back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


def _loaded(name: str) -> Any:
    """A command with its options, from its module, which may load torch."""
    process.begin()
    try:
        module = importlib.import_module(f"recoup.cli.{name}")
    except KeyboardInterrupt:  # in the seconds that torch takes; `reported` is not there yet
        typer.echo("recoup: interrupted", err=True)
        raise typer.Exit(130) from None
    # Plain help: rich's columns cut words and its markup swallows brackets at 80 columns.
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    single.command(name)(reported(getattr(module, name)))
    return typer.main.get_command(single)
