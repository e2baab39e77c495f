"""Results as one HTML file that needs nothing else: no script, no font, no address outside itself."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from recoup.recalibrate import PAIRED
from recoup.report import words
from recoup.report.chapters import chapters_of
from recoup.report.figures import (
    accuracy_figure,
    pipeline_figure,
    shift_figure,
)
from recoup.report.pipeline import MEANING as PIPELINE_MEANING
from recoup.report.pipeline import chapter_lines, chapter_verdict, delays_text, spread
from recoup.report.summary import Summary, baselines, summarize
from recoup.storage.files import write_atomically
from recoup.study.pipeline import PipelineResults
from recoup.study.repairs import meaning
from recoup.study.results import Results

if TYPE_CHECKING:
    from jinja2 import Environment

FILE = "report.html"
PAGE, STYLE = (Path(__file__).with_name(name) for name in ("template.html.j2", "style.css"))


def write_html(results: Results, folder: Path, pipeline: PipelineResults | None = None) -> Path:
    """Write report.html, whole or not at all; with the chapter of a pipeline study, if there is one."""
    path = folder / FILE
    write_atomically(path, render(results, pipeline))
    return path


def render(results: Results, pipeline: PipelineResults | None = None) -> str:
    """The report's HTML. Every string of the user's is escaped."""
    summary = summarize(results)
    chapters = chapters_of(results)
    template = _environment().get_template(str(PAGE))
    names = [repr(config) for config in results.recipe.configs]
    return template.render(
        css=STYLE.read_text("utf-8"),
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
        chapters=[
            (str(chapter.template), shown)
            for chapter in chapters
            if chapter.template is not None and (shown := chapter.context(results))
        ],
        pipeline=None if pipeline is None else _pipeline(pipeline),
        accuracy_figure=accuracy_figure(results, summary),
        shift_figure=shift_figure(results),
        terms=words.terms(results, chapters),
        modelled=words.modelled(results, chapters),
        not_modelled=words.not_modelled(chapters),
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


def _environment() -> "Environment":
    """Templates are named by their paths: a chapter's lies beside its module, wherever that is."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def source(name: str) -> tuple[str, str, None]:
        return Path(name).read_text("utf-8"), name, None

    environment = Environment(autoescape=True, undefined=StrictUndefined, loader=FunctionLoader(source))
    environment.filters["signed"] = lambda value: f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
    environment.filters["share"] = lambda value: f"{value:.0%}".replace("%", " %").replace("-", "\N{MINUS SIGN}")
    return environment
