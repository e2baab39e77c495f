"""The layout that the passes take: [N, C, ...] as contiguous [N, C, P], in the same order of a channel's elements."""

import math

import torch
from torch import Tensor

from recoup.lightnorm.config import LightNorm

FEW_PLACES = 16  # below, samples become places, so that loops over places are long


def flattened(x: Tensor, config: LightNorm) -> Tensor:
    """[N, C, ...] as contiguous [N, C, P]; as [1, C, N P] where P is small.

    Blocks of places end with their sample, so that with them samples are never joined.
    """
    x = x.detach().flatten(2) if x.dim() > 2 else x.detach().unsqueeze(2)
    shape = flattened_shape(x.shape, config)
    return (x if tuple(x.shape) == shape else x.transpose(0, 1).reshape(shape)).contiguous()


def flattened_shape(shape: torch.Size, config: LightNorm) -> tuple[int, int, int]:
    """The shape of `flattened`."""
    samples, channels, places = shape[0], shape[1], math.prod(shape[2:])
    joined = places < FEW_PLACES and samples > 1 and not config.blocks_of_places
    return (1, channels, samples * places) if joined else (samples, channels, places)


def unflattened(x: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `flattened`."""
    if x.shape[0] == 1 and shape[0] != 1:
        places = x.shape[2] // shape[0]
        x = x.view(shape[1], shape[0], places).transpose(0, 1)
    return x.reshape(shape)
