"""The CIFAR residual networks of He et al. (2015, section 4.2): three stages of 16, 32 and 64 channels, 6n + 2 layers.

Shortcuts are the paper's option A: where the shape changes, every second pixel and zeros for the new channels, so the
shortcut has no parameters. Names are those of akamaster/pytorch_resnet_cifar10, whose checkpoints load unchanged.

Shapes: x_NCHW images, C = 3 by default and H = W = 32; logits_NK.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.models.blocks import Norm, check_sizes, convolution, initialize_, normalization


class Shortcut(nn.Module):
    """Option A: keep every ``stride``-th pixel and add the missing channels as zeros, half before and half after."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.pad(x_NCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class Block(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)), both convolutions 3 x 3."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, outputs, norm, stride=stride)
        self.bn1 = normalization(norm, outputs)
        self.conv2 = convolution(outputs, outputs, norm)
        self.bn2 = normalization(norm, outputs)
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else Shortcut(inputs, outputs, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x_NCHW)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x_NCHW))


class CifarResNet(nn.Module):
    """A convolution, three stages of ``depth`` blocks, global average pooling and a linear layer."""

    def __init__(self, depth: int, num_classes: int, norm: Norm, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, width, norm)
        self.bn1 = normalization(norm, width)
        self.layer1 = _stage(depth, width, width, 1, norm)
        self.layer2 = _stage(depth, width, 2 * width, 2, norm)
        self.layer3 = _stage(depth, 2 * width, 4 * width, 2, norm)
        self.linear = nn.Linear(4 * width, num_classes)
        initialize_(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = F.relu(self.bn1(self.conv1(x_NCHW)))
        x_NCHW = self.layer3(self.layer2(self.layer1(x_NCHW)))
        return self.linear(F.adaptive_avg_pool2d(x_NCHW, 1).flatten(1))


def _stage(depth: int, inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Sequential:
    rest = [Block(outputs, outputs, 1, norm) for _ in range(depth - 1)]
    return nn.Sequential(Block(inputs, outputs, stride, norm), *rest)


def _build(name: str, depth: int, num_classes: int, norm: Norm, *, in_channels: int, width: int) -> CifarResNet:
    check_sizes(name, num_classes=num_classes, in_channels=in_channels, width=width)
    if norm == "none":
        raise RecoupError(f'{name}(norm="none"): a residual network here needs "batch" or "group"')
    return CifarResNet(depth, num_classes, norm, in_channels, width)


def resnet20(num_classes: int = 10, norm: Norm = "batch", *, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-20 for 32 x 32 images: 269,722 parameters, 41 million MACs an image. He et al. 2015, section 4.2.

    :func:`resnet32`, :func:`resnet44`, :func:`resnet56` and :func:`resnet110` take the same arguments.

    Args:
        num_classes: the logits an image gets.
        norm: ``"batch"``, or ``"group"`` (8 groups) for training at batch one.
        in_channels: channels of the images, 1 for grayscale.
        width: channels of the first stage; the next two have twice and four times as many.

    Raises:
        RecoupError: a size below 1, another ``norm``, or a ``width`` that 8 groups do not divide.

    >>> import torch
    >>> resnet20(num_classes=100)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 100])
    """
    return _build("resnet20", 3, num_classes, norm, in_channels=in_channels, width=width)


def resnet32(num_classes: int = 10, norm: Norm = "batch", *, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-32 for 32 x 32 images, 0.46 M parameters; arguments as :func:`resnet20`."""
    return _build("resnet32", 5, num_classes, norm, in_channels=in_channels, width=width)


def resnet44(num_classes: int = 10, norm: Norm = "batch", *, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-44 for 32 x 32 images, 0.66 M parameters; arguments as :func:`resnet20`."""
    return _build("resnet44", 7, num_classes, norm, in_channels=in_channels, width=width)


def resnet56(num_classes: int = 10, norm: Norm = "batch", *, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-56 for 32 x 32 images, 0.85 M parameters; arguments as :func:`resnet20`."""
    return _build("resnet56", 9, num_classes, norm, in_channels=in_channels, width=width)


def resnet110(num_classes: int = 10, norm: Norm = "batch", *, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-110 for 32 x 32 images, 1.7 M parameters; arguments as :func:`resnet20`."""
    return _build("resnet110", 18, num_classes, norm, in_channels=in_channels, width=width)
