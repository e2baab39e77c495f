"""What every network here shares: its normalization, its initialization, its checks."""

from typing import Literal, TypeVar

from torch import nn

from recoup.errors import RecoupError

Norm = Literal["batch", "group", "none"]
M = TypeVar("M", bound=nn.Module)

# Two channels a group at 16 channels; the count stays while the channels double. It works at batch one.
GROUPS = 8


def normalization(norm: Norm, channels: int) -> nn.Module:
    """The normalization over ``channels``: batch norm, group norm with 8 groups, or the identity.

    Raises:
        RecoupError: ``norm`` is none of these, or ``channels`` cannot be split into 8 groups.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        if channels % GROUPS:
            raise RecoupError(f'norm="group": {channels} channels cannot be split into {GROUPS} groups')
        return nn.GroupNorm(GROUPS, channels)
    if norm == "none":
        return nn.Identity()
    raise RecoupError(f'norm={norm!r}: norm must be "batch", "group" or "none"')


def convolution(
    inputs: int, outputs: int, norm: Norm, *, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """A convolution that keeps the image size at stride 1; it has a bias only where no normalization follows."""
    padding = kernel // 2
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=norm == "none")


def unit(
    inputs: int, outputs: int, norm: Norm, *, kernel: int = 3, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Convolution, normalization and ReLU, as a list to build an ``nn.Sequential`` from."""
    layers: list[nn.Module] = [convolution(inputs, outputs, norm, kernel=kernel, stride=stride, groups=groups)]
    if norm != "none":
        layers.append(normalization(norm, outputs))
    layers.append(nn.ReLU())
    return layers


def initialize_(model: M) -> M:
    """Kaiming-normal weights (fan in, ReLU) for convolutions and linear layers, zero biases; normalizations keep 1, 0.

    Fan in, because torch counts the fan out of a depthwise convolution over all its groups and makes it far too small.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu" if isinstance(module, nn.Conv2d) else "linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def check_sizes(factory: str, **sizes: int) -> None:
    """Refuse a size that is not a positive integer: ``resnet20(num_classes=0): num_classes must be 1 or more``."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size < 1 << 31:
            raise RecoupError(f"{factory}({name}={size!r}): {name} must be an integer of 1 or more")
