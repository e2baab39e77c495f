"""Where a study's network and samples come from, and what is measured on them: images, or windows of a text."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from recoup.data import load as load_data
from recoup.data.loading import rest as rest_of_data
from recoup.data.places import TooFewError
from recoup.data.text import SPLITS, Windows, windows
from recoup.errors import RecoupError
from recoup.evaluation import evaluate, observe
from recoup.models import load as load_model
from recoup.models.language import Vocabulary, load_language, vocabulary_of
from recoup.network.batches import call, device_of
from recoup.network.meters import Nats
from recoup.storage.digest import of_batches
from recoup.study.intervals import half_width
from recoup.study.quality import NATS, TOP1, Quality, perplexity
from recoup.study.rows import TextRow

TEXT = "text"
LOOKS_AHEAD = 1e-5  # of the largest output: more than the same kernels differ by in two calls


class Samples(Protocol):
    """A data set: `recoup.data.Dataset`, or `recoup.data.text.Windows`."""

    @property
    def name(self) -> str:
        """As in the results."""
        ...

    @property
    def split(self) -> str:
        """The part."""
        ...

    @property
    def augmentation(self) -> Any:
        """What ``batches(augment=True)`` does; None where nothing keeps the label."""
        ...

    def __len__(self) -> int: ...

    def take(self, positions: Tensor) -> "Samples":
        """Those."""
        ...

    def subset(self, n: int, seed: int = 0) -> "Samples":
        """As many at random."""
        ...

    def batches(self, size: int, *, augment: bool = False, seed: int = 0) -> Iterable[Any]:
        """Batches (x, y), which can be passed over many times."""
        ...


class Source(Protocol):
    """A recipe's data: what is read, how a network is judged on it, and what results keep of that."""

    quality: Quality

    def load(self, split: str, limit: int | None = None, seed: int | None = None) -> Samples:
        """A split, its first ``limit`` samples, or as many drawn with a seed."""
        ...

    def rest(self, split: str, limit: int, seed: int | None = None, take: int | None = None, drawn: int = 0) -> Samples:
        """What `load` leaves, or ``take`` of it, drawn with another seed."""
        ...

    def outputs(self, model: nn.Module, inputs: Tensor, output: Any, named: str) -> int | None:
        """How many classes or tokens the network tells apart, from its output for some inputs; None: not known."""
        ...

    def judged(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, Any]:
        """The network's numbers, plain values."""
        ...

    def identity(self) -> dict[str, Any]:
        """What decides numbers beside the recipe."""
        ...

    def classes(self) -> int | None:
        """Of the data."""
        ...

    def text(self, outputs: int | None) -> TextRow | None:
        """What a window is; None of images."""
        ...


