"""MNIST and Fashion-MNIST: LeCun's idx files, gzipped or not."""

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from recoup.data.augmentation import CropFlip
from recoup.data.dataset import Dataset
from recoup.data.places import Pick, choose_split, folder
from recoup.errors import RecoupError

PREFIXES = {"train": "train", "test": "t10k"}
IMAGES, LABELS = 3, 1  # dimensions of the two files


@dataclass(frozen=True)
class Kind:
    """What tells one idx data set from another; the files do not say it."""

    classes: tuple[str, ...]
    mean: float
    std: float
    flip: bool


KINDS = {
    "mnist": Kind(tuple(str(digit) for digit in range(10)), mean=0.1307, std=0.3081, flip=False),
    "fashion-mnist": Kind(
        ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
        mean=0.2860,
        std=0.3530,
        flip=True,
    ),
}


def read(name: str, location: str, split: str, pick: Pick) -> Dataset:
    """MNIST (LeCun et al. 1998) or Fashion-MNIST (Xiao et al. 2017) from a folder with the four official files.

    Normalized with the training images' own mean and standard deviation. Augmentation moves an image by at most two
    pixels, and mirrors clothes but not digits.

    Raises:
        RecoupError: no such folder or split; a missing, truncated or foreign file.
    """
    path = folder(name, location)
    kind = KINDS[name]
    prefix = PREFIXES[choose_split(name, split, PREFIXES)]
    images_file = _file(path, f"{prefix}-images-idx3-ubyte")
    labels_file = _file(path, f"{prefix}-labels-idx1-ubyte")
    labels = _read(labels_file, LABELS).long()
    images = _read(images_file, IMAGES)
    if len(images) != len(labels):
        raise RecoupError(f"{images_file} has {len(images):,} images, but {labels_file.name} {len(labels):,} labels")
    positions = pick(labels)
    return Dataset(
        name=name,
        split=split,
        images=images[positions][:, None],
        labels=labels[positions],
        classes=kind.classes,
        mean=(kind.mean,),
        std=(kind.std,),
        augmentation=CropFlip(padding=2, flip=kind.flip),
    )


def _file(path: Path, stem: str) -> Path:
    for name in (f"{stem}.gz", stem):
        if (path / name).exists():
            return path / name
    raise RecoupError(f"{path} has no {stem}.gz")


def _read(path: Path, dimensions: int) -> Tensor:
    """uint8 of the file's shape.

    An idx file: two zero bytes, type 8 (bytes), the number of dimensions, their sizes big-endian, the bytes.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise RecoupError(f"{path} cannot be read; truncated or another format? ({error})") from error
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
        raise RecoupError(f"{path} is no idx file of {dimensions} dimensions of bytes")
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) - start != math.prod(shape):
        raise RecoupError(f"{path} holds {len(content) - start:,} bytes, its header says {' x '.join(map(str, shape))}")
    if not math.prod(shape):
        raise RecoupError(f"{path} is empty: {' x '.join(map(str, shape))}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)
