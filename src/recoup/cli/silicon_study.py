"""`recoup silicon area|energy --study FOLDER`: what a study's hardware costs, kept beside it, and its report."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from recoup.cli.silicon_options import chosen_of
from recoup.errors import RecoupError

ACTIONS = ("area", "energy")


def of_study(
    action: str,
    folder: Path,
    values: Mapping[str, Any],
    liberty: Sequence[Path] | None,
    *,
    baselines: bool,
    glitches: bool,
    parts: bool,
) -> None:
    """Areas or energies of a study's configs into its folder, and its report anew; what has none is named with the
    reason.

    Raises:
        RecoupError: no such study, options that no generator has, energy without a library, or nothing that has one.
    """
    from recoup.report import write_html
    from recoup.report.summary import quoted_of, summarize
    from recoup.study import Results
    from recoup.study.measures import beside

    if action == "energy" and not liberty:
        raise RecoupError("silicon energy: --liberty FILE is needed: plain gates have no energy")
    results = Results.load(folder)
    measured, detail = (_areas, parts) if action == "area" else (_energies, glitches)
    found = measured(folder, results, values, liberty, baselines, detail)
    typer.echo(found.save(folder))
    typer.echo(write_html(results, folder, *beside(folder)))
    joined = found.joined(results, quoted_of(summarize(results)))
    rows, left = (joined.rows, joined.left) if action == "area" else (joined.spent, joined.unspent)
    for name, reason in left.items():
        typer.echo(f"no {action}: {name}: {reason}", err=True)
    if not rows:
        raise RecoupError(f"silicon {action}: no hardware of {folder} has one")


def _areas(folder: Path, results: Any, values: Any, liberty: Any, baselines: bool, parts: bool) -> Any:
    """Areas; the energies that are there stay."""
    from recoup.study.measures.silicon import areas

    found = areas(results, _builder(results, values), liberty, baselines, _told, parts)
    before = _there(folder)
    return found.model_copy(update={"energies": before.energies if before else None})


def _energies(folder: Path, results: Any, values: Any, liberty: Any, baselines: bool, glitches: bool) -> Any:
    """Energies; the areas that are there stay."""
    from recoup.report.summary import quoted_of, summarize
    from recoup.study.machine import cpu_threads
    from recoup.study.measures.silicon import SiliconResults
    from recoup.study.measures.silicon_energy import energies

    SiliconResults.load(folder)  # a damaged one is refused before anything is measured
    with cpu_threads(results.recipe.cpu_threads):
        found = energies(
            results, _builder(results, values), quoted_of(summarize(results)), liberty,
            baselines=baselines, glitches=glitches, told=_told,
        )  # fmt: skip
    before = _there(folder) or SiliconResults(rows=(), left={}, tool="")
    return before.model_copy(update={"energies": found})


def _there(folder: Path) -> Any:
    """What the folder holds when it is written, which another command may have changed; a damaged file is replaced."""
    from recoup.study.measures.silicon import SiliconResults

    try:
        return SiliconResults.load(folder)
    except RecoupError as error:
        typer.echo(f"recoup: {error}; what it held is replaced", err=True)
        return None


def _told(text: str) -> None:
    typer.echo(f"{text} ...", err=True)


def _builder(results: Any, values: Mapping[str, Any]) -> Any:
    """The hardware of a config, with those of the options that its generator has."""
    from recoup.silicon import build
    from recoup.silicon.generate import options_of
    from recoup.study.measures.silicon import units

    legal: dict[str, Mapping[str, Any]] = {}
    for name, unit in units(results).items():
        with suppress(RecoupError):  # of no hardware: it is listed with the reason
            legal[name] = options_of(unit)
    chosen = dict(zip(legal, chosen_of(values, list(legal), list(legal.values())), strict=True))
    return lambda config: build(config, **chosen.get(repr(config), {}))
