"""Range batch normalization of [N, C, P]: which passes take a tensor, and in what order they are tried.

    passes     for                                                               on
    emitted    float32, formats that truncate, values up to the largest one      the CPU
    general    every format, finite values                                       the CPU
    separate   everything, blocks of places and NaN among it                     the CPU and CUDA
    joined     the batch of a group of processes                                 the CPU and CUDA

The first two are fused: two passes over the activations, two over the gradient, with blocks of channels inside them.
What a tensor holds shows while it is read, so that passes that do not hold for its values say so, and the next ones
take it. The bits are the same whichever do.

Legend: n = N P; K chunks.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.separate import SeparatePasses, device_of

HALF = (torch.float16, torch.bfloat16)

Trained = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Evaluated = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


class Passes(Protocol):
    """One way to do it; None where it does not hold for the values that it meets."""

    def train(self, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Trained | None:
        """See `forward` below."""
        ...

    def infer(self, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float) -> Evaluated | None:
        """See `infer` below."""
        ...

    def backward(self, grad: Tensor, xhat: Tensor, r: Tensor, gamma: Tensor, indices: Tensor) -> Gradients | None:
        """See `backward` below."""
        ...


def passes_for(x: Tensor, config: LightNorm, chunks: int, group: Any = None) -> Iterator[Passes]:
    """The passes that may take x, the fastest first; the last ones take anything."""
    if group is not None:
        from recoup.lightnorm.joined import JoinedPasses

        yield JoinedPasses(device_of(x), config, group)
        return
    if x.device.type == "cpu" and x.numel() > 0 and not config.blocks_of_places:
        from recoup.lightnorm.fused import emitted, general

        found = emitted.plan(config, chunks, x.dtype, *x.shape)
        if found is not None:
            yield found
        yield general.general_passes(config, chunks, x.dtype, *x.shape)
    yield SeparatePasses(device_of(x), config)


def forward(x: Tensor, gamma: Tensor, beta: Tensor, config: LightNorm, eps: float, group: Any = None) -> Trained:
    """Training: y, xhat (both [N, C, P]); mu, s, r, float64 [C]; the extrema's indices [C, K, 2].

    ``group``: a process group whose joined batch is normalized; chunks are then this process's share.
    """
    ways = passes_for(x, config, config.chunks, group)
    return next(found for way in ways if (found := way.train(x, gamma, beta, eps)) is not None)


def infer(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, config: LightNorm, eps: float
) -> Evaluated:
    """Evaluation: y, xhat, r."""
    mean, var = (v.detach().float() if v.dtype in HALF else v.detach() for v in (mean, var))
    ways = passes_for(x, config, 0)
    return next(found for way in ways if (found := way.infer(x, gamma, beta, mean, var, eps)) is not None)


def backward(
    grad: Tensor, xhat: Tensor, r: Tensor, gamma: Tensor, indices: Tensor, config: LightNorm, group: Any = None
) -> Gradients:
    """Gradients of x [N, C, P], gamma and beta [C]; see `reference.backward`. No indices: statistics are constants."""
    ways = passes_for(grad, config, indices.shape[1], group)
    return next(found for way in ways if (found := way.backward(grad, xhat, r, gamma, indices)) is not None)
