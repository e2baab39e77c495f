"""`recoup report`: report and tables of a finished study."""

from pathlib import Path
from typing import Annotated

import typer

from recoup.cli.common import Wing, load_wings
from recoup.report import write_html, write_tables
from recoup.report.alone import write_alone
from recoup.study import Results
from recoup.study.measures import beside
from recoup.study.results import FILE as RESULTS


def report(folder: Annotated[Path, typer.Argument(help="A folder with results.json.")], wing: Wing = None) -> None:
    """Write report.html and the CSV tables anew from a folder's results.json; of a search, from its search.json."""
    load_wings(wing)
    place = folder if folder.is_dir() else folder.parent
    others = beside(place)
    if others and folder.is_dir() and not (folder / RESULTS).exists():
        typer.echo(
            write_alone(place, " and ".join(study.name for study in others), "without a recipe's results", others)
        )
        return
    results = Results.load(folder)
    for path in [*write_tables(results, place), write_html(results, place, *others)]:
        typer.echo(path)
