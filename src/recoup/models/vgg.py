"""VGG for 32 x 32 images: Simonyan & Zisserman's convolution plans with one linear layer, as is usual on CIFAR.

Shapes: x_NCHW images, H and W at least 32; logits_NK.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from recoup.models.blocks import Norm, check_sizes, initialize_, unit

# Output channels of each convolution; "pool" halves the image.
PLANS: dict[str, tuple[int | str, ...]] = {
    "vgg11": (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"),
    "vgg13": (64, 64, "pool", 128, 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"),
    "vgg16": (64, 64, "pool", 128, 128, "pool", *(256,) * 3, "pool", *(512,) * 3, "pool", *(512,) * 3, "pool"),
}


class VGG(nn.Module):
    """``features`` (3 x 3 convolutions and max pooling), global average pooling, ``classifier``."""

    def __init__(self, plan: tuple[int | str, ...], num_classes: int, norm: Norm, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for step in plan:
            if isinstance(step, int):
                layers += unit(channels, step, norm)
                channels = step
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        initialize_(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x_NCHW), 1).flatten(1))


def _build(name: str, num_classes: int, norm: Norm, in_channels: int) -> VGG:
    check_sizes(name, num_classes=num_classes, in_channels=in_channels)
    return VGG(PLANS[name], num_classes, norm, in_channels)


def vgg11(num_classes: int = 10, norm: Norm = "batch", *, in_channels: int = 3) -> VGG:
    """VGG-11 for 32 x 32 images: 9.2 M parameters. :func:`vgg13` and :func:`vgg16` take the same arguments.

    Args:
        num_classes: the logits an image gets.
        norm: ``"batch"``, ``"group"`` (8 groups), or ``"none"``: convolutions with a bias, as in the paper.
        in_channels: channels of the images.

    Raises:
        RecoupError: a size below 1, or another ``norm``.

    >>> import torch
    >>> vgg11()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    return _build("vgg11", num_classes, norm, in_channels)


def vgg13(num_classes: int = 10, norm: Norm = "batch", *, in_channels: int = 3) -> VGG:
    """VGG-13 for 32 x 32 images: 9.4 M parameters; arguments as :func:`vgg11`."""
    return _build("vgg13", num_classes, norm, in_channels)


def vgg16(num_classes: int = 10, norm: Norm = "batch", *, in_channels: int = 3) -> VGG:
    """VGG-16 for 32 x 32 images: 14.7 M parameters; arguments as :func:`vgg11`."""
    return _build("vgg16", num_classes, norm, in_channels)
