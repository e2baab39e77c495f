"""CropFlip against a crop written out by hand; the two views against PIL and torchvision's arithmetic."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recoup.data import CenterCrop, CropFlip, ResizedCrop
from recoup.errors import RecoupError

from .conftest import noise


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    padding=st.integers(0, 4),
    flip=st.booleans(),
    seed=st.integers(0),
)
def test_crop_flip_by_hand(height: int, width: int, padding: int, flip: bool, seed: int) -> None:
    x = torch.from_numpy(noise(6, 2, height, width))
    augment = CropFlip(padding, flip)
    draws = augment.draw(6, torch.Generator().manual_seed(seed % 2**63))
    expected = torch.zeros_like(x)
    for n, (top, left, mirror) in enumerate(draws.tolist()):
        for i in range(height):
            for j in range(width):
                source = width - 1 - j if mirror else j
                row, column = top + i - padding, left + source - padding
                if 0 <= row < height and 0 <= column < width:
                    expected[n, :, i, j] = x[n, :, row, column]
    assert torch.equal(augment.apply(x, draws), expected)
    assert flip or not draws[:, 2].any()


def test_crop_flip_draws_all_there_is() -> None:
    draws = CropFlip(4).draw(4000, torch.Generator().manual_seed(0))
    counts = [column.bincount() for column in draws.unbind(1)]
    assert [len(count) for count in counts] == [9, 9, 2]
    # Nine equally likely corners, 4,000 draws: 444 expected, six standard deviations are 120.
    assert all(324 < int(count) < 564 for column in counts[:2] for count in column)
    assert 1800 < int(counts[2][1]) < 2200


def test_padding_is_black_before_normalization() -> None:
    x = torch.full((64, 3, 32, 32), 255, dtype=torch.uint8)
    augmented = CropFlip(4).apply(x, CropFlip(4).draw(64, torch.Generator().manual_seed(0)))
    assert set(augmented.unique().tolist()) == {0, 255}


@pytest.mark.parametrize(("width", "height"), [(300, 400), (400, 300), (256, 256), (257, 999), (31, 50)])
def test_center_crop_as_torchvision_computes_it(width: int, height: int) -> None:
    picture = Image.fromarray(noise(1, height, width, 3)[0])
    short, long = min(width, height), max(width, height)
    sides = (256, int(256 * long / short)) if width <= height else (int(256 * long / short), 256)
    resized = picture.resize(sides, Image.Resampling.BILINEAR)
    left, top = int(round((sides[0] - 224) / 2.0)), int(round((sides[1] - 224) / 2.0))  # noqa: RUF046 torchvision's own
    expected = resized.crop((left, top, left + 224, top + 224))
    assert np.array_equal(np.asarray(CenterCrop().view(picture)), np.asarray(expected))


def test_center_crop_leaves_a_picture_of_its_size() -> None:
    pixels = noise(1, 32, 32, 3)[0]
    assert np.array_equal(np.asarray(CenterCrop(32, 32).view(Image.fromarray(pixels))), pixels)


@pytest.mark.parametrize(("width", "height"), [(60, 40), (5, 300), (300, 5), (1, 1)])
def test_resized_crop_stays_inside(width: int, height: int) -> None:
    augment = ResizedCrop(16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        left, top, right, bottom = augment._box(width, height, generator)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
    picture = Image.fromarray(noise(1, height, width, 3)[0])
    draws = augment.draw(4, generator)
    views = [np.asarray(augment.view(picture, draw)) for draw in draws]
    assert all(view.shape == (16, 16, 3) for view in views)
    assert np.array_equal(views[0], np.asarray(augment.view(picture, draws[0])))


def test_resized_crop_covers_the_area_it_should() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [ResizedCrop()._box(500, 500, generator) for _ in range(400)]
    areas = torch.tensor([(right - left) * (bottom - top) / 500**2 for left, top, right, bottom in parts])
    assert 0.07 < areas.min() < 0.2
    assert 0.9 < areas.max() <= 1
    assert 0.4 < areas.mean() < 0.6


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CropFlip(-1), r"CropFlip\(padding=-1\): padding must be 0 or more"),
        (lambda: ResizedCrop(0), r"ResizedCrop\(size=0\)"),
        (lambda: ResizedCrop(area=(0.5, 0.1)), "ascending range within 0 to 1"),
        (lambda: ResizedCrop(area=(0.0, 1.0)), "within 0 to 1"),
        (lambda: ResizedCrop(ratio=(2.0, 1.0)), "ascending range above 0"),
        (lambda: CenterCrop(100, 224), r"CenterCrop\(resize=100, size=224\): size must be 1 or more and at most"),
        (lambda: CenterCrop(100, 0), "size must be 1 or more"),
    ],
)
def test_refuses(build: Any, message: str) -> None:
    with pytest.raises(RecoupError, match=message):
        build()
