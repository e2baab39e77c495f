"""Results as one HTML file that needs nothing else: no script, no font, no address outside itself."""

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from recoup.nbsmt import NBSMT
from recoup.recalibrate import PAIRED
from recoup.report import words
from recoup.report.figures import (
    accuracy_figure,
    layer_figure,
    pipeline_figure,
    shift_figure,
    traffic_figure,
    unit_figure,
)
from recoup.report.pipeline import MEANING as PIPELINE_MEANING
from recoup.report.pipeline import chapter_lines, chapter_verdict, delays_text, spread
from recoup.report.summary import Cycles, Summary, baselines, summarize
from recoup.storage.files import write_atomically
from recoup.study.configs import title
from recoup.study.pipeline import PipelineResults
from recoup.study.repairs import meaning
from recoup.study.results import Results

FILE = "report.html"


def write_html(results: Results, folder: Path, pipeline: PipelineResults | None = None) -> Path:
    """Write report.html, whole or not at all; with the chapter of a pipeline study, if there is one."""
    path = folder / FILE
    write_atomically(path, render(results, pipeline))
    return path


def render(results: Results, pipeline: PipelineResults | None = None) -> str:
    """The report's HTML. Every string of the user's is escaped."""
    from jinja2 import Environment, StrictUndefined

    summary = summarize(results)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    environment.filters["signed"] = lambda value: f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
    environment.filters["share"] = lambda value: f"{value:.0%}".replace("%", " %").replace("-", "\N{MINUS SIGN}")
    template = environment.from_string(_resource("template.html.j2"))
    names = [repr(config) for config in results.recipe.configs]
    return template.render(
        css=_resource("style.css"),
        results=results,
        summary=summary,
        heading=heading(results),
        configs=[*(baseline.name for baseline in baselines(results)), *names],
        ours=PAIRED.name,
        interval_text=interval_text(results, summary),
        kinds=words.INTERVALS,
        states={
            state: meaning(state, results.recipe.configs)
            for state in results.recipe.states
            if any(row.state == state for row in results.accuracy)
        },
        cycle_rows=_cycle_rows(summary),
        layer_tables=[
            (title(config), [row for row in results.rows("layers") if row.config == repr(config)])
            for config in results.recipe.configs
            if isinstance(config, NBSMT)
        ],
        unit_tables=[
            (title(config), rows)
            for config in results.recipe.configs
            if (rows := [row for row in results.rows("units") if row.config == repr(config)])
        ],
        unit_figure=unit_figure(results),
        pipeline=None if pipeline is None else _pipeline(pipeline),
        traffic_tables=[
            (
                title(config),
                summary.traffic[repr(config)],
                [row for row in results.rows("traffic") if row.config == repr(config)],
            )
            for config in results.recipe.configs
            if repr(config) in summary.traffic
        ],
        traffic_figure=traffic_figure(results),
        profile_images=min(results.recipe.profile_images, results.calibration_images),
        accuracy_figure=accuracy_figure(results, summary),
        layer_figure=layer_figure(results),
        shift_figure=shift_figure(results),
        terms=words.TERMS
        | (words.UNIT_TERMS if results.rows("units") else {})
        | (words.TRAFFIC_TERMS if results.rows("traffic") else {}),
        modelled=words.MODELLED,
        not_modelled=words.NOT_MODELLED,
        facts=facts(results),
        recipe=results.recipe.to_yaml(),
    )


def heading(results: Results) -> str:
    """Model on data, as the recipe names them."""
    return f"{results.recipe.model.rpartition(':')[2]} on {results.data_name}"


def interval_text(results: Results, summary: Summary) -> str:
    """What the intervals of the table are intervals of."""
    wilson = f"the {results.test_images:,} test images themselves resolve about ±{summary.resolution:.2f} points"
    if summary.seeds > 1:
        return (
            f"t: Student's interval over {summary.seeds} draws of calibration images. W: Wilson's interval of a single "
            f"measurement; {wilson}."
        )
    return (
        f"W: Wilson's interval of the single measurement; {wilson}. Every state is measured on the same images, so "
        "differences between states are more certain than that."
    )


def facts(results: Results) -> dict[str, Any]:
    """What else decides or explains the numbers."""
    machine, weights = results.machine, results.recipe.weights
    same = "Every path gives the same bits."
    return {
        "Weights": f"{weights} (sha256 {results.weights_sha256})" if weights else "none given; the factory's own",
        "Started in": "the folder that the recipe's relative paths start from",
        **({"Path taken": f"{machine.backend} ({machine.isa}): {machine.reason}. {same}"} if machine.backend else {}),
        "Machine": f"{machine.cpu}, {machine.cores} cores, {machine.torch_threads} threads; {machine.device}",
        "System": machine.system,
        "Software": f"recoup {machine.recoup}, torch {machine.torch}, Python {machine.python}",
        "Measuring took": f"{results.seconds:,.0f} s",
        "Date": results.date,
    }


def _pipeline(chapter: PipelineResults) -> dict[str, Any]:
    lines = chapter_lines(chapter)
    return {
        "batch": chapter.setting.batch,
        "verdict": chapter_verdict(chapter),
        "setting": delays_text(chapter),
        "lines": [
            (line, spread(line.accuracy, line.accuracy_std, 2), spread(line.loss, line.loss_std, 3)) for line in lines
        ],
        "seeds": max(line.seeds for line in lines),
        "meaning": {line.label: PIPELINE_MEANING[line.label] for line in lines if line.label in PIPELINE_MEANING},
        "figure": pipeline_figure(chapter, lines),
    }


def _cycle_rows(summary: Summary) -> list[Cycles]:
    rows = list(summary.cycles.values())
    if not rows:
        return []
    single, emulated = rows[0].single, rows[0].emulated_single
    return [Cycles("1 thread (8 bit)", single, single, emulated, emulated, 0), *rows]


@cache
def _resource(name: str) -> str:
    return files("recoup.report").joinpath(name).read_text("utf-8")
