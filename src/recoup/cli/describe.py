"""`recoup describe`: what was done to the network in a file."""

import json
from typing import Annotated, Any

import typer

from recoup.cli.chip import Chip
from recoup.cli.common import Json, Wing, load_wings
from recoup.errors import RecoupError
from recoup.repair import Line
from recoup.saving import read


def describe(
    file: Annotated[str | None, typer.Argument(help="A file that recoup.save wrote.", show_default=False)] = None,
    chip: Chip = None,
    wing: Wing = None,
    as_json: Json = False,
) -> None:
    """Hardware and repairs of a saved network, layer by layer, and what it was saved with."""
    load_wings(wing)
    named = [name for name in (file, chip) if name is not None]
    if len(named) != 1:
        raise RecoupError("recoup describe: name one file: recoup describe FILE, or --chip FILE")
    header, tensors = read(named[0])
    names = dict.fromkeys([*header["layers"], *header["ledger"]])
    notes = header.get("notes", {})  # files written before it was kept have none
    layers = {
        name: {
            "hardware": header["layers"].get(name, ""),
            "note": notes.get(name, ""),
            "repairs": _repairs(header, name),
        }
        for name in names
    }
    if as_json:
        versions = {name: header.get(name) for name in ("recoup", "torch")}
        typer.echo(json.dumps({"layers": layers, **versions, "tensors": len(tensors)}, indent=1))
        return
    for name, found in layers.items():
        typer.echo(Line(name, found["hardware"], found["repairs"], found["note"]))
    typer.echo(f"saved by recoup {header.get('recoup')}, torch {header.get('torch')}; {len(tensors)} tensors")


def _repairs(header: dict[str, Any], name: str) -> tuple[str, ...]:
    entries = sorted(header["ledger"].get(name, []), key=lambda entry: entry["number"])
    images = [f", {entry['images']} images" if entry["images"] is not None else "" for entry in entries]
    return tuple(f"{entry['slot']} ({entry['verb']}{said})" for entry, said in zip(entries, images, strict=True))
