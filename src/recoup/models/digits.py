"""The network of `recoup demo`: small enough to train in seconds, deep enough to feel a cheap datapath.

Shapes: x_NCHW images, C = 1 and H = W = 8; logits_NK.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from recoup.models.blocks import Norm, check_sizes, initialize_, unit

CHANNELS = (16, 32, 32, 64)  # multiples of 8: whole groups, and whole threads of NB-SMT with two or four


class DigitsNet(nn.Module):
    """``features``: four 3 x 3 convolutions, max pooling after the second; global average pooling; ``classifier``."""

    def __init__(self, num_classes: int, norm: Norm, in_channels: int) -> None:
        super().__init__()
        first, second, third, fourth = CHANNELS
        self.features = nn.Sequential(
            *unit(in_channels, first, norm),
            *unit(first, second, norm),
            nn.MaxPool2d(2),
            *unit(second, third, norm),
            *unit(third, fourth, norm),
        )
        self.classifier = nn.Linear(fourth, num_classes)
        initialize_(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x_NCHW), 1).flatten(1))


def digits_net(num_classes: int = 10, norm: Norm = "batch", *, in_channels: int = 1) -> DigitsNet:
    """A four-layer convolutional network for scikit-learn's 8 x 8 digits: 33,338 parameters.

    Args:
        num_classes: the logits an image gets.
        norm: ``"batch"``, ``"group"`` (8 groups), or ``"none"``: convolutions with a bias.
        in_channels: channels of the images.

    Raises:
        RecoupError: a size below 1, or another ``norm``.

    >>> import torch
    >>> digits_net()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    check_sizes("digits_net", num_classes=num_classes, in_channels=in_channels)
    return DigitsNet(num_classes, norm, in_channels)
