"""Results as one HTML file that needs nothing else: no script, no font, no address outside itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recoup.recalibrate import PAIRED
from recoup.report import ranking, words
from recoup.report.chapters import Part, Study, parts_beside, parts_of
from recoup.report.figures import accuracy_figure, shift_figure
from recoup.report.lines import Line
from recoup.report.summary import Summary, quoted_of, summarize
from recoup.storage.files import write_atomically
from recoup.study.quality import MINUS, TOP1, perplexity_text
from recoup.study.repairs import meaning
from recoup.study.results import Results

if TYPE_CHECKING:
    from jinja2 import Environment

FILE = "report.html"
PAGE, STYLE = (Path(__file__).with_name(name) for name in ("template.html.j2", "style.css"))


def write_html(results: Results, folder: Path, *beside: Study | None) -> Path:
    """Write report.html, whole or not at all; with the chapters of studies beside it, of those that are not None."""
    path = folder / FILE
    write_atomically(path, render(results, *beside))
    return path


def render(results: Results, *beside: Study | None) -> str:
    """The report's HTML, with the chapters of the wings present and of studies beside it.

    Every string of the user's is escaped.

    Raises:
        RecoupError: a chapter that is none.
    """
    summary, wings = summarize(results), parts_of(results)
    studies = parts_beside(beside, results, quoted_of(summary))
    parts = [*wings, *studies]
    template = _environment().get_template(str(PAGE))
    return template.render(
        css=STYLE.read_text("utf-8"),
        results=results,
        summary=summary,
        quality=summary.quality,
        second=second_of(summary),
        heading=heading(results),
        verdicts=verdicts_of(summary, studies),
        ours=PAIRED.name,
        interval_text=interval_text(results, summary),
        kinds=words.INTERVALS_OF_WINDOWS if summary.quality.paired else words.INTERVALS,
        states=states_of(results),
        chapters=_sections(wings),
        beside=_sections(studies),
        ranking=ranking.context(results, summary),
        accuracy_figure=accuracy_figure(results, summary),
        shift_figure=shift_figure(results),
        terms=words.terms(results, parts),
        modelled=words.modelled(results, parts),
        not_modelled=[
            summary.quality.worded(text)
            for text in words.not_modelled((chapter for chapter, _ in parts), results.wings)
        ],
        facts=facts(results),
        recipe=results.recipe.to_yaml(),
    )


def verdicts_of(summary: Summary, studies: list[Part]) -> list[str]:
    """Why the accuracies may say nothing, a sentence a config, then those of other studies."""
    return [
        *summary.doubts,
        *summary.verdicts,
        *(text for chapter, study in studies for text in chapter.verdicts(study)),
    ]


def states_of(results: Results) -> dict[str, str]:
    """The states that were measured, and what they mean."""
    found = {row.state for row in results.measured}
    configs = [config for one in results.present for config in one.configs]
    told = {state: meaning(state, configs, results.norms) for state in results.recipe.states if state in found}
    return {state: results.quality.worded(text) for state, text in told.items()}


def second_of(summary: Summary) -> dict[Line, str]:
    """The number beside each line's: top-5 accuracy, or the perplexity."""
    text = perplexity_text if summary.quality.paired else summary.quality.number
    return {line: text(line.second) for line in summary.lines}


def _sections(parts: list[Part]) -> list[tuple[str, Mapping[str, Any]]]:
    """Fragments of the page and their values, of the chapters that have something to show."""
    return [
        (str(chapter.template), values)
        for chapter, about in parts
        if chapter.template is not None and (values := chapter.context(about)) is not None
    ]


def heading(results: Results) -> str:
    """Model on data, as the recipe names them."""
    return f"{results.recipe.model.rpartition(':')[2]} on {results.data_name}"


def interval_text(results: Results, summary: Summary) -> str:
    """What the intervals of the table are intervals of."""
    kinds = {line.reached.kind for line in summary.lines}
    if summary.quality.paired:
        return _window_text(kinds, summary)
    return f"{_image_text(kinds, results, summary)} {_paired_text(summary)}"


def _image_text(kinds: set[str], results: Results, summary: Summary) -> str:
    """Over test images."""
    own = f"the {results.test_images:,} test images themselves resolve about ±{summary.resolution:.2f} points"
    seeds = (
        f"t: Student's interval over {summary.seeds} draws of calibration images combined with Wilson's over the test "
        "images"
    )
    if kinds == {"t"}:
        return f"{seeds}; {own}."
    if "t" in kinds:
        return f"{seeds}. W: Wilson's interval of a single measurement; {own}."
    return f"W: Wilson's interval of the single measurement; {own}."


def _paired_text(summary: Summary) -> str:
    """What the intervals of differences are."""
    apart = sum(not line.paired for line in summary.lines)
    if not apart:
        return (
            "Every state is measured on the same images: gains and losses are taken image by image and have intervals "
            "of their own."
        )
    return (
        f"Answers of {apart} of {len(summary.lines)} lines were not kept image by image, by an older recoup, or are "
        "not to the same images: their gains and losses have the widest interval that the accuracies allow."
    )


def _window_text(kinds: set[str], summary: Summary) -> str:
    """The same over windows of a text."""
    seeds = (
        f"t: Student's interval over {summary.seeds} draws of calibration windows combined with that over the test "
        "windows"
    )
    single = f"N: normal interval of the single measurement over the {summary.samples:,} test windows"
    told = [text for kind, text in (("t", seeds), ("normal", single)) if kind in kinds]
    return (
        f"Less is better. {'. '.join(told)}. Every state is measured on the same windows: gains and losses are taken "
        "window by window and are more certain than that."
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


def _environment() -> "Environment":
    """Templates are named by their paths: a chapter's lies beside its module, wherever that is."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def source(name: str) -> tuple[str, str, None]:
        return Path(name).read_text("utf-8"), name, None

    environment = Environment(autoescape=True, undefined=StrictUndefined, loader=FunctionLoader(source))
    environment.globals["quality"] = TOP1  # of a page without a recipe's results
    environment.filters["minus"] = lambda text: text.replace("-", MINUS)
    environment.filters["share"] = lambda value: f"{value:.0%}".replace("%", " %").replace("-", MINUS)
    return environment
