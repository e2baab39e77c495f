"""The command line's reference as a Markdown page, from the commands themselves.

python scripts/command_line.py
"""

import re
from typing import Any

import typer

from recoup.cli.main import COMMANDS, app


def page() -> str:
    """Every command with its arguments and options."""
    group: Any = typer.main.get_command(app)
    context = typer.Context(group, info_name="recoup")
    parts = ["# Command line\n", f"{group.help}\n", options(group, context), "\n"]
    for name in COMMANDS:
        command = group.resolve_command(context, [name])[1]
        parts.append(section(name, command, typer.Context(command, info_name=name, parent=context)))
    return "\n".join(parts)


def section(name: str, command: Any, context: typer.Context) -> str:
    """One command."""
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    usage = " ".join(["recoup", name, *(one.name.upper() for one in arguments), "[OPTIONS]"])
    parts = [f"## recoup {name}\n", f"{command.help}\n", f"```text\n{usage}\n```\n"]
    for one in arguments:
        parts.append(f"- `{one.name.upper()}`: {cell(one.help or '')}")
    return "\n".join([*parts, "", options(command, context), ""])


def options(command: Any, context: typer.Context) -> str:
    """The options of a command as a table."""
    rows = [row(one, context) for one in command.get_params(context) if one.param_type_name == "option"]
    return "\n".join(["| option | | default |", "|---|---|---|", *rows])


def row(option: Any, context: typer.Context) -> str:
    """An option: its spellings, what it is, and what holds where it is not given."""
    told = option.get_help_record(context) or (" / ".join(option.opts), "")
    text, default = told[1], ""
    if found := re.search(r"\s*\[((?:default: |required)[^\]]*)\]$", text):
        text, default = text[: found.start()], found[1].removeprefix("default: ").strip("()")
    return f"| `{told[0]}` | {cell(text)} | {cell(default)} |"


def cell(text: str) -> str:
    """Text in a table's cell."""
    return re.sub(r"([|*_<])", r"\\\1", " ".join(text.split()))


if __name__ == "__main__":
    print(page())
