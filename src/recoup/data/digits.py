"""scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels that come with the package."""

import numpy as np
import torch
from torch import Tensor

from recoup.data.augmentation import CropFlip
from recoup.data.dataset import Dataset
from recoup.data.places import Pick, choose_split

SPLITS = ("train", "test")
HELD_OUT = 3  # every third image of a class is a test image


def read(split: str, pick: Pick) -> Dataset:
    """The digits (Alpaydin & Kaynak, UCI 1998): 1,201 images to train on, 596 to test on.

    scikit-learn has no split of its own. Ours is fixed and needs no random numbers: of each class, in the package's
    order, the third, sixth, ninth ... image is a test image. The 17 gray levels 0 .. 16 become the bytes
    ``round(255 v / 16)``. Augmentation moves an image by at most one pixel and never mirrors it.

    Raises:
        RecoupError: another split.
    """
    from sklearn.datasets import load_digits

    choose_split("digits", split, SPLITS)
    levels, labels = (torch.from_numpy(np.asarray(part)) for part in load_digits(return_X_y=True))
    labels = labels.long()
    held_out = _held_out(labels)
    chosen = (held_out if split == "test" else ~held_out).nonzero()[:, 0]
    chosen = chosen[pick(labels[chosen])]
    return Dataset(
        name="digits",
        split=split,
        images=(levels[chosen] * 255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8),
        labels=labels[chosen],
        classes=tuple(str(digit) for digit in range(10)),
        mean=(0.305,),
        std=(0.376,),
        augmentation=CropFlip(padding=1, flip=False),
    )


def _held_out(labels: Tensor) -> Tensor:
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        held_out[(labels == digit).nonzero()[HELD_OUT - 1 :: HELD_OUT]] = True
    return held_out
