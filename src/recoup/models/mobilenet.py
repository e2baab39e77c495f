"""MobileNet-v1 for 32 x 32 images: depthwise separable convolutions (Howard et al. 2017), strides as is usual on CIFAR.

Every convolution but the first reads the output of a ReLU, so its inputs are unsigned, as the NB-SMT datapath asks;
MobileNet-v2's linear bottlenecks are signed. Depthwise layers have nothing to share and run with one thread.

Shapes: x_NCHW images, H and W at least 16; logits_NK.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.models.blocks import GROUPS, Norm, check_sizes, initialize_, unit

# Output channels and stride of each depthwise separable convolution, at width 1.
PLAN = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


class MobileNet(nn.Module):
    """``features``: one 3 x 3 convolution, then depthwise 3 x 3 and pointwise 1 x 1 in turn; ``classifier``."""

    def __init__(self, num_classes: int, norm: Norm, in_channels: int, width: float) -> None:
        super().__init__()
        channels = _scaled(32, width)
        layers = unit(in_channels, channels, norm)
        for full_width, stride in PLAN:
            outputs = _scaled(full_width, width)
            layers += unit(channels, channels, norm, stride=stride, groups=channels)
            layers += unit(channels, outputs, norm, kernel=1)
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        initialize_(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x_NCHW), 1).flatten(1))


def _scaled(channels: int, width: float) -> int:
    """``channels * width`` to the nearest multiple of 8, at least 8: whole groups, and whole threads of NB-SMT."""
    return max(GROUPS, round(channels * width / GROUPS) * GROUPS)


def mobilenet_v1(num_classes: int = 10, norm: Norm = "batch", *, in_channels: int = 3, width: float = 1.0) -> MobileNet:
    """MobileNet-v1 for 32 x 32 images: 3.2 M parameters at width 1.

    Args:
        num_classes: the logits an image gets.
        norm: ``"batch"``, ``"group"`` (8 groups), or ``"none"``: convolutions with a bias.
        in_channels: channels of the images.
        width: the paper's width multiplier, above 0 and at most 4; channels are rounded to multiples of 8.

    Raises:
        RecoupError: a size below 1, another ``norm``, or a width out of range.

    >>> import torch
    >>> mobilenet_v1(width=0.25)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    check_sizes("mobilenet_v1", num_classes=num_classes, in_channels=in_channels)
    if not 0 < width <= 4:
        raise RecoupError(f"mobilenet_v1(width={width!r}): width must be above 0 and at most 4")
    return MobileNet(num_classes, norm, in_channels, width)
