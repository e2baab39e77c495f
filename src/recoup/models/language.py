"""Language models and their vocabularies: how a text becomes the numbers that a network reads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recoup.errors import RecoupError
from recoup.models.hugging_face import PREFIX
from recoup.models.loading import load
from recoup.models.transformer import load_chargpt

CHARGPT = ("chargpt", "recoup.models:chargpt")
LONGEST = 1024  # tokens a window where nobody says: beyond it a window's logits alone fill a gigabyte
TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
KNOWN = (
    "chargpt, whose checkpoint holds its alphabet (with weights); hf:FOLDER with the tokenizer beside the network; "
    "or a factory whose network has an `alphabet`, a string, or a `tokenizer` with encode(text)"
)


@dataclass(frozen=True)
class Vocabulary:
    """How a text becomes numbers.

    Attributes:
        encode: a text -> numbers; a character that has none is a `RecoupError`.
        size: how many numbers the network's embedding takes; None where that is not known.
        unit: what a number stands for: ``character`` or ``token``.
        context: tokens a window where nobody says; None: somebody must.
        longest: tokens a window at most; None where that is not known.
        unknown: the number of what the tokenizer does not know; None where it knows everything.
    """

    encode: Callable[[str], list[int]]
    size: int | None
    unit: str
    context: int | None = None
    longest: int | None = None
    unknown: int | None = None

    @classmethod
    def of_characters(cls, alphabet: str, context: int | None = None) -> "Vocabulary":
        """A character's number is its place in the alphabet.

        >>> Vocabulary.of_characters("abc").encode("cab")
        [2, 0, 1]
        """
        numbers = {character: number for number, character in enumerate(alphabet)}

        def encode(text: str) -> list[int]:
            try:
                return [numbers[character] for character in text]
            except KeyError:
                strange = min(set(text) - set(alphabet))
                raise RecoupError(
                    f"holds {strange!r}, which is not in the alphabet of {len(alphabet)} characters"
                ) from None

        return cls(encode, len(alphabet), "character", context, context)


def load_language(spec: str, weights: str | Path | None = None, options: Mapping[str, Any] | None = None) -> nn.Module:
    """A language model, in float32.

    Args:
        spec, weights, options: as in `recoup.models.load`; a chargpt's sizes are those of its checkpoint.

    Raises:
        RecoupError: as `recoup.models.load`.
    """
    if spec in CHARGPT and weights is not None:
        if options:
            raise RecoupError(f"model {spec!r}: its sizes are those of the checkpoint: leave out {', '.join(options)}")
        model: nn.Module = load_chargpt(weights)[0]
    else:
        model = load(spec, weights, **(options or {}))
    half = {p.dtype for p in model.parameters() if p.is_floating_point()} & {torch.bfloat16, torch.float16}
    return model.float() if half else model


def vocabulary_of(spec: str, model: nn.Module) -> Vocabulary:
    """The vocabulary of a network, which its attributes or its folder hold.

    Raises:
        RecoupError: there is none; a folder without a tokenizer.
    """
    if spec.startswith(PREFIX):
        return _of_folder(spec, model)
    alphabet, tokenizer = getattr(model, "alphabet", None), getattr(model, "tokenizer", None)
    context = getattr(model, "context", None)
    context = context if isinstance(context, int) else None
    if isinstance(alphabet, str) and alphabet:
        return Vocabulary.of_characters(alphabet, context)
    if callable(getattr(tokenizer, "encode", None)):
        return Vocabulary(lambda text: list(tokenizer.encode(text)), None, "token", context, context)  # type: ignore[union-attr]
    raise RecoupError(f"model {spec!r} has no vocabulary that is known; a text needs {KNOWN}")


def _of_folder(spec: str, model: Any) -> Vocabulary:
    from transformers import AutoTokenizer

    folder = spec.removeprefix(PREFIX)
    remedy = f"tokenizer.save_pretrained({folder!r}) writes it"
    if not any(path for pattern in TOKENIZERS for path in Path(folder).glob(pattern)):
        raise RecoupError(f"model {spec!r}: its folder has no tokenizer; {remedy}")  # transformers makes an empty one
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever the missing or foreign file makes of it
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecoupError(f"model {spec!r}: its folder has no tokenizer ({why}); {remedy}") from error

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, verbose=False)

    embedding = model.get_input_embeddings()
    size = getattr(embedding, "num_embeddings", None)
    longest = getattr(model.config, "max_position_embeddings", None)
    context = min(longest, LONGEST) if isinstance(longest, int) and longest > 0 else None
    longest = longest if context is not None else None
    return Vocabulary(encode, size, "token", context, longest, tokenizer.unk_token_id)
