"""Batches: the same on every pass, normalized as published, sizes and orders."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recoup.data import CropFlip
from recoup.errors import RecoupError

from .test_dataset import dataset


def collect(batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = list(batches)
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


@given(count=st.integers(1, 40), size=st.integers(1, 45), drop_last=st.booleans())
def test_len_and_sizes(count: int, size: int, drop_last: bool) -> None:
    data = dataset(count)
    if drop_last and count < size:
        with pytest.raises(RecoupError, match=f"toy: {count} images make no full batch of {size}"):
            data.batches(size, drop_last=True)
        return
    batches = data.batches(size, drop_last=drop_last)
    sizes = [len(y) for _, y in batches]
    assert len(sizes) == len(batches)
    assert all(one == size for one in sizes[:-1])
    assert sum(sizes) == (count // size * size if drop_last else count)


def test_normalization_and_types() -> None:
    data = replace(dataset(), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    (x, y), *_ = data.batches(5)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    assert isinstance(data.images, torch.Tensor)
    assert torch.equal(x, (data.images[:5].float() / 255 - mean) / std)
    assert torch.equal(y, data.labels[:5])


def test_channels_last_changes_the_layout_only() -> None:
    data = dataset()
    (plain, _), *_ = data.batches(4)
    (last, _), *_ = data.batches(4, channels_last=True)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert plain.is_contiguous()
    assert torch.equal(plain, last)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_pass_is_the_same(augment: bool, shuffle: bool) -> None:
    data = replace(dataset(), augmentation=CropFlip(2))
    batches = data.batches(5, augment=augment, shuffle=shuffle, seed=3)
    torch.manual_seed(1)  # the global generator plays no part
    x, y = collect(batches)
    torch.manual_seed(2)
    again, labels = collect(batches)
    assert torch.equal(x, again)
    assert torch.equal(y, labels)
    other, _ = collect(data.batches(5, augment=augment, shuffle=shuffle, seed=4))
    assert torch.equal(x, other) == (not augment and not shuffle)


def test_two_passes_may_interleave() -> None:
    batches = replace(dataset(), augmentation=CropFlip(2)).batches(5, augment=True, shuffle=True)
    for (x, _), (again, _) in zip(batches, batches, strict=True):
        assert torch.equal(x, again)


def test_augmentation_depends_on_the_image_alone() -> None:
    data = replace(dataset(), augmentation=CropFlip(2))
    x, _ = collect(data.batches(5, augment=True, seed=7))
    in_threes, _ = collect(data.batches(3, augment=True, seed=7))
    shuffled, _ = collect(data.batches(4, augment=True, seed=7, shuffle=True))
    plain, _ = collect(data.batches(4, seed=7, shuffle=True))
    order = [int((collect(data.batches(4))[0] == image).flatten(1).all(1).nonzero()[0]) for image in plain]
    assert torch.equal(x, in_threes)
    assert torch.equal(x[order], shuffled)


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_refuses_sizes(size: Any) -> None:
    with pytest.raises(RecoupError, match=f"toy: batches of {size!r} images: it must be an integer of 1 or more"):
        dataset().batches(size)


def test_refuses_augmentation_it_does_not_know() -> None:
    with pytest.raises(RecoupError, match=r"toy: it has no augmentation; .*CropFlip"):
        dataset().batches(4, augment=True)
