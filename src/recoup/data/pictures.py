"""Encoded pictures (JPEG, PNG, WebP, ...) that are decoded when they are asked for."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from recoup.data.augmentation import Augmentation, CenterCrop, CropFlip, ResizedCrop
from recoup.errors import RecoupError
from recoup.kernels.threads import over_rows

if TYPE_CHECKING:
    from PIL.Image import Image

MEMORY_LIMIT = 4 << 30  # bytes of decoded images; beyond, a machine of 8 GiB would begin to swap
FORMATS = ("WEBP", "PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM")  # trying every codec PIL knows costs a third of the time
GRAY = ("1", "L", "LA")
COLOR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


class Encoded(Protocol):
    """Where the bytes of the pictures come from."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The encoded picture; a missing one raises OSError."""
        ...

    def name(self, index: int) -> str:
        """What to call that picture in an error."""
        ...


@dataclass(frozen=True)
class Files:
    """One file a picture."""

    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        return Path(self.paths[index]).read_bytes()

    def name(self, index: int) -> str:
        return self.paths[index]


@dataclass(frozen=True)
class Rows:
    """Rows of a table: an Arrow column of bytes, or a Hugging Face dataset of ``{"bytes": ..., "path": ...}``."""

    rows: Sequence[Any]
    source: str

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> bytes:
        row = self.rows[index]
        if hasattr(row, "as_py"):
            row = row.as_py()
        if isinstance(row, dict):
            if row.get("bytes") is None and row.get("path"):
                return Path(row["path"]).read_bytes()
            row = row.get("bytes")
        if not isinstance(row, bytes):
            raise OSError("the row holds no picture")
        return row

    def name(self, index: int) -> str:
        return f"{self.source}, image {index}"


def decode(encoded: Encoded, index: int, mode: str | None = "RGB") -> Image:
    """One picture, whole; ``mode`` None keeps a gray picture gray.

    Raises:
        RecoupError: it cannot be read: missing, truncated, of a foreign format or depth; the message names it.
    """
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(encoded.read(index)), formats=FORMATS)
        picture.load()
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise RecoupError(f"{encoded.name(index)} cannot be decoded: {error}") from error
    if picture.mode not in GRAY + COLOR:
        raise RecoupError(
            f"{encoded.name(index)}: pixels of mode {picture.mode}, not 8 bits a channel, are not supported"
        )
    if mode is None:
        mode = "L" if picture.mode in GRAY else "RGB"
    if picture.mode != mode and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # PIL's documented way; converting to RGB directly makes it warn
    return picture if picture.mode == mode else picture.convert(mode)


def to_tensor(picture: Image) -> Tensor:
    """uint8 [C, H, W] of an "L" or "RGB" picture."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, -1).permute(2, 0, 1)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of any size, decoded to square RGB images of one size each time a batch asks for them.

    Args:
        encoded: where the bytes come from.
        indices: int64 [N], which of them, in order.
        crop: how a picture becomes a square image.
    """

    encoded: Encoded
    indices: Tensor
    crop: CenterCrop

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, C, H and W of the images they become."""
        return len(self), 3, self.crop.size, self.crop.size

    def select(self, positions: Tensor) -> Pictures:
        """Those of the pictures, in that order."""
        return Pictures(self.encoded, self.indices[positions], self.crop)

    def images(
        self, positions: Tensor, augmentation: Augmentation | None = None, draws: Tensor | None = None
    ) -> Tensor:
        """uint8 [B, 3, H, W]: the pictures at these positions, augmented where draws (one row each) are given.

        Raises:
            RecoupError: a picture cannot be decoded.
        """
        resized = augmentation if isinstance(augmentation, ResizedCrop) and draws is not None else None
        size = resized.size if resized else self.crop.size
        out = torch.empty(len(positions), 3, size, size, dtype=torch.uint8)
        rows = self.indices[positions].tolist()

        def fill(first: int, last: int) -> None:  # PIL releases the GIL while it decodes and resizes
            for row in range(first, last):
                picture = decode(self.encoded, rows[row])
                square = resized.view(picture, draws[row]) if resized and draws is not None else self.crop.view(picture)
                out[row] = to_tensor(square)

        over_rows(fill, len(rows), cost_per_row=size * size * 16)
        return augmentation.apply(out, draws) if isinstance(augmentation, CropFlip) and draws is not None else out


def decode_all(encoded: Encoded, indices: Tensor) -> Tensor:
    """All those pictures at their own size in memory: uint8 [N, C, H, W], C = 1 where every one of them is gray.

    Raises:
        RecoupError: a picture cannot be decoded or has another size than the first, or all need more than 4 GiB.
    """
    first = to_tensor(decode(encoded, int(indices[0]), None))
    channels, height, width = first.shape
    needed = len(indices) * height * width * 3
    if needed > MEMORY_LIMIT:
        raise RecoupError(
            f"{len(indices):,} images of {height} x {width} need {needed / 2**30:.1f} GiB in memory, "
            f"{MEMORY_LIMIT / 2**30:.0f} at most; give a limit"
        )
    out = torch.empty(len(indices), channels, height, width, dtype=torch.uint8)
    for row, index in enumerate(indices.tolist()):
        image = to_tensor(decode(encoded, index, None))
        if image.shape[1:] != first.shape[1:]:
            raise RecoupError(
                f"{encoded.name(index)} is {image.shape[1]} x {image.shape[2]} pixels, the first image is "
                f"{height} x {width}; for pictures of many sizes use imagefolder:DIR, or give hf:NAME resize= and crop="
            )
        if image.shape[0] > out.shape[1]:
            out = out.repeat(1, 3, 1, 1)  # gray so far, and here is color: gray is red = green = blue
        out[row] = image
    return out
