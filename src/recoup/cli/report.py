"""`recoup report`: report and tables of a finished study."""

from pathlib import Path
from typing import Annotated

import typer

from recoup.cli.common import Wing, load_wings
from recoup.report import write_html, write_tables
from recoup.study import Results
from recoup.study.measures import beside


def report(folder: Annotated[Path, typer.Argument(help="A folder with results.json.")], wing: Wing = None) -> None:
    """Write report.html and the CSV tables anew from a folder's results.json."""
    load_wings(wing)
    results = Results.load(folder)
    place = folder if folder.is_dir() else folder.parent
    for path in [*write_tables(results, place), write_html(results, place, *beside(place))]:
        typer.echo(path)
