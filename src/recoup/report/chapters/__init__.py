"""What one kind of results adds to a report: a file a kind, whose module a wing's card names.

Such a module has a ``CHAPTER``; every field of it has a default, so a chapter says only what it has to say. A wing
without one is reported by its accuracy. Studies with results of their own name their chapter as cards do.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from recoup.errors import RecoupError
from recoup.network.wing import Card
from recoup.study.hardware import Quoted
from recoup.study.results import Results

MOST_LAYERS = 24  # beyond it a terminal table shows the worst half of that; the page and the CSV files have them all


@dataclass(frozen=True, slots=True)
class Table:
    """A terminal table of plain text; a row may have fewer cells than there are columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str | None = None


@dataclass(frozen=True, slots=True)
class Limit:
    """What the model leaves out, and what becomes of it; what is empty is said as others say it.

    Under one key a chapter words more precisely what reports say in general (`recoup.report.words.LIMITS`); one may
    name the thing and another what becomes of it.
    """

    subject: str = ""
    clause: str = ""


def _nothing(_: Any) -> None:
    return None


def _none(_: Any) -> Sequence[Any]:
    return ()


def _no_saving(_results: Any, _config: Any) -> str:
    return ""


def _no_terms(_: Any) -> Mapping[str, str]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chapter:
    """A kind's part of a report; each function is called with the results it is about, ``saving`` with a config too.

    Attributes:
        template: a Jinja fragment for the page, which finds its values in ``chapter``.
        context: those values; None where these results have nothing to show.
        layers: terminal tables layer by layer.
        totals: terminal tables of the whole network, which follow those of all chapters' layers.
        saving: what a config saves, as a piece of its verdict: ``" in 1.8x fewer cycles"``; "" where that is unknown.
        verdicts: sentences beside those of the configs, from a study with results of its own.
        terms: words that the tables use -> what they mean. ``gain`` and ``won back`` are every report's; a chapter that
            lists them chooses their place.
        modelled: what the emulation does exactly, a sentence each.
        costs: what is counted, not run: the sentences after those of all chapters.
        limits: what is left out, by its key in `recoup.report.words.LIMITS` or one of its own.
    """

    template: Path | None = None
    context: Callable[[Any], Mapping[str, Any] | None] = _nothing
    layers: Callable[[Any], Sequence[Table]] = _none
    totals: Callable[[Any], Sequence[Table]] = _none
    saving: Callable[[Any, Any], str] = _no_saving
    verdicts: Callable[[Any], Sequence[str]] = _none
    terms: Callable[[Any], Mapping[str, str]] = _no_terms
    modelled: tuple[str, ...] = ()
    costs: tuple[str, ...] = ()
    limits: Mapping[str, Limit] = field(default_factory=dict)


Part = tuple[Chapter, Any]
"""A chapter and the results that it is about."""


class Study(Protocol):
    """Results of their own, such as those of a training, which a report shows beside those of a recipe."""

    chapter: ClassVar[str]


def parts_of(results: Results) -> list[Part]:
    """The chapters of the wings present, in the order in which those were registered."""
    return [(chapter_of(card), results) for card in results.wings]


def parts_beside(
    studies: Iterable[Study | None], results: Results | None = None, quoted: Quoted | None = None
) -> list[Part]:
    """The chapters of studies with results of their own; None is a study that was not made.

    A study that says something of the configs of a recipe has ``joined``, and is shown as that makes it of ``results``
    and of what their report quotes.
    """
    there = [study for study in studies if study is not None]
    return [
        (chapter_at(study.chapter), joined(results, quoted) if (joined := getattr(study, "joined", None)) else study)
        for study in there
    ]


def chapter_of(card: Card) -> Chapter:
    """A wing's chapter; empty where its card names none."""
    return Chapter() if card.chapter is None else chapter_at(card.chapter)


def chapter_at(path: str) -> Chapter:
    """The chapter of a module.

    Raises:
        RecoupError: no such module, or one without a ``CHAPTER``.
    """
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise RecoupError(f"chapter {path!r}: the module cannot be imported ({error})") from error
    chapter = getattr(module, "CHAPTER", None)
    if not isinstance(chapter, Chapter):
        raise RecoupError(f"chapter {path!r}: CHAPTER is {chapter!r}; must be a recoup.report.chapters.Chapter")
    return chapter


def measured(results: Results, table: str) -> list[tuple[str, list[Any]]]:
    """The configs that have rows in a table: their titles and rows, in the recipe's order."""
    found = [(one.title, results.rows(table, one.name)) for one in results.present]
    return [(name, rows) for name, rows in found if rows]


def layer_tables(
    results: Results, table: str, columns: tuple[str, ...], cells: Callable[[Any], tuple[str, ...]]
) -> list[Table]:
    """A terminal table a config: its layers without repair, of many those with the largest error."""
    made = []
    for name, rows in measured(results, table):
        caption, shown = None, rows
        if len(rows) > MOST_LAYERS:
            worst = sorted(rows, key=lambda row: row.error, reverse=True)[: MOST_LAYERS // 2]
            caption = f"the {len(worst)} of {len(rows)} layers with the largest error; all are in {table}.csv"
            shown = [row for row in rows if row in worst]
        made.append(Table(f"Layers without repair: {name}", columns, tuple(cells(row) for row in shown), caption))
    return made