class Images:
    """Labelled images: top-1 and top-5 accuracy."""

    quality = TOP1

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._classes: int | None = None

    def load(self, split: str, limit: int | None = None, seed: int | None = None) -> Samples:
        """As `recoup.data.load`."""
        found = load_data(self.spec, split, limit=limit, seed=seed)
        self._classes = len(found.classes)
        return found

    def rest(self, split: str, limit: int, seed: int | None = None, take: int | None = None, drawn: int = 0) -> Samples:
        """As `recoup.data.loading.rest`."""
        return rest_of_data(self.spec, split, limit=limit, seed=seed, take=take, drawn=drawn)

    def outputs(self, model: nn.Module, inputs: Tensor, output: Any, named: str) -> int | None:  # noqa: ARG002
        """The width of logits.

        Raises:
            RecoupError: fewer than there are classes.
        """
        classes = self._classes or 0
        found = int(output.shape[1]) if isinstance(output, Tensor) and output.dim() == 2 else None
        if found is not None and found < classes:
            raise RecoupError(f"model {named!r}: labels lie in 0..{classes - 1}, but the model has {found} classes")
        return found

    def judged(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, Any]:
        """Top-1, top-5, of how many, and every answer."""
        found = evaluate(model, batches)
        assert found.answers is not None
        return {"top1": found.top1, "top5": found.top5, "count": found.count, "answers": found.answers.to_dict()}

    def identity(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def classes(self) -> int | None:
        """Of what was loaded last."""
        return self._classes

    def text(self, outputs: int | None) -> TextRow | None:  # noqa: ARG002
        """None."""
        return None


class Texts:
    """Windows of a text: nats a token, of every window.

    Args:
        path: of a UTF-8 file.
        vocabulary: how the network reads it.
        context: tokens a window; None: the vocabulary's.

    Raises:
        RecoupError: no context known, or more than the network takes.
    """

    quality = NATS

    def __init__(self, path: str, vocabulary: Vocabulary, context: int | None = None) -> None:
        self.path, self.vocabulary = path, vocabulary
        found = vocabulary.context if context is None else context
        if found is None:
            raise RecoupError(
                f"data 'text:{path}': how many {vocabulary.unit}s a window has is not known: give context (--context)"
            )
        if vocabulary.longest is not None and found > vocabulary.longest:
            raise RecoupError(
                f"data 'text:{path}': windows of {found:,} {vocabulary.unit}s (context, --context), but the network "
                f"takes at most {vocabulary.longest:,}"
            )
        self.context = found
        self._parts: dict[str, Windows] = {}

    def _part(self, split: str) -> Windows:
        if split not in self._parts:
            found = windows(self.path, self.vocabulary, self.context, split)
            self._parts[split] = self._parts.setdefault(found.split, found)
        return self._parts[split]

    def load(self, split: str, limit: int | None = None, seed: int | None = None) -> Windows:
        """Windows of ``train`` or ``test``."""
        found = self._part(split)
        if limit is None:
            return found
        return found.first(limit) if seed is None else found.subset(limit, seed)

    def rest(self, split: str, limit: int, seed: int | None = None, take: int | None = None, drawn: int = 0) -> Windows:
        """The windows of a split that `load` leaves, in their order; or ``take`` of them, drawn with another seed.

        Raises:
            TooFewError: none is left, or fewer than ``take``.
        """
        whole = self._part(split)
        order = torch.arange(len(whole))
        if seed is not None:
            order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
        left = max(len(whole) - limit, 0)
        if left < (take or 1):
            raise TooFewError(
                f"text:{self.path}, {split}: {limit:,} of its windows leave {left:,}"
                + ("" if take is None else f", where {take:,} are asked for"),
                available=left,
            )
        found = whole.take(order[limit:].sort().values)
        return found if take is None else found.subset(take, drawn)

    def outputs(self, model: nn.Module, inputs: Tensor, output: Any, named: str) -> int | None:
        """The width of logits, which are there for every token and know nothing of later ones.

        Raises:
            RecoupError: other outputs; fewer than there are tokens; a network that sees what it is to predict.
        """
        if not isinstance(output, Tensor) or output.dim() != 3 or output.shape[:2] != inputs.shape:
            shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise RecoupError(
                f"model {named!r}: a language model returns logits [windows, tokens, vocabulary] for tokens "
                f"{list(inputs.shape)}; it returned {shape}"
            )
        found, size = int(output.shape[2]), self.vocabulary.size
        highest = max(int(part.y_NT.max()) for part in self._parts.values())
        if highest >= found:
            raise RecoupError(
                f"model {named!r}: the text holds token {highest}, but the model has {found} outputs"
                + ("" if size is None else f" and a vocabulary of {size}")
            )
        changed = inputs.clone()
        changed[:, -1] = (changed[:, -1] + 1) % min(size or found, found)
        other = call(model, changed)
        moved = float((other - output)[:, :-1].abs().max()) if inputs.shape[1] > 1 else 0.0
        if moved > LOOKS_AHEAD * float(output.abs().max()):
            raise RecoupError(
                f"model {named!r} sees the tokens that it is to predict: a change of the last one changes the outputs "
                "before it. Nats are those of causal language models"
            )
        return found

    def check(self, model: nn.Module, named: str) -> int | None:
        """`outputs`, for the first two windows of the test.

        Raises:
            RecoupError: also where the network does not take them.
        """
        inputs = self._part("test").x_NT[:2].to(device_of(model))
        with torch.no_grad():
            try:
                output = call(model, inputs)
            except Exception as error:  # a network of the user's may fail in any way
                why = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
                raise RecoupError(f"model {named!r} does not take windows of {self.context} tokens: {why}") from error
            return self.outputs(model, inputs, output, named)

    def judged(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, Any]:
        """Nats a token, over how many, and of every window."""
        meter = Nats("evaluate")
        observe(model, batches, meter)
        found = meter.result()
        return {"nats": found.value, "count": found.count, "windows": [round(value, 9) for value in meter.samples]}

    def identity(self) -> dict[str, Any]:
        """The tokens, in which both the text and the vocabulary show."""
        return {"tokens": of_batches((part.x_NT, part.y_NT) for part in map(self._part, SPLITS))}

    def classes(self) -> int | None:
        """None: following tokens are no classes."""
        return None

    def text(self, outputs: int | None) -> TextRow:
        """What a window is."""
        test, unknown = self._part("test"), self.vocabulary.unknown
        share = 0.0 if unknown is None else float((test.x_NT == unknown).double().mean())
        return TextRow(
            file=test.name,
            unit=self.vocabulary.unit,
            context=self.context,
            vocabulary=self.vocabulary.size or outputs or 0,
            train=len(self._part("train")),
            test=len(test),
            unknown=share,
        )


def loaded(recipe: Any) -> tuple[nn.Module, Source]:
    """A recipe's network, as its factory and weights leave it, and its data.

    Raises:
        RecoupError: as `recoup.models.load`; a text for a network whose vocabulary is not known.
    """
    if recipe.data.partition(":")[0] == TEXT:
        model = load_language(recipe.model, recipe.weights, recipe.model_options)
    else:
        model = load_model(recipe.model, recipe.weights, **recipe.model_options)
    return model, source_of(recipe.data, recipe.model, model, recipe.context)


def source_of(data: str, spec: str, model: nn.Module, context: int | None = None) -> Source:
    """What ``data`` names, for a network that ``spec`` named.

    Raises:
        RecoupError: a text for a network whose vocabulary is not known; a context beside images.
    """
    kind, _, path = data.partition(":")
    if kind == TEXT:
        if not path:
            raise RecoupError(f"data {data!r}: what follows the colon is missing; it is text:FILE")
        return Texts(path, vocabulary_of(spec, model), context)
    if context is not None:
        raise RecoupError(f"context {context}: is the tokens of a text's window (--context), and data are {data!r}")
    return Images(data)


def numbers_of(value: dict[str, Any]) -> dict[str, Any]:
    """The fields of a row from what `Texts.judged` gave."""
    half = half_width(value["windows"])
    nats = value["nats"]
    interval = {"low": max(nats - half, 0.0), "high": nats + half}
    return {"nats": nats, "perplexity": perplexity(nats), **interval, "count": value["count"]}


def difference_of(windows: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """What the first of two networks loses on the same windows: the mean difference and its interval."""
    apart = [one - other for one, other in zip(windows, others, strict=True)]
    mean, half = math.fsum(apart) / len(apart), half_width(apart)
    return {"nats": mean, "low": mean - half, "high": mean + half}
