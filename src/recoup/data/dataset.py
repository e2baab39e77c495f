"""A labelled set of images, and its batches, which can be passed over again and again.

Shapes: x_BCHW normalized images, y_B labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from recoup.data.augmentation import Augmentation, CropFlip, ResizedCrop
from recoup.data.pictures import Pictures
from recoup.data.places import TooFewError
from recoup.errors import RecoupError
from recoup.network.checks import instance

# What networks trained on natural images expect, the CIFAR-10 checkpoints of akamaster/pytorch_resnet_cifar10 included.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A labelled set of images, and how a network wants to see them.

    Make one of your own tensors, or change one with ``dataclasses.replace``.

    Args:
        name: what it is, as in the results: ``"cifar10"``.
        split: which part: ``"test"``.
        images: uint8 [N, C, H, W], or :class:`Pictures` that are decoded batch by batch.
        labels: int64 [N], each in ``0 .. len(classes) - 1``.
        classes: their names.
        mean, std: one value a channel; a network sees ``(byte / 255 - mean) / std``.
        augmentation: what ``batches(augment=True)`` does; None where nothing is known to keep the label.

    Raises:
        RecoupError: no images, shapes or types that do not fit, a label out of range.

    >>> images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    >>> Dataset("blank", "test", images, torch.tensor([0, 1, 0, 1]), ("a", "b"), mean=(0.5,), std=(0.5,))
    Dataset(blank, test: 4 images of 1 x 8 x 8, 2 classes)
    """

    name: str
    split: str
    images: Tensor | Pictures
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        fault = self._fault()
        if fault:
            raise RecoupError(f"Dataset({self.name}, {self.split}): {fault}")

    def _fault(self) -> str | None:
        if isinstance(self.images, Tensor):
            if self.images.dtype != torch.uint8 or self.images.dim() != 4:
                return f"images must be uint8 [N, C, H, W], not {self.images.dtype} {list(self.images.shape)}"
            if isinstance(self.augmentation, ResizedCrop):
                return "ResizedCrop cuts encoded pictures; images in a tensor take CropFlip"
        if not isinstance(self.labels, Tensor):
            return f"labels must be a tensor, not {type(self.labels).__name__}"
        if not hasattr(self.images, "__len__"):
            return f"images must be a tensor or a sequence of pictures, not {type(self.images).__name__}"
        if self.labels.dtype != torch.int64 or self.labels.shape != (len(self.images),):
            return f"labels must be int64 [{len(self.images)}], not {self.labels.dtype} {list(self.labels.shape)}"
        if len(self.labels) == 0:
            return "there are no images"
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            return (
                f"labels lie in {low} .. {high}, but there are {len(self.classes)} classes; is this split unlabelled?"
            )
        channels = self.images.shape[1]
        if not len(self.mean) == len(self.std) == channels or not all(value > 0 for value in self.std):
            return f"mean {self.mean} and std {self.std} must have {channels} values each, std above 0"
        return None

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shape = " x ".join(str(side) for side in self.images.shape[1:])
        return f"Dataset({self.name}, {self.split}: {len(self):,} images of {shape}, {len(self.classes)} classes)"

    def take(self, positions: Tensor) -> Dataset:
        """Those images, in that order. ``positions`` is int64 [M]."""
        images = self.images[positions] if isinstance(self.images, Tensor) else self.images.select(positions)
        return replace(self, images=images, labels=self.labels[positions])

    def subset(self, n: int, seed: int = 0) -> Dataset:
        """``n`` different images at random, whatever their class.

        The same seed gives the same images in the same order, and a smaller subset is the beginning of a larger one.

        Raises:
            RecoupError: ``n`` below 1 or above ``len(self)``.
        """
        check_count(f"{self.name}, {self.split}: subset", n, len(self))
        return self.take(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n])

    def batches(
        self,
        size: int,
        *,
        augment: bool = False,
        seed: int = 0,
        channels_last: bool = False,
        shuffle: bool = False,
        drop_last: bool = False,
    ) -> Batches:
        """Batches of (x, y) that can be passed over many times, each time the same; see :class:`Batches`."""
        return Batches(
            self, size, augment=augment, seed=seed, channels_last=channels_last, shuffle=shuffle, drop_last=drop_last
        )


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
        instance(self.dataset, Dataset, "Batches", "dataset", "recoup.data.load('digits')")
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
        for positions_B in order_N.split(self.size)[: len(self)]:
            yield self._batch(positions_B, draws)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One batch of a pass, for those who do not begin at the first; what was drawn for the pass is then kept."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.dataset.name}: batch {index} of {len(self)}")
        order_N, draws = self._drawn
        return self._batch(order_N[index * self.size : (index + 1) * self.size], draws)

    def _batch(self, positions_B: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        mean_C11 = torch.tensor(self.dataset.mean)[:, None, None]
        std_C11 = torch.tensor(self.dataset.std)[:, None, None]
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        bytes_BCHW = self._images(positions_B, None if draws is None else draws[positions_B])
        # The same three float32 operations as torchvision's ToTensor and Normalize: published accuracies hold.
        x_BCHW = bytes_BCHW.to(torch.float32, memory_format=layout).div_(255).sub_(mean_C11).div_(std_C11)
        return x_BCHW, self.dataset.labels[positions_B]

    @cached_property
    def _drawn(self) -> tuple[Tensor, Tensor | None]:
        return self._random()

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


def check_count(what: str, n: int, available: int, samples: str = "images") -> None:
    """Refuse a number of images that is not an integer from 1 to what there is.

    Raises:
        RecoupError: such a number.
        TooFewError: more than there are.
    """
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= available:
        told = f"{what} of {n!r} {samples}: it must be an integer from 1 to {available:,}"
        raise TooFewError(told, available=available) if type(n) is int and n > available else RecoupError(told)
