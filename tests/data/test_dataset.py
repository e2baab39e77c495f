"""Dataset: what it refuses, its subsets, its repr."""

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

from recoup.data import CropFlip, Dataset, ResizedCrop
from recoup.errors import RecoupError

from .conftest import pixels


def dataset(count: int = 12, **changes: Any) -> Dataset:
    images = torch.arange(count * 3 * 16).remainder(256).to(torch.uint8).view(count, 3, 4, 4)
    fields: dict[str, Any] = {
        "name": "toy",
        "split": "test",
        "images": images,
        "labels": torch.arange(count) % 2,
        "classes": ("a", "b"),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    return Dataset(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(12, 3, 4, 4)}, r"uint8 \[N, C, H, W\], not torch.float32 \[12, 3, 4, 4\]"),
        ({"images": torch.zeros(12, 4, 4, dtype=torch.uint8)}, r"not torch.uint8 \[12, 4, 4\]"),
        ({"labels": torch.zeros(12)}, r"int64 \[12\], not torch.float32"),
        ({"labels": torch.zeros(11, dtype=torch.int64)}, r"int64 \[12\], not torch.int64 \[11\]"),
        ({"labels": torch.full((12,), 2)}, "labels lie in 2 .. 2, but there are 2 classes"),
        ({"labels": torch.full((12,), -1)}, "is this split unlabelled"),
        ({"mean": (0.5,)}, "must have 3 values each"),
        ({"std": (0.5, 0.0, 0.5)}, "std above 0"),
        ({"augmentation": ResizedCrop()}, "images in a tensor take CropFlip"),
        ({"images": torch.zeros(0, 3, 4, 4, dtype=torch.uint8), "labels": torch.zeros(0).long()}, "no images"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecoupError, match=rf"Dataset\(toy, test\): .*{message}"):
        dataset(**changes)


def test_subset_is_random_and_reproducible() -> None:
    whole = dataset()
    some, same, other = whole.subset(5, seed=1), whole.subset(5, seed=1), whole.subset(5, seed=2)
    assert len(some) == 5
    assert torch.equal(pixels(some), pixels(same))
    assert not torch.equal(pixels(some), pixels(other))
    assert torch.equal(pixels(whole.subset(9, seed=1))[:5], pixels(some))
    rows = {tuple(image.flatten().tolist()) for image in pixels(whole.subset(12, seed=3))}
    assert len(rows) == len({tuple(image.flatten().tolist()) for image in pixels(whole)})


def test_subset_keeps_labels_with_images() -> None:
    whole = dataset()
    some = whole.subset(7, seed=4)
    for image, label in zip(pixels(some), some.labels, strict=True):
        where = (pixels(whole) == image).flatten(1).all(1).nonzero()[0]
        assert label == whole.labels[where]


@pytest.mark.parametrize("n", [0, -1, 13, 2.0, True])
def test_subset_refuses(n: Any) -> None:
    with pytest.raises(RecoupError, match=f"toy, test: subset of {n!r} images: it must be an integer from 1 to 12"):
        dataset().subset(n, seed=0)


def test_repr_pickle_and_replace() -> None:
    data = dataset()
    assert repr(data) == "Dataset(toy, test: 12 images of 3 x 4 x 4, 2 classes)"
    assert torch.equal(pixels(pickle.loads(pickle.dumps(data))), pixels(data))
    assert replace(data, augmentation=CropFlip(1)).augmentation == CropFlip(1)
