"""Plain text as contexts of characters."""

from pathlib import Path

import torch
from torch import Tensor

from recoup.errors import RecoupError


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
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecoupError(f"{path}: no text ({error})") from None
    strange = sorted(set(text) - set(alphabet))
    if strange:
        raise RecoupError(f"{path}: holds {strange[0]!r}, which is not in the alphabet of {len(alphabet)} characters")
    number = {character: index for index, character in enumerate(alphabet)}
    part = text[int(len(text) * first) : int(len(text) * last)]
    count = (len(part) - 1) // context
    if count < 1:
        raise RecoupError(f"{path}: {len(part)} characters are less than a window of {context} and its successor")
    tokens = torch.tensor([number[character] for character in part[: count * context + 1]])
    x, y = tokens[:-1].view(count, context), tokens[1:].view(count, context)
    return list(zip(x.split(batch), y.split(batch), strict=True))
