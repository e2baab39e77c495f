"""Normalizations that work at batch one and in a pipeline; group norm is torch's (`nn.GroupNorm`).

In a pipeline the backward pass sees newer weights than the forward. So what is computed from weights alone is computed
again in the backward pass, and masks and statistics are those of the forward.

Shapes: x_NCHW activations, per-channel parameters [C]; w_OIHW weights of a convolution.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recoup.errors import RecoupError
from recoup.fields import integer


class FilterResponseNorm2d(nn.Module):
    """Filter response normalization with its thresholded linear unit, per sample and channel.

        nu^2 = mean over H, W of x^2,   z = gamma x / sqrt(nu^2 + eps) + beta,   y = max(z, tau)

    The unit replaces the activation function: no ReLU follows. A 1 x 1 image leaves only signs (use a larger ``eps``).

    Args:
        num_features: C.
        eps: above 0.

    Raises:
        RecoupError: num_features below 1, eps not above 0, an input that is not [N, C, H, W].

    Source: Singh & Krishnan, CVPR 2020, with a constant eps.
    """

    def __init__(self, num_features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.num_features, self.eps = _channels(self, num_features), _above_zero(self, eps)
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.threshold = nn.Parameter(torch.zeros(num_features))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        _check(self, x_NCHW)
        gamma, beta, tau = (p.view(-1, 1, 1) for p in (self.weight, self.bias, self.threshold))
        response = x_NCHW * torch.rsqrt(x_NCHW.square().mean((2, 3), keepdim=True) + self.eps)
        return F.relu(response * gamma + beta - tau) + tau  # relu saves the forward's mask; maximum would save tau

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class StandardizedConv2d(nn.Conv2d):
    """A convolution with weight standardization.

        v = (w - mean(w)) / sqrt(var(w) + eps),   mean and biased variance over each output channel's I, H, W

    Arguments and names as `nn.Conv2d`, and ``eps``. The backward pass standardizes the weights it finds: in a pipeline
    the newest.

    Raises:
        RecoupError: padding_mode other than "zeros", padding as a word, eps not above 0, an input that is not
            [N, C, H, W].

    Source: Qiao et al., 2019 (arXiv 1903.10520).
    """

    def __init__(self, *arguments: Any, eps: float = 1e-5, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.eps = _above_zero(self, eps)
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            raise RecoupError(
                f"StandardizedConv2d(padding={self.padding!r}, padding_mode={self.padding_mode!r}): padding must be "
                "numbers, and of zeros"
            )

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Conv2d's name)
        if input.dim() != 4 or input.shape[1] != self.in_channels:
            raise RecoupError(
                f"StandardizedConv2d({self.in_channels}, {self.out_channels}): input is {list(input.shape)}; it must "
                f"be [N, {self.in_channels}, H, W]"
            )
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return _Standardized.apply(input, self.weight, self.bias, self.eps, geometry)  # type: ignore[return-value]


class _Standardized(torch.autograd.Function):
    generate_vmap_rule = True  # for `Batched`

    @staticmethod
    def forward(x: Tensor, w: Tensor, bias: Tensor | None, eps: float, geometry: tuple[Any, ...]) -> Tensor:
        return F.conv2d(x, _standardized(w, eps)[0], bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004 (torch's signature)
        x, w, bias, ctx.eps, ctx.geometry = inputs
        ctx.save_for_backward(x, w)
        ctx.bias = None if bias is None else list(bias.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        v, inverse = _standardized(w, ctx.eps)
        stride, padding, dilation, groups = ctx.geometry
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
        to_x, to_v, to_bias = torch.ops.aten.convolution_backward(
            gradients[0], x, v, ctx.bias, stride, padding, dilation, False, [0, 0], groups, mask
        )
        if not mask[1]:
            return to_x, None, to_bias, None, None
        mean = to_v.mean((1, 2, 3), keepdim=True)
        to_w = inverse * (to_v - mean - v * (to_v * v).mean((1, 2, 3), keepdim=True))
        return to_x, to_w, to_bias, None, None


def _standardized(w_OIHW: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The standardized weights, and 1 / sqrt(var + eps) [O, 1, 1, 1]."""
    variance, mean = torch.var_mean(w_OIHW, (1, 2, 3), correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + eps)
    return (w_OIHW - mean) * inverse, inverse


