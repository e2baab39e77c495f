"""How a training image is varied, and how a large picture becomes a square one. All on unsigned bytes.

Bytes, not normalized values: black pixels that a crop brings in are then black to the network too, as in the training
of the usual CIFAR networks. Padding with zeros *after* normalization is gray, and gives batch norm other statistics.

Shapes: x_NCHW uint8 images; draws_N... one row of random numbers an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from recoup.errors import RecoupError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class CropFlip:
    """Pad with black, crop at random to the original size, and mirror left to right every second time.

    Args:
        padding: black pixels added on every side, 0 or more; the crop moves the image by at most this much.
        flip: whether to mirror with probability 1/2; wrong for digits and letters.

    Raises:
        RecoupError: a padding below 0.

    >>> augment = CropFlip(padding=4)
    >>> x = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    >>> augment.apply(x, augment.draw(2, torch.Generator().manual_seed(0))).shape
    torch.Size([2, 3, 32, 32])
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise RecoupError(f"CropFlip(padding={self.padding}): padding must be 0 or more")

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Random numbers for ``count`` images: int64 [count, 3], the crop's row and column and whether to mirror."""
        corner_N2 = torch.randint(2 * self.padding + 1, (count, 2), generator=generator)
        mirror_N1 = torch.randint(2, (count, 1), generator=generator) * int(self.flip)
        return torch.cat([corner_N2, mirror_N1], dim=1)

    def apply(self, x_NCHW: Tensor, draws_N3: Tensor) -> Tensor:
        """The images as those draws vary them: same shape and dtype."""
        count, channels, height, width = x_NCHW.shape
        top_N1, left_N1, mirror_N1 = draws_N3[:, :1], draws_N3[:, 1:2], draws_N3[:, 2:] == 1
        columns_W = torch.arange(width)
        rows_NH = top_N1 + torch.arange(height)
        columns_NW = left_N1 + torch.where(mirror_N1, columns_W.flip(0), columns_W)
        padded = F.pad(x_NCHW, (self.padding,) * 4)
        images = torch.arange(count)[:, None, None, None]
        return padded[
            images, torch.arange(channels)[:, None, None], rows_NH[:, None, :, None], columns_NW[:, None, None]
        ]


@dataclass(frozen=True)
class ResizedCrop:
    """A random part of a picture, resized to a square, and mirrored every second time: ImageNet's usual training view.

    Args:
        size: pixels a side of the result.
        area: least and greatest part of the picture's area, within 0 to 1.
        ratio: least and greatest width over height of the part, drawn evenly on a logarithmic scale.
        flip: whether to mirror with probability 1/2.

    Raises:
        RecoupError: a size below 1, or a range out of order.
    """

    size: int = 224
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise RecoupError(f"ResizedCrop(size={self.size}): size must be 1 or more")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise RecoupError(f"ResizedCrop(area={self.area}): area must be an ascending range within 0 to 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise RecoupError(f"ResizedCrop(ratio={self.ratio}): ratio must be an ascending range above 0")

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Random numbers for ``count`` images: int64 [count, 1], the seed of each image's own generator.

        A seed rather than the crop itself, because how often a crop is drawn again depends on the picture's size.
        """
        return torch.randint(1 << 62, (count, 1), generator=generator)

    def view(self, picture: Image, draw_1: Tensor) -> Image:
        """The square that this draw cuts out of the picture."""
        from PIL.Image import Resampling, Transpose

        generator = Generator().manual_seed(int(draw_1))
        part = picture.crop(self._box(picture.width, picture.height, generator))
        square = part.resize((self.size, self.size), Resampling.BILINEAR)
        if self.flip and torch.rand((), generator=generator) < 0.5:
            square = square.transpose(Transpose.FLIP_LEFT_RIGHT)
        return square

    def _box(self, width: int, height: int, generator: Generator) -> tuple[int, int, int, int]:
        for _ in range(10):
            first, second, across, down = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
            area = width * height * (self.area[0] + first * (self.area[1] - self.area[0]))
            low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
            ratio = math.exp(low + second * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
                return left, top, left + w, top + h
        # No such part fits a very long picture: take the middle, as near to the ratio as the picture allows.
        w = max(1, min(width, round(height * self.ratio[1])))
        h = max(1, min(height, round(width / self.ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


@dataclass(frozen=True)
class CenterCrop:
    """Resize the shorter side, then cut the middle square: ImageNet's usual test view.

    Bilinear and antialiased as PIL does it, sides and offsets rounded as torchvision does, so that published accuracies
    hold.

    Args:
        resize: pixels of the shorter side after resizing.
        size: pixels a side of the square, at most ``resize``.

    Raises:
        RecoupError: a size below 1 or above ``resize``.
    """

    resize: int = 256
    size: int = 224

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.resize:
            raise RecoupError(f"{self}: size must be 1 or more and at most resize")

    def view(self, picture: Image) -> Image:
        """The middle square of the picture."""
        from PIL.Image import Resampling

        width, height = picture.size
        short = min(width, height)
        if short != self.resize:
            width, height = (side * self.resize // short for side in (width, height))
            picture = picture.resize((width, height), Resampling.BILINEAR)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return picture.crop((left, top, left + self.size, top + self.size))


Augmentation = CropFlip | ResizedCrop
