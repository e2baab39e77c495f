"""The narrow accumulator on the CPU."""

import torch
from torch import Tensor

from recoup.lba import reference
from recoup.lba.config import LBA
from recoup.lba.geometry import Geometry


def matmul(a: Tensor, b: Tensor, config: LBA, seed: int = 0) -> Tensor:
    """a [B, M, K] b [B, K, N] -> [B, M, N]."""
    size = a.shape[1] * b.shape[2]
    return torch.stack([reference.matmul(a[i], b[i], config, seed, i * size) for i in range(len(a))])


def convolution(x: Tensor, weight: Tensor, geometry: Geometry, config: LBA, seed: int = 0) -> Tensor:
    columns = geometry.columns(x)
    w = weight.view(geometry.groups, weight.shape[0] // geometry.groups, -1)
    y = matmul(w, columns, config, seed)
    return y.view(weight.shape[0], x.shape[0], *geometry.size(x)).transpose(0, 1)


def gradients(a: Tensor, b: Tensor, grad: Tensor, config: LBA, seed: int = 0) -> tuple[Tensor, Tensor]:
    pairs = [reference.gradients(a[i], b[i], grad[i], config, seed, i * grad[i].numel()) for i in range(len(a))]
    return torch.stack([p[0] for p in pairs]).float(), torch.stack([p[1] for p in pairs]).float()


def convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, config: LBA, seed: int = 0
) -> tuple[Tensor, Tensor]:
    G, O = geometry.groups, weight.shape[0]
    g = grad.transpose(0, 1).reshape(G, O // G, -1)
    gw, gc = gradients(weight.view(G, O // G, -1), geometry.columns(x), g, config, seed)
    return geometry.image(gc, x.shape), gw.view(weight.shape)
