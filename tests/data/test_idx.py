"""idx files: MNIST and Fashion-MNIST."""

import gzip
from pathlib import Path

import pytest
import torch

import recoup.data
from recoup.data import CropFlip
from recoup.errors import RecoupError

from .conftest import noise, pixels, write_idx

PIXELS = noise(5, 28, 28)
LABELS = noise(5) % 10


@pytest.fixture(params=[".gz", ""])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{request.param}", PIXELS)
    write_idx(tmp_path / f"t10k-labels-idx1-ubyte{request.param}", LABELS)
    return tmp_path


@pytest.mark.parametrize(("name", "flip", "first"), [("mnist", False, "0"), ("fashion-mnist", True, "t-shirt")])
def test_reads(folder: Path, name: str, flip: bool, first: str) -> None:
    data = recoup.data.load(f"{name}:{folder}")
    assert torch.equal(pixels(data), torch.from_numpy(PIXELS)[:, None])
    assert data.labels.tolist() == LABELS.tolist()
    assert (data.name, data.classes[0], data.augmentation) == (name, first, CropFlip(2, flip))
    with pytest.raises(RecoupError, match=r"has no train-images-idx3-ubyte\.gz"):
        recoup.data.load(f"{name}:{folder}", "train")
    with pytest.raises(RecoupError, match=f"{name}: no split 't10k'; there is train, test"):
        recoup.data.load(f"{name}:{folder}", "t10k")


def test_truncated_and_foreign_files_are_named(folder: Path) -> None:
    path = next(folder.glob("*images*"))
    whole = path.read_bytes()
    for content in (whole[:-50], whole[:10], whole[:3], b"", b"text", b"\x1f\x8b\x08 no gzip at all"):
        path.write_bytes(content)
        with pytest.raises(RecoupError, match=r"t10k-images-idx3-ubyte"):
            recoup.data.load(f"mnist:{folder}")


def test_header_and_content_must_agree(tmp_path: Path) -> None:
    images, labels = tmp_path / "t10k-images-idx3-ubyte.gz", tmp_path / "t10k-labels-idx1-ubyte.gz"
    write_idx(images, PIXELS)
    write_idx(labels, LABELS[:4])
    with pytest.raises(RecoupError, match=r"has 5 images, but t10k-labels-idx1-ubyte\.gz 4 labels"):
        recoup.data.load(f"mnist:{tmp_path}")
    write_idx(labels, PIXELS)
    with pytest.raises(RecoupError, match="is no idx file of 1 dimensions"):
        recoup.data.load(f"mnist:{tmp_path}")
    write_idx(labels, LABELS[:0])
    with pytest.raises(RecoupError, match="is empty: 0"):
        recoup.data.load(f"mnist:{tmp_path}")
    write_idx(labels, LABELS + 10)
    with pytest.raises(RecoupError, match="there are 10 classes"):
        recoup.data.load(f"mnist:{tmp_path}")
    labels.write_bytes(gzip.compress(bytes([0, 0, 8, 1]) + (9).to_bytes(4, "big") + bytes(5)))
    with pytest.raises(RecoupError, match="holds 5 bytes, its header says 9"):
        recoup.data.load(f"mnist:{tmp_path}")
