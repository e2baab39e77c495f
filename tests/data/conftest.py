"""Small data sets on disk, in every layout that recoup.data reads."""

import gzip
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recoup.data import Dataset

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before `datasets` is imported: no test may reach for the network


def encoded(values: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    """The file content of an image, uint8 [H, W] or [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, *shape], every byte as likely as any other."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def pixels(data: Dataset) -> torch.Tensor:
    """The images of a data set that keeps them in memory."""
    assert isinstance(data.images, torch.Tensor)
    return data.images


def write_parquet(path: Path, images: Sequence[bytes | None], labels: Sequence[int], image: str = "img") -> Path:
    """A parquet file as Hugging Face lays CIFAR-10 out, without its schema metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": content, "path": None} for content in images], kind)
    pq.write_table(pa.table({image: column, "label": pa.array(labels, pa.int64())}), path)
    return path


def write_idx(path: Path, values: np.ndarray) -> Path:
    """An idx file of bytes, gzipped where the name says so."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape)
    content = header + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """An image folder: classes cat and dog, three 40 x 50 train and two 60 x 48 val pictures each."""
    for split, count, shape in (("train", 3, (40, 50, 3)), ("val", 2, (60, 48, 3))):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for i, values in enumerate(noise(count, *shape, seed=label)):
                (folder / f"{i}.png").write_bytes(encoded(values))
    return tmp_path / "pets"


@pytest.fixture
def small_cifar(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Let CIFAR-10 have as many train and test images as a test can afford."""

    def resize(train: int, test: int) -> None:
        from recoup.data import cifar

        monkeypatch.setattr(cifar, "SIZES", {"train": train, "test": test})

    return resize


@pytest.fixture
def hub_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own for the library `datasets`, and no progress bars."""
    import datasets
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hub"))
    datasets.disable_progress_bars()
