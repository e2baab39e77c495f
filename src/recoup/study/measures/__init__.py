"""What a wing measures beside accuracy: a file a kind, named on the wing's card.

Such a module has ``ROWS``, the tables of `recoup.study.Results` that it fills (field -> class of its rows), and
``measure(lab, config, seed)``, which gives the rows of one config as plain values, without their ``config``.
"""

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from recoup.errors import RecoupError
from recoup.network.wing import Card
from recoup.study.rows import Row
from recoup.wings import cards

if TYPE_CHECKING:
    from recoup.study.lab import Lab


BESIDE = {
    "pipeline.json": "recoup.study.measures.pipeline",
    "search.json": "recoup.search.results",
    "silicon.json": "recoup.study.measures.silicon",
}
"""Studies with results of their own, by the file that they leave, which is looked for before a module is imported: each
has ``RESULTS``, whose ``load(folder)`` finds them or gives None, ``name``, what they are called in JSON, and
``chapter``, the module of their part of a report."""


def beside(folder: Path) -> list[Any]:
    """The results of other kinds that a folder holds beside those of a recipe.

    Raises:
        RecoupError: a file of theirs that is cut off, foreign or of another schema.
    """
    there = [module for file, module in BESIDE.items() if (folder / file).exists()]
    found = [importlib.import_module(module).RESULTS.load(folder) for module in there]
    return [results for results in found if results is not None]


class Measure(Protocol):
    """The module of a kind of measurement."""

    ROWS: Mapping[str, type[Row]]

    def measure(self, lab: "Lab", config: Any, seed: int) -> dict[str, list[dict[str, Any]]]:
        """The rows of a config by table."""
        ...


def measure_of(card: Card) -> Measure | None:
    """What a wing measures; None where accuracy is all.

    Raises:
        RecoupError: a card whose measure is no module, or one without ``ROWS`` and ``measure``.
    """
    if card.measure is None:
        return None
    try:
        module: Any = importlib.import_module(card.measure)
    except (ImportError, ValueError, AttributeError) as error:  # of no name, or one that is none
        raise RecoupError(f"measure {card.measure!r}: the module cannot be imported ({error})") from error
    if not isinstance(getattr(module, "ROWS", None), Mapping) or not callable(getattr(module, "measure", None)):
        raise RecoupError(f"measure {card.measure!r}: the module must have ROWS, a map, and measure, a function")
    return module


def tables(present: Iterable[Card] | None = None) -> dict[str, type[Row]]:
    """The tables of some wings, by default of all registered ones: field of results -> class of its rows."""
    chosen = cards().values() if present is None else present
    found = [measure for card in chosen if (measure := measure_of(card)) is not None]
    return {field: row for measure in found for field, row in measure.ROWS.items()}
