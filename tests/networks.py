"""Small networks the tests share."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block with a strided 1x1 shortcut, so that shapes, strides and kernels vary."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=True)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.dropout(self.relu(self.bn2(self.conv2(y)) + self.shortcut(x)))


class SmallNet(nn.Module):
    """First convolution, two residual blocks, classifier: 10 classes from [N, 3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block1 = Block(8, 12, 2)
        self.block2 = Block(12, 20, 1)
        self.classifier = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block2(self.block1(torch.relu(self.stem(x))))
        return self.classifier(y.mean((2, 3)))


def small_net(seed: int = 0) -> SmallNet:
    """A SmallNet in eval mode with random weights and batch statistics that mean something."""
    torch.manual_seed(seed)
    model = SmallNet()
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(32, 3, 8, 8))
    return model.eval()


def images(count: int, seed: int = 0) -> Tensor:
    """Random images [count, 3, 8, 8]."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def batches_of(count: int, size: int) -> list[Tensor]:
    """Batches of random images."""
    return list(images(count * size).split(size))


CONVOLUTIONS = ["block1.conv1", "block1.conv2", "block1.shortcut", "block2.conv1", "block2.conv2", "block2.shortcut"]
"""The layers of a SmallNet that are calibrated by default."""
