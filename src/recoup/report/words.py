"""What every report explains, and what its chapters add: terms, and where the model ends."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from recoup.network.wing import Card
from recoup.report.chapters import Chapter, Limit, Part, chapter_of
from recoup.report.summary import compared_titles
from recoup.study.results import Results

INTERVALS = {
    "t": "Student's t over the seeds and Wilson's score over the test images: how much the choice of either matters",
    "wilson": "Wilson's score over the test images: how much the choice of test images matters",
}
INTERVALS_OF_WINDOWS = {
    "t": "Student's t over the seeds and a normal interval over the test windows: how much either choice matters",
    "normal": "Normal interval over the test windows: how much the choice of test windows matters",
}

GAIN = "Points of accuracy over the same hardware's float statistics, seed by seed."
GAIN_WITHOUT_NORMS = "Points of accuracy over the same hardware without repair, seed by seed."

NORMALISING = tuple(f"torch.nn.modules.{name}" for name in ("batchnorm", "instancenorm", "normalization"))
ACTIVATING = ("torch.nn.modules.activation",)

LIMITS = {
    "outside": Limit("Layers outside the emulation", "their accuracy is that of float"),
    "functions": Limit("Activation functions, residual additions and normalisation", "float, as torch computes them"),
    "memory": Limit("Memory"),
    "area": Limit("Area, energy and clock frequency"),
}


GAIN_OF_NATS = "Nats a token less than on the same hardware without repair, seed by seed and window by window."
LANGUAGE = {
    "nats": "Mean cross-entropy of the following token, natural logarithm: what the network did not foresee. Less is "
    "better.",
    "perplexity": "The exponential of the nats: among how many equally likely tokens it chooses. Less is better.",
}


def won_back(baselines: str) -> str:
    """The term, with the baselines that the losses of a report are taken against."""
    return (
        f"Gain over loss, where the loss is what the hardware costs against its baseline ({baselines}); shown for "
        "losses of more than 0.1 points and more than one test image, beyond what the test images leave open."
    )


def terms(results: Results, parts: Sequence[Part]) -> Mapping[str, str]:
    """The chapters' terms and every report's; a chapter's wording goes before."""
    found = {term: meaning for chapter, about in parts for term, meaning in chapter.terms(about).items()}
    common = {"gain": GAIN, "won back": won_back(", ".join(compared_titles(results)))}
    found |= {term: meaning for term, meaning in common.items() if term not in found}
    if results.quality.paired:
        return _of_language(found, results)
    return (
        found if results.norms else {term: GAIN_WITHOUT_NORMS if text == GAIN else text for term, text in found.items()}
    )


def _of_language(found: Mapping[str, str], results: Results) -> Mapping[str, str]:
    """Terms in the words of windows and nats."""
    images = "more than 0.1 points and more than one test image, beyond what the test images leave open"
    nats = f"more than {results.quality.worth:g} nats, beyond what the test windows leave open"
    told = {term: GAIN_OF_NATS if text == GAIN else text.replace(images, nats) for term, text in found.items()}
    return LANGUAGE | {term: results.quality.worded(text) for term, text in told.items()}


def modelled(results: Results, parts: Sequence[Part]) -> list[str]:
    """What the chapters emulate, then what they count; of a wing that says neither, where to look."""
    run = [text for chapter, _ in parts for text in chapter.modelled]
    counted = [text for chapter, _ in parts for text in chapter.costs]
    silent = [card for card in results.wings if not (chapter_of(card).modelled or chapter_of(card).costs)]
    looked_up = [f"The layers of {card.config.__name__}: what their own forward pass computes." for card in silent]
    return [results.quality.worded(text) for text in (*run, *counted, *looked_up)]


def not_modelled(chapters: Iterable[Chapter], present: Iterable[Card] = ()) -> list[str]:
    """Where the model ends, in the most precise words that are there; ``present`` are the wings that may emulate some.

    >>> not_modelled([Chapter(limits={"memory": Limit(clause="operands arrive in time")})])[2]
    'Memory: operands arrive in time.'
    """
    said = LIMITS | {"functions": _functions(list(present))}
    for chapter in chapters:
        for key, limit in chapter.limits.items():
            before = said.get(key, Limit())
            said[key] = Limit(limit.subject or before.subject, limit.clause or before.clause)
    return [f"{limit.subject}: {limit.clause}." if limit.clause else f"{limit.subject}." for limit in said.values()]


def _functions(present: Sequence[Card]) -> Limit:
    """What lies between the products, as far as no wing present stands in for it."""
    plain = [kind for card in present for kind in card.layers]
    norms = any(base.__module__ in NORMALISING for kind in plain for base in kind.__mro__)
    activations = any(
        base.__module__ in ACTIVATING and not issubclass(kind, nn.MultiheadAttention)
        for kind in plain
        for base in kind.__mro__
    )
    usual = LIMITS["functions"]
    if not (norms or activations):
        return usual
    first = f"Activation functions{' that are not emulated' if activations else ''}"
    return Limit(
        f"{first}, residual additions, and normalisation{' that is not emulated' if norms else ''}", usual.clause
    )
