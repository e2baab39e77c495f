"""CIFAR-10: Hugging Face's parquet layout and the classic binary version. Pickles are refused."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recoup.data.augmentation import CropFlip
from recoup.data.dataset import IMAGENET_MEAN, IMAGENET_STD, Dataset
from recoup.data.pictures import Rows, decode_all
from recoup.data.places import Pick, choose_split, folder
from recoup.errors import RecoupError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZES = {"train": 50_000, "test": 10_000}
BINARIES = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
PARQUET_FOLDERS = ("", "data", "plain_text")
ROW = 1 + 3 * 32 * 32  # bytes of an image in the binary version: its label, then red, green and blue


def read(location: str, split: str, pick: Pick) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009) from a folder, in the official order.

    The folder holds ``train-*-of-*.parquet`` and ``test-*-of-*.parquet`` (also below ``data/`` or ``plain_text/``), as
    Hugging Face has them, or ``data_batch_1.bin`` ... and ``test_batch.bin`` (also below ``cifar-10-batches-bin/``).
    Normalized with ImageNet's mean and standard deviation, as the public checkpoints are; augmentation is the usual
    crop from four black pixels around, and mirroring.

    Raises:
        RecoupError: no such folder or split; no CIFAR-10 in it; a truncated or foreign file; not 50,000 or 10,000
            images; the "python version", which is pickled.
    """
    path = folder("cifar10", location)
    choose_split("cifar10", split, SIZES)
    shards = _shards(path, split)
    images, labels = _read_parquet(shards, split, pick) if shards else _read_binary(path, split, pick)
    return Dataset(
        name="cifar10",
        split=split,
        images=images,
        labels=labels,
        classes=CLASSES,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        augmentation=CropFlip(padding=4, flip=True),
    )


def _shards(path: Path, split: str) -> list[Path]:
    """The split's parquet files in order; none where the folder has another layout."""
    for inner in PARQUET_FOLDERS:
        files = sorted((path / inner).glob(f"{split}-*-of-*.parquet"))
        if files:
            total = re.search(r"-of-0*(\d+)\.parquet$", files[0].name)
            if total and len(files) != int(total[1]):
                raise RecoupError(f"{path / inner}: {len(files)} of {total[1]} files {split}-*.parquet are there")
            return files
    return []


def _read_parquet(shards: list[Path], split: str, pick: Pick) -> tuple[Tensor, Tensor]:
    import pyarrow as pa

    tables = [_read_shard(shard) for shard in shards]
    table = pa.concat_tables(tables)
    labels = _labels(shards[0], table.column("label"))
    _check_size(shards[0].parent, split, len(labels))
    positions = pick(labels)
    images = decode_all(Rows(table.column("bytes"), shards[0].name), positions)
    if images.shape[1:] != (3, 32, 32):
        raise RecoupError(f"{shards[0]}: its images are {list(images.shape[1:])}, CIFAR-10's are [3, 32, 32]")
    return images, labels[positions]


def _read_shard(path: Path) -> Any:
    """An Arrow table of two columns, bytes and label."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            image = next((name for name in ("img", "image") if name in names), None)
            if image is None or "label" not in names:
                raise RecoupError(f"{path} has columns {', '.join(names)}; CIFAR-10 has img and label")
            table = file.read(columns=[f"{image}.bytes", "label"]).flatten()
    except (pa.ArrowException, OSError) as error:
        raise RecoupError(f"{path} cannot be read as parquet; truncated or another format? ({error})") from error
    if table.num_columns != 2:
        raise RecoupError(f"{path}: column {image} holds no encoded images")
    return table.rename_columns(["bytes", "label"])


def _labels(path: Path, column: Any) -> Tensor:
    import pyarrow as pa

    if not pa.types.is_integer(column.type) or column.null_count:
        raise RecoupError(f"{path}: labels must be whole numbers, not {column.type} with {column.null_count} missing")
    return _check_labels(path, torch.from_numpy(column.to_numpy().astype("int64")))


def _check_labels(path: Path, labels: Tensor) -> Tensor:
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) > 9):
        raise RecoupError(f"{path}: labels lie in {int(labels.min())} .. {int(labels.max())}, CIFAR-10's in 0 .. 9")
    return labels


def _check_size(path: Path, split: str, count: int) -> None:
    if count != SIZES[split]:
        raise RecoupError(
            f"{path}: {count:,} {split} images, CIFAR-10 has {SIZES[split]:,}; read a part of it with hf:{path}"
        )


def _read_binary(path: Path, split: str, pick: Pick) -> tuple[Tensor, Tensor]:
    inner = next((p for p in (path, path / "cifar-10-batches-bin") if (p / BINARIES[split][0]).exists()), None)
    if inner is None:
        raise RecoupError(_nothing_here(path, split))
    rows = torch.cat([_read_batch(inner / name) for name in BINARIES[split]])
    _check_size(inner, split, len(rows))
    labels = _check_labels(inner / BINARIES[split][0], rows[:, 0].long())
    positions = pick(labels)
    return rows[positions, 1:].view(-1, 3, 32, 32), labels[positions]


def _read_batch(path: Path) -> Tensor:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecoupError(f"{path} cannot be read: {error}") from error
    if not content or len(content) % ROW:
        raise RecoupError(f"{path} has {len(content):,} bytes, not a multiple of {ROW}; truncated or another format?")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, ROW)


def _nothing_here(path: Path, split: str) -> str:
    if any((p / "data_batch_1").exists() for p in (path, path / "cifar-10-batches-py")):
        return (
            f"{path}: this is the python version of CIFAR-10, which is pickled, and recoup never unpickles data; "
            "download the binary version or Hugging Face's parquet files"
        )
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    return f"{path} holds no CIFAR-10: {split}-*-of-*.parquet or {BINARIES[split][0]} is missing; it has {found}"
