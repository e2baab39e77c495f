"""LightNorm's passes over a rounded copy of x: one after another, on any device, for any values.

Legend: x [N, C, P]; n = N P; K chunks. A device's module (`cpu`, `gpu`) has ``finite``, ``moments``, ``normalize``,
``products`` and ``gradient``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.formats import BlockFloat, Float, quantize
from recoup.kernels.operators import needs_triton, on_device
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.exact import exact_reciprocals, over, quotient, uncertainty
from recoup.lightnorm.scale import factors


def device_of(x: Tensor) -> Any:
    """The module with the passes for x's device."""
    return on_device(x.device, "LightNorm", _cpu, _gpu)


def _cpu() -> Any:
    from recoup.lightnorm import cpu

    return cpu


def _gpu() -> Any:
    with needs_triton("LightNorm needs"):
        from recoup.lightnorm import gpu
    return gpu


@dataclass(frozen=True, slots=True)
class SeparatePasses:
    """The passes of one process.

    Attributes:
        device: the module of x's device.
        config: the formats, blocks and chunks.
    """

    device: Any
    config: LightNorm

    def train(
        self, x: Tensor, gamma: Tensor, beta: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Training; see `passes.forward`."""
        x_q = self.read_input(x)
        sums, ends, indices, elements = self.moments(x_q)
        mean, s, r = statistics(sums, ends, elements, self.config, eps)
        y, xhat = self._normalized(x_q, gamma, beta, mean, r)
        return y, xhat, mean, s, r, indices

    def infer(
        self, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluation; see `passes.infer`."""
        x_q = self.read_input(x)
        mu = rounded(mean.double(), self.config.statistics)
        r = rounded(1 / (var.double() + eps).sqrt(), self.config.statistics)
        y, xhat = self._normalized(x_q, gamma, beta, mu, r)
        return y, xhat, r

    def backward(
        self, grad: Tensor, xhat: Tensor, r: Tensor, gamma: Tensor, indices: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients; see `passes.backward`."""
        config = self.config
        g = self.read_gradient(grad)
        plain, cross = self.device.products(g, xhat)
        form = config.gradient_statistics
        dbeta, dgamma = (averaged(v, 1, form).to(grad.dtype) for v in (plain, cross))
        plain, cross, elements = self.totals(plain, cross, grad.shape[0] * grad.shape[2])
        slope = _parameter(gamma, config) * r
        if indices.shape[1]:
            mean = averaged(plain, elements, form)
            amounts = self._amounts(slope, averaged(cross, 1, form), elements, indices.shape[1])
        else:  # the statistics are constants
            mean, amounts = torch.zeros_like(slope), slope[:, None][:, :0]
        # a channel whose statistics are NaN gets NaN gradients through its slope
        dx = self.device.gradient(g, mean, slope, amounts.contiguous(), indices, config.backward)
        return blocked(dx, config.backward_blocks), dgamma, dbeta

    def read_input(self, x: Tensor) -> Tensor:
        """B(F(x)), with NaN throughout the channels that hold a NaN or infinity; or an error."""
        return self._read(x, "the input", self.config.forward, self.config.forward_blocks)

    def read_gradient(self, grad: Tensor) -> Tensor:
        """B(F'(dy)), the same of the gradient."""
        return self._read(grad, "the gradient", self.config.backward, self.config.backward_blocks)

    def _read(self, x: Tensor, what: str, form: Float | None, blocks: BlockFloat | None) -> Tensor:
        x_q = blocked(rounded(x, form), blocks)
        bad = None if self.device.finite(x) else ~x.isfinite()
        if self.config.nonfinite == "error":
            self.refuse(0 if bad is None else int(bad.sum()), what, x.device)
        return x_q if bad is None else x_q.masked_fill(bad.any(2).any(0)[:, None], torch.nan)

    def refuse(self, found: int, what: str, device: torch.device) -> None:  # noqa: ARG002 - a group's counts travel
        """An error if there is a NaN or infinity."""
        if found:
            raise RecoupError(f"{what} holds {found} NaN or infinite values")

    def moments(self, x_q: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Exact sums [C, 2], ends of all chunks [C, K, 2], indices of this process's chunks, and n."""
        return *self.device.moments(x_q, self.config.chunks), x_q.shape[0] * x_q.shape[2]

    def totals(self, plain: Tensor, cross: Tensor, elements: int) -> tuple[Tensor, Tensor, int]:
        """The gradient's sums over the whole batch, as pairs [C, 2]; and n."""
        return plain, cross, elements

    def share(self, constants: Tensor, chunks: int) -> Tensor:  # noqa: ARG002 - all of them here
        """The constants of this process's chunks."""
        return constants

    def _amounts(self, slope: Tensor, S: Tensor, elements: int, chunks: int) -> Tensor:
        """What chunks' maxima lose and minima gain, [C, K]: gamma r C(m_k) S / K, multiplied in this order."""
        C_K = torch.from_numpy(factors(elements, self.config.chunks, self.config.scale)).to(slope.device)
        return over((slope[:, None] * self.share(C_K, chunks)) * S[:, None], self.config.chunks)

    def _normalized(self, x_q: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        y, xhat = self.device.normalize(
            x_q, mean, r, _parameter(gamma, config), _parameter(beta, config), config.forward, config.difference
        )
        return blocked(y, config.forward_blocks), xhat


def rounded(x: Tensor, form: Float | None) -> Tensor:
    """F(x)."""
    return x if form is None else quantize(x, form)


def blocked(x: Tensor, blocks: BlockFloat | None) -> Tensor:
    """B(x) of values of a format."""
    return x if blocks is None else quantize(x, blocks)


def _parameter(value: Tensor, config: LightNorm) -> Tensor:
    """F(gamma) or F(beta), float64."""
    return rounded(value.detach(), config.forward).double()


def averaged(pairs: Tensor, elements: int, form: Float | None) -> Tensor:
    """Sums that are given as pairs, float64 [C, 2], over n."""
    return over(pairs.sum(-1), elements) if form is None else rounded(quotient(pairs, elements), form)


def statistics(
    sums: Tensor, ends: Tensor, elements: int, config: LightNorm, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """mu and r, rounded, and s, from a channel's exact sums and its chunks' ends."""
    total, form = sums.sum(-1), config.statistics
    s = torch.where(total.isnan(), torch.nan, deviation(ends, elements, config, eps))
    r = rounded(1 / s, form)
    if form is not None:
        low, high = (rounded(1 / s * (1 + sign * uncertainty(config.chunks)), form) for sign in (-1, 1))
        r = exact_reciprocals(r, low != high, ends, elements, config, eps)
    return averaged(sums, elements, form), s, r


def deviation(ends: Tensor, elements: int, config: LightNorm, eps: float) -> Tensor:
    """s = (1/K) sum_k C(m_k) (max_k - min_k) + eps, added in this order; ends float64 [C, K, 2]."""
    C_K = torch.from_numpy(factors(elements, config.chunks, config.scale)).to(ends.device)
    total = torch.zeros_like(ends[:, 0, 0])
    for k in range(config.chunks):
        total = total + C_K[k] * (ends[:, k, 0] - ends[:, k, 1])
    return over(total, config.chunks) + eps


def quantized_moments(x: Tensor, config: LightNorm) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of B(F(x)) per channel, float64."""
    x_q = SeparatePasses(device_of(x), config).read_input(x).double()
    var, mean = torch.var_mean(x_q, (0, 2), correction=0)
    return mean, var
