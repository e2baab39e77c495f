"""The order of LightNorm's fused passes: two over x and two over the gradient, with the statistics between them.

What a kind of kernels adds is its four passes; all else is here. Every function gives None where an input holds what
the kernels do not hold for.

Legend: x [N, C, P]; K chunks; ``factors`` and ``amounts`` those of statistics.py. What has an element for a channel or
a chunk is an array: on small tensors torch's own would take as long as the passes.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recoup.kernels.arrays import array
from recoup.kernels.memory import fresh
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.cpu_rounding import rounding_of
from recoup.lightnorm.exact import exact_reciprocals, uncertainty
from recoup.lightnorm.fused.statistics import (
    MEAN,
    RECIPROCAL,
    batch_statistics,
    gradient_statistics,
    parameters,
    running_statistics,
)
from recoup.lightnorm.scale import factors as scale_factors
from recoup.lightnorm.tiling import Tiling

FLOATS = {torch.float32: np.float32, torch.float64: np.float64}

Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]


class FusedPasses(ABC):
    """The passes over tensors of one shape and dtype, in one configuration.

    Args:
        config: the formats.
        chunks: K; 0 where there are no batch statistics.
        dtype: float32 or float64.
        tiling: how x is cut.
    """

    def __init__(self, config: LightNorm, chunks: int, dtype: torch.dtype, tiling: Tiling) -> None:
        self.config = config
        self.chunks, self.tiling, self.dtype = chunks, tiling, FLOATS[dtype]
        self.constants = scale_factors(tiling.elements, chunks, config.scale) if chunks else np.empty(0)
        forms = config.forward, config.statistics, config.gradient_statistics
        self.value_numbers, self.statistic_numbers, self.gradient_numbers = (tuple(rounding_of(form)) for form in forms)

    @abstractmethod
    def moments(self, x: Tensor, sums: Doubles, ends: Doubles, indices: Indices) -> bool:
        """A channel's exact sum as a pair [C, 2], its chunks' maxima and minima [C, K, 2] and their first indices;
        whether the kernels hold for x."""

    @abstractmethod
    def normalize(self, x: Tensor, y: Tensor, xhat: Tensor, factors: Doubles, ordinary: bool) -> bool:
        """xhat = F((x - mu) r) and y = B(F(gamma xhat + beta)); whether the kernels hold for x and the factors."""

    @abstractmethod
    def products(self, grad: Tensor, xhat: Tensor, plain: Doubles, cross: Doubles) -> bool:
        """Exact sums of g and of g xhat, as pairs [C, 2]; whether the kernels hold for the gradient."""

    @abstractmethod
    def gradient(
        self, grad: Tensor, dx: Tensor, factors: Doubles, amounts: Doubles, indices: Tensor, ordinary: bool
    ) -> bool:
        """dx = B(F'((g - m) slope -+ the extrema's amounts)); whether the kernels hold for gradient and factors."""

    def train(
        self, x: Tensor, gamma: Tensor, beta: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] | None:
        """Training; see `passes.forward`."""
        C, K, elements = self.tiling.channels, self.chunks, self.tiling.elements
        sums, ends, indices = np.empty((C, 2)), np.empty((C, K, 2)), np.empty((C, K, 2), np.int64)
        if not self.moments(x, sums, ends, indices):
            return None
        factors, s, doubtful = np.empty((4, C)), np.empty(C), np.empty(C, np.bool_)
        given = self.constants, elements, eps, uncertainty(K), self.statistic_numbers
        ordinary = batch_statistics(sums, ends, *given, factors, s, doubtful)
        if doubtful.any():
            near, where, found = (torch.from_numpy(v) for v in (factors[RECIPROCAL], doubtful, ends))
            factors[RECIPROCAL] = exact_reciprocals(near, where, found, elements, self.config, eps)
        results = self._normalized(x, gamma, beta, factors, ordinary)
        if results is None:
            return None
        mean, s, r, found = (torch.from_numpy(v) for v in (factors[MEAN], s, factors[RECIPROCAL], indices))
        return *results, mean, s, r, found

    def infer(
        self, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Evaluation; see `passes.infer`."""
        factors = np.empty((4, self.tiling.channels))
        deviation = (var.detach().double() + eps).sqrt()  # torch's root, which is the reference's, may be an ulp off
        ordinary = running_statistics(array(mean), deviation.numpy(), self.statistic_numbers, factors)
        results = self._normalized(x, gamma, beta, factors, ordinary)
        return None if results is None else (*results, torch.from_numpy(factors[RECIPROCAL]))

    def _normalized(
        self, x: Tensor, gamma: Tensor, beta: Tensor, factors: Doubles, ordinary: bool
    ) -> tuple[Tensor, Tensor] | None:
        ordinary &= parameters(array(gamma), array(beta), self.value_numbers, factors)
        y, xhat = fresh(x), fresh(x)
        return (y, xhat) if self.normalize(x, y, xhat, factors, ordinary) else None

    def backward(
        self, grad: Tensor, xhat: Tensor, r: Tensor, gamma: Tensor, indices: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Gradients; see `passes.backward`."""
        C, elements = self.tiling.channels, self.tiling.elements
        plain, cross = np.empty((C, 2)), np.empty((C, 2))
        if not self.products(grad, xhat, plain, cross):
            return None
        factors, amounts = np.empty((2, C)), np.empty((C, self.chunks))
        parameter, dx = array(gamma), fresh(grad)
        dgamma, dbeta = np.empty(C, self.dtype), np.empty(C, self.dtype)
        numbers, results = (self.value_numbers, self.gradient_numbers), (factors, amounts, dgamma, dbeta)
        ordinary = gradient_statistics(plain, cross, parameter, array(r), self.constants, elements, *numbers, *results)
        if not self.gradient(grad, dx, factors, amounts, indices, ordinary):
            return None
        return dx, torch.from_numpy(dgamma), torch.from_numpy(dbeta)
