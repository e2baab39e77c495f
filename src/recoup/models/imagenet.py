"""ImageNet residual networks with torchvision's exact parameter and buffer names, so that its checkpoints load.

torchvision itself is never needed. ResNet-50 is "v1.5", as torchvision's: the stride sits on the 3 x 3 convolution.

Shapes: x_NCHW images, C = 3 by default and H = W = 224; logits_NK.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from recoup.models.blocks import check_sizes


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and the shortcut."""

    expansion = 1

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _convolution(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _downsample(inputs, channels, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        identity = x_NCHW if self.downsample is None else self.downsample(x_NCHW)
        inner = F.relu(self.bn1(self.conv1(x_NCHW)))
        return F.relu(self.bn2(self.conv2(inner)) + identity)


class Bottleneck(nn.Module):
    """1 x 1 to a quarter of the channels, 3 x 3, 1 x 1 back, and the shortcut."""

    expansion = 4

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = channels * self.expansion
        self.conv1 = _convolution(inputs, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _convolution(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = _convolution(channels, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _downsample(inputs, outputs, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        identity = x_NCHW if self.downsample is None else self.downsample(x_NCHW)
        inner = F.relu(self.bn1(self.conv1(x_NCHW)))
        inner = F.relu(self.bn2(self.conv2(inner)))
        return F.relu(self.bn3(self.conv3(inner)) + identity)


class ImageNetResNet(nn.Module):
    """A 7 x 7 convolution, max pooling, four stages of blocks, global average pooling and a linear layer."""

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, 64, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        wide = block.expansion
        self.layer1 = _stage(block, depths[0], 64, 64, 1)
        self.layer2 = _stage(block, depths[1], 64 * wide, 128, 2)
        self.layer3 = _stage(block, depths[2], 128 * wide, 256, 2)
        self.layer4 = _stage(block, depths[3], 256 * wide, 512, 2)
        self.fc = nn.Linear(512 * wide, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # torchvision's initialization, so that training recipes carry over
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = self.maxpool(F.relu(self.bn1(self.conv1(x_NCHW))))
        x_NCHW = self.layer4(self.layer3(self.layer2(self.layer1(x_NCHW))))
        return self.fc(F.adaptive_avg_pool2d(x_NCHW, 1).flatten(1))


def _stage(block: type[BasicBlock | Bottleneck], depth: int, inputs: int, channels: int, stride: int) -> nn.Sequential:
    rest = [block(channels * block.expansion, channels, 1) for _ in range(depth - 1)]
    return nn.Sequential(block(inputs, channels, stride), *rest)


def resnet18(num_classes: int = 1000, *, in_channels: int = 3) -> ImageNetResNet:
    """ResNet-18 for 224 x 224 images: 11,689,512 parameters, torchvision's names.

    :func:`resnet34` and :func:`resnet50` take the same arguments.

    Args:
        num_classes: the logits an image gets.
        in_channels: channels of the images.

    Raises:
        RecoupError: a size below 1.

    >>> len(resnet18().state_dict())
    122
    """
    check_sizes("resnet18", num_classes=num_classes, in_channels=in_channels)
    return ImageNetResNet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels)


def resnet34(num_classes: int = 1000, *, in_channels: int = 3) -> ImageNetResNet:
    """ResNet-34 for 224 x 224 images: 21,797,672 parameters; arguments as :func:`resnet18`."""
    check_sizes("resnet34", num_classes=num_classes, in_channels=in_channels)
    return ImageNetResNet(BasicBlock, (3, 4, 6, 3), num_classes, in_channels)


def resnet50(num_classes: int = 1000, *, in_channels: int = 3) -> ImageNetResNet:
    """ResNet-50 for 224 x 224 images: 25,557,032 parameters; arguments as :func:`resnet18`."""
    check_sizes("resnet50", num_classes=num_classes, in_channels=in_channels)
    return ImageNetResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels)
