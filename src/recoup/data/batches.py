"""Batches that can be passed over again and again.

Shapes: x_BCHW normalized images, y_B labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recoup.data.augmentation import CropFlip
from recoup.errors import RecoupError

if TYPE_CHECKING:
    from recoup.data.dataset import Dataset


@dataclass(frozen=True, eq=False)
class Batches:
    """The images of a data set as batches ``(x, y)``: x float32 [B, C, H, W] normalized, y int64 [B].

    Every pass gives the same batches, augmented or not, so that two passes show a network the same images. What happens
    to an image depends on ``seed`` and its place in the data set alone, not on ``size`` or ``shuffle``. For training,
    make one of these an epoch with the epoch as ``seed``.

    Args:
        dataset: where the images come from.
        size: images a batch; the last one holds what remains.
        augment: vary the images as ``dataset.augmentation`` says.
        seed: of the augmentation and the order.
        channels_last: give x in torch's channels-last memory format; its shape stays [B, C, H, W].
        shuffle: in random order, otherwise in the data set's.
        drop_last: leave out a last batch that is not full.

    Raises:
        RecoupError: ``size`` below 1, ``augment`` where the data set has no augmentation, no batch at all.

    >>> from recoup.data import load
    >>> batches = load("digits").batches(256)
    >>> [(tuple(x.shape), len(y)) for x, y in batches]
    [((256, 1, 8, 8), 256), ((256, 1, 8, 8), 256), ((84, 1, 8, 8), 84)]
    """

    dataset: Dataset
    size: int
    augment: bool = False
    seed: int = 0
    channels_last: bool = False
    shuffle: bool = False
    drop_last: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1:
            raise RecoupError(
                f"{self.dataset.name}: batches of {self.size!r} images: it must be an integer of 1 or more"
            )
        if self.augment and self.dataset.augmentation is None:
            raise RecoupError(
                f"{self.dataset.name}: it has no augmentation; "
                "dataclasses.replace(dataset, augmentation=CropFlip(...)) gives it one"
            )
        if len(self) == 0:
            raise RecoupError(
                f"{self.dataset.name}: {len(self.dataset)} images make no full batch of {self.size}; "
                "lower the size or leave out drop_last"
            )

    def __len__(self) -> int:
        """How many batches a pass gives."""
        full, rest = divmod(len(self.dataset), self.size)
        return full if self.drop_last or not rest else full + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order_N, draws = self._random()
        mean_C11 = torch.tensor(self.dataset.mean)[:, None, None]
        std_C11 = torch.tensor(self.dataset.std)[:, None, None]
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        for positions_B in order_N.split(self.size)[: len(self)]:
            bytes_BCHW = self._images(positions_B, None if draws is None else draws[positions_B])
            # The same three float32 operations as torchvision's ToTensor and Normalize: published accuracies hold.
            x_BCHW = bytes_BCHW.to(torch.float32, memory_format=layout).div_(255).sub_(mean_C11).div_(std_C11)
            yield x_BCHW, self.dataset.labels[positions_B]

    def _random(self) -> tuple[Tensor, Tensor | None]:
        """The order of a pass and each image's draws. Both are always drawn, so neither depends on the other's flag."""
        generator = torch.Generator().manual_seed(self.seed)
        count = len(self.dataset)
        order_N = torch.randperm(count, generator=generator)
        draws = None
        if self.augment and self.dataset.augmentation is not None:
            draws = self.dataset.augmentation.draw(count, generator)
        return order_N if self.shuffle else torch.arange(count), draws

    def _images(self, positions_B: Tensor, draws: Tensor | None) -> Tensor:
        images, augmentation = self.dataset.images, self.dataset.augmentation
        if not isinstance(images, Tensor):
            return images.images(positions_B, augmentation, draws)
        bytes_BCHW = images[positions_B]
        if draws is None or not isinstance(augmentation, CropFlip):  # Dataset refuses ResizedCrop on a tensor
            return bytes_BCHW
        return augmentation.apply(bytes_BCHW, draws)
