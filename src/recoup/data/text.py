"""Plain text as windows of tokens: characters, or what a tokenizer makes of it.

Legend: N windows, T tokens a window, B windows a batch.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from recoup.data.dataset import check_count
from recoup.data.places import choose_split
from recoup.errors import RecoupError
from recoup.models.language import Vocabulary

TRAINING = 0.9  # of a text's characters; the rest is the test
SPLITS = ("train", "test")
NEAR = 200  # characters within which a text for tokens is cut at white space
MOST_LOGITS = 2**26  # a batch: half a gigabyte in float64, in which losses are added up


def contexts(
    path: str | Path, alphabet: str, context: int, *, first: float = 0.0, last: float = 1.0, batch: int = 64
) -> list[tuple[Tensor, Tensor]]:
    """Batches of (characters, following characters), int64 [B, context], from a part of a text file.

    The windows follow each other without overlap; characters after the last whole window are left out.

    Args:
        path: a UTF-8 file.
        alphabet: position of a character = its number.
        context: characters a window.
        first, last: the part of the text, as fractions: 0.9 and 1.0 are its last tenth.
        batch: windows a batch.

    Raises:
        RecoupError: no such file, a character outside the alphabet, less text than one window.
    """
    text = read_text(path)
    vocabulary = Vocabulary.of_characters(alphabet)
    _encoded(path, text, vocabulary)  # a strange character anywhere says that this is another text
    x_NT, y_NT = _cut(path, _part(text, first, last), vocabulary, context)
    return list(zip(x_NT.split(batch), y_NT.split(batch), strict=True))


@dataclass(frozen=True, eq=False, repr=False)
class Windows:
    """Windows of a text, which follow each other without overlap: what a language model sees, and what it is to say.

    Attributes:
        name: of the file.
        split: ``train``, the first nine tenths of the characters, or ``test``, the rest.
        x_NT: tokens, int64.
        y_NT: of each the following token.
        vocabulary: how the text was read.
    """

    name: str
    split: str
    x_NT: Tensor
    y_NT: Tensor
    vocabulary: Vocabulary

    augmentation = None
    """Nothing is known that changes a text and keeps what follows."""

    def __len__(self) -> int:
        return len(self.x_NT)

    def __repr__(self) -> str:
        return f"Windows({self.name}, {self.split}: {len(self):,} of {self.context} {self.vocabulary.unit}s)"

    @property
    def context(self) -> int:
        """Tokens a window."""
        return self.x_NT.shape[1]

    def take(self, positions: Tensor) -> "Windows":
        """Those windows, in that order. ``positions`` is int64 [M]."""
        return replace(self, x_NT=self.x_NT[positions], y_NT=self.y_NT[positions])

    def subset(self, n: int, seed: int = 0) -> "Windows":
        """``n`` different windows at random; a smaller subset is the beginning of a larger one of the same seed.

        Raises:
            RecoupError: ``n`` below 1 or above ``len(self)``.
        """
        check_count(f"{self.name}, {self.split}: subset", n, len(self), "windows")
        return self.take(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n])

    def first(self, n: int) -> "Windows":
        """The first ``n`` windows.

        Raises:
            RecoupError: as `subset`.
        """
        check_count(f"{self.name}, {self.split}: limit", n, len(self), "windows")
        return self.take(torch.arange(n))

    def batches(self, size: int, *, augment: bool = False, seed: int = 0) -> list[tuple[Tensor, Tensor]]:  # noqa: ARG002
        """Batches (tokens, following tokens) of ``size`` windows, fewer where a large vocabulary's logits would need
        more than half a gigabyte.

        Raises:
            RecoupError: ``augment``: nothing is known that keeps what follows.
        """
        if augment:
            raise RecoupError(f"{self.name}: a text has no augmentation")
        most = max(MOST_LOGITS // (self.context * (self.vocabulary.size or 1)), 1)
        size = min(size, most)
        return list(zip(self.x_NT.split(size), self.y_NT.split(size), strict=True))


def windows(path: str | Path, vocabulary: Vocabulary, context: int, split: str = "test") -> Windows:
    """The windows of a part of a text: ``train``, its first nine tenths, or ``test``, the rest.

    The text is cut before it is read as tokens, so that no token reaches into both parts; where tokens are longer than
    characters, at the next white space, so that no word is cut. Nothing is put around a window, and what follows the
    last whole window is left out.

    Raises:
        RecoupError: no such file or split, no UTF-8, a token outside the vocabulary, less text than one window.

    >>> found = windows(__file__, Vocabulary(lambda text: list(text.encode()), 256, "byte"), 32, "train")
    >>> found.context, tuple(found.batches(4)[0][0].shape)
    (32, (4, 32))
    """
    chosen = choose_split(f"text:{path}", split, SPLITS)
    text = read_text(path)
    end = _end_of_training(text, vocabulary)
    x_NT, y_NT = _cut(path, text[:end] if chosen == "train" else text[end:], vocabulary, context)
    return Windows(Path(path).name, chosen, x_NT, y_NT, vocabulary)


def read_text(path: str | Path) -> str:
    """A file's text.

    Raises:
        RecoupError: no such file, or no UTF-8.
    """
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise RecoupError(
            f"{path}: no text in UTF-8: byte {error.start:,} is {error.object[error.start]:#04x}"
        ) from None
    except OSError as error:
        raise RecoupError(f"{path}: no text ({error.strerror})") from None


def _end_of_training(text: str, vocabulary: Vocabulary) -> int:
    end = int(len(text) * TRAINING)
    if vocabulary.unit == "character":
        return end
    found = re.compile(r"\s").search(text, end, end + NEAR)  # scripts without spaces are cut where it falls
    return found.start() if found else end


def _part(text: str, first: float, last: float) -> str:
    return text[int(len(text) * first) : int(len(text) * last)]


def _encoded(path: str | Path, text: str, vocabulary: Vocabulary) -> list[int]:
    try:
        return vocabulary.encode(text)
    except RecoupError as error:
        raise RecoupError(f"{path}: {error}") from None


def _cut(path: str | Path, part: str, vocabulary: Vocabulary, context: int) -> tuple[Tensor, Tensor]:
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise RecoupError(f"{path}: windows of {context!r} {vocabulary.unit}s: must be a whole number of 1 or more")
    numbers = _encoded(path, part, vocabulary)
    count = (len(numbers) - 1) // context
    if count < 1:
        raise RecoupError(
            f"{path}: {len(numbers):,} {vocabulary.unit}s are less than a window of {context} and its successor"
        )
    tokens = torch.tensor(numbers[: count * context + 1], dtype=torch.int64)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (vocabulary.size is not None and high >= vocabulary.size):
        raise RecoupError(
            f"{path}: holds token {low if low < 0 else high}, and the network's vocabulary has {vocabulary.size}: is "
            "the tokenizer that of another network?"
        )
    return tokens[:-1].view(count, context), tokens[1:].view(count, context)
