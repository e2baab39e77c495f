"""The digits and their fixed split."""

import numpy as np
import pytest
import torch

import recoup.data
from recoup.errors import RecoupError


def test_the_splits_are_fixed_stratified_and_complete() -> None:
    from sklearn.datasets import load_digits

    train, test = recoup.data.load("digits", "train"), recoup.data.load("digits")
    assert (len(train), len(test)) == (1201, 596)
    assert test.labels.bincount().tolist() == [59, 60, 59, 61, 60, 60, 60, 59, 58, 60]
    assert isinstance(train.images, torch.Tensor)
    assert isinstance(test.images, torch.Tensor)
    levels, _ = load_digits(return_X_y=True)
    ours = torch.cat([train.images, test.images]).flatten(1)
    theirs = torch.from_numpy(np.rint(np.asarray(levels) * 255 / 16).astype(np.uint8))
    assert sorted(ours.tolist()) == sorted(theirs.tolist())
    assert torch.equal(test.images[0].flatten(), theirs[20])  # the third zero comes first


def test_mean_and_deviation_are_those_of_the_training_images() -> None:
    train = recoup.data.load("digits", "train")
    x, _ = next(iter(train.batches(len(train))))
    assert abs(float(x.mean())) < 2e-3  # the constants have three digits
    assert abs(float(x.std()) - 1) < 2e-3


def test_augmentation_moves_by_a_pixel() -> None:
    train = recoup.data.load("digits", "train", limit=50)
    plain, moved = (next(iter(train.batches(50, augment=augment)))[0] for augment in (False, True))
    assert not torch.equal(plain, moved)


def test_refuses_other_splits() -> None:
    with pytest.raises(RecoupError, match=r"digits: no split 'dev'; there is train, test"):
        recoup.data.load("digits", "dev")