class OnlineNorm2d(nn.Module):
    """Online normalization: running statistics forward, and a backward pass that is right on average.

        y = (x - mu) / sqrt(var + eps)                         with the statistics before this sample, per channel
        mu <- a_f mu + (1 - a_f) mean(x)
        var <- a_f var + (1 - a_f) var(x) + a_f (1 - a_f) (mean(x) - mu)^2
        backward:  g~ = y' - (1 - a_b) e_y y,    e_y <- e_y + mean(g~ y)
                   x' = g~ / sqrt(var + eps) - (1 - a_b) e_1,    e_1 <- e_1 + mean(x')
        z = gamma y + beta, then divided by the root mean square of the sample if ``layer_scaling``

    Means are over H and W. Samples of a batch are taken one after another, in both passes in their order. In evaluation
    the statistics stay. Forward statistics move in forward passes and control errors in backward passes, also in a
    pipeline.

    Args:
        num_features: C.
        alpha_forward, alpha_backward: a_f and a_b, from 0 to below 1.
        eps: above 0.
        layer_scaling: bounds activations when statistics lag behind, as the paper proposes.

    Raises:
        RecoupError: an argument out of range, an input that is not [N, C, H, W].

    Source: Chiley et al., NeurIPS 2019 (arXiv 1905.05894).
    """

    mean: Tensor
    variance: Tensor
    along: Tensor
    offset: Tensor

    def __init__(
        self,
        num_features: int,
        alpha_forward: float = 0.999,
        alpha_backward: float = 0.99,
        eps: float = 1e-5,
        layer_scaling: bool = True,
    ) -> None:
        super().__init__()
        self.num_features, self.eps = _channels(self, num_features), _above_zero(self, eps)
        for name, value in (("alpha_forward", alpha_forward), ("alpha_backward", alpha_backward)):
            if not 0 <= value < 1:
                raise RecoupError(f"OnlineNorm2d({name}={value!r}): {name} must be from 0 to below 1")
        self.alphas, self.layer_scaling = (alpha_forward, alpha_backward), layer_scaling
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        for name, start in (("mean", 0.0), ("variance", 1.0), ("along", 0.0), ("offset", 0.0)):
            self.register_buffer(name, torch.full((num_features,), start))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        _check(self, x_NCHW)
        if self.training:
            y = _Controlled.apply(x_NCHW, *self._statistics(x_NCHW), self.along, self.offset, self.alphas[1])
        else:
            y = _centred(x_NCHW, self.mean[None], torch.rsqrt(self.variance + self.eps)[None])
        y = y * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        if self.layer_scaling:
            y = y * torch.rsqrt(y.square().mean((1, 2, 3), keepdim=True) + self.eps)
        return y

    @torch.no_grad()
    def _statistics(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """mu and 1 / sqrt(var + eps) before each sample, [N, C]; moves the buffers past all of them."""
        keep = self.alphas[0]
        mean_NC, inverse_NC = x_NCHW.new_empty(x_NCHW.shape[:2]), x_NCHW.new_empty(x_NCHW.shape[:2])
        for i, (variance, now) in enumerate(zip(*torch.var_mean(x_NCHW, (2, 3), correction=0), strict=True)):
            mean_NC[i], inverse_NC[i] = self.mean, torch.rsqrt(self.variance + self.eps)
            away = (now - self.mean).square()
            self.variance.mul_(keep).add_((1 - keep) * variance + keep * (1 - keep) * away)
            self.mean.mul_(keep).add_(now, alpha=1 - keep)
        return mean_NC, inverse_NC

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, layer_scaling={self.layer_scaling}"


def _centred(x_NCHW: Tensor, mean_NC: Tensor, inverse_NC: Tensor) -> Tensor:
    return (x_NCHW - mean_NC[..., None, None]) * inverse_NC[..., None, None]


class _Controlled(torch.autograd.Function):
    """The normalization, and its backward pass with the two control errors, which it moves in the samples' order."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, inverse: Tensor, along: Tensor, offset: Tensor, alpha: float
    ) -> Tensor:
        y = _centred(x, mean, inverse)
        ctx.save_for_backward(y, inverse)
        ctx.errors, ctx.pull = (along, offset), 1 - alpha  # not saved: they move between forward and backward
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        along, offset = ctx.errors
        found = torch.empty_like(gradients[0])
        for to_x, gradient, y, inverse in zip(found, gradients[0], *ctx.saved_tensors, strict=True):
            across = gradient - ctx.pull * along.view(-1, 1, 1) * y
            along.add_((across * y).mean((1, 2)))
            torch.sub(across * inverse.view(-1, 1, 1), ctx.pull * offset.view(-1, 1, 1), out=to_x)
            offset.add_(to_x.mean((1, 2)))
        return found, None, None, None, None, None


NORMS = (FilterResponseNorm2d, OnlineNorm2d)


def _check(module: FilterResponseNorm2d | OnlineNorm2d, x: Tensor) -> None:
    if x.dim() != 4 or x.shape[1] != module.num_features:
        raise RecoupError(
            f"{type(module).__name__}({module.num_features}): input is {list(x.shape)}; it must be "
            f"[N, {module.num_features}, H, W]"
        )


def _channels(module: nn.Module, value: int) -> int:
    return integer(type(module).__name__, "num_features", value, (1, 1 << 31))


def _above_zero(module: nn.Module, eps: float) -> float:
    if not eps > 0:
        raise RecoupError(f"{type(module).__name__}(eps={eps!r}): eps must be above 0")
    return eps
