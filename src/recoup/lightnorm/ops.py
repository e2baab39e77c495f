"""LightNorm as torch operators, with fake implementations and gradients: they compose with autograd and torch.compile.

Legend: x [N, C, ...]; xhat as `layout.flattened` lays it out; K chunks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recoup.errors import RecoupError
from recoup.kernels.operators import named, register
from recoup.lightnorm import passes
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.layout import flattened, flattened_shape, unflattened
from recoup.network.checks import one_device

__all__ = ["Joined", "infer", "train"]


def _train(
    x: Tensor, gamma: Tensor, beta: Tensor, config: str, eps: float, layer: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Batch statistics: y like x, xhat, and mu, s, r, float64 [C], indices int64 [C, K, 2]."""
    unit = LightNorm.from_code(config)
    _check_channels(x, layer, gamma, beta)
    _check_elements(x, unit, layer)
    with named(layer, x):
        y, *rest = passes.forward(flattened(x, unit), gamma, beta, unit, eps)
    return _like(x, y), *rest  # type: ignore[return-value]


def _train_fake(x, gamma, beta, config, eps, layer):
    one_device(layer, x, gamma, beta)
    _check_channels(x, layer, gamma, beta)
    C, unit = x.shape[1], LightNorm.from_code(config)
    vector = torch.empty(C, dtype=torch.float64, device=x.device)
    indices = torch.empty(C, unit.chunks, 2, dtype=torch.int64, device=x.device)
    xhat = x.new_empty(flattened_shape(x.shape, unit))
    return torch.empty_like(x), xhat, vector, vector.clone(), vector.clone(), indices


def _infer(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, config: str, eps: float, layer: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Running statistics: y like x, xhat, r float64 [C]."""
    unit = LightNorm.from_code(config)
    _check_channels(x, layer, gamma, beta, mean, var)
    with named(layer, x):
        y, xhat, r = passes.infer(flattened(x, unit), gamma, beta, mean, var, unit, eps)
    return _like(x, y), xhat, r


def _infer_fake(x, gamma, beta, mean, var, config, eps, layer):
    one_device(layer, x, gamma, beta, mean, var)
    _check_channels(x, layer, gamma, beta, mean, var)
    vector = torch.empty(x.shape[1], dtype=torch.float64, device=x.device)
    return torch.empty_like(x), x.new_empty(flattened_shape(x.shape, LightNorm.from_code(config))), vector


def _backward(
    grad: Tensor, xhat: Tensor, r: Tensor, gamma: Tensor, indices: Tensor, config: str, layer: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like grad, dgamma, dbeta; without indices the statistics are constants."""
    unit = LightNorm.from_code(config)
    _check_channels(grad, layer, r, gamma, indices)
    with named(layer, grad):
        dx, dgamma, dbeta = passes.backward(flattened(grad, unit), xhat, r, gamma, indices, unit)
    return _like(grad, dx), dgamma, dbeta


def _backward_fake(grad, xhat, r, gamma, indices, config, layer):
    return torch.empty_like(grad), grad.new_empty(gamma.shape), grad.new_empty(gamma.shape)


def _like(x: Tensor, result: Tensor) -> Tensor:
    """A result of the passes in x's shape and memory format.

    It is no view: what an operator gives as a view, autograd lets nobody change in place, as ``nn.ReLU(inplace=True)``
    does. The one that is dropped here shares its memory with nothing else.
    """
    y = unflattened(result, x.shape)
    like = torch.empty_like(x)
    return torch.ops.aten._unsafe_view(y, y.shape) if y.stride() == like.stride() else like.copy_(y)


def _check_channels(x: Tensor, layer: str, *vectors: Tensor) -> None:
    """Kernels do not look where a vector ends."""
    if any(vector.shape[0] != x.shape[1] for vector in vectors):
        sizes = ", ".join(str(vector.shape[0]) for vector in vectors)
        raise RecoupError(f"{layer}: {list(x.shape)} has {x.shape[1]} channels; its vectors have {sizes}")


def _check_elements(x: Tensor, config: LightNorm, layer: str, ranks: int = 1) -> None:
    elements = x.numel() // max(x.shape[1], 1) * ranks
    if elements < 2 * config.chunks:
        fewer = f" or LightNorm(chunks={elements // 2})" if elements > 1 else ""
        raise RecoupError(
            f"{layer}: a channel of the input {list(x.shape)} has {elements} elements; {config.chunks} chunks need at "
            f"least {2 * config.chunks}: use larger batches{fewer}"
        )


def _train_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, gamma, _, ctx.config, _, ctx.layer = inputs
    _, xhat, _, _, r, indices = output
    ctx.save_for_backward(xhat, r, gamma, indices)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros of xhat's size for outputs without gradients


def _train_gradient(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    if grad is None:
        return (None,) * 6
    grads = backward(grad, *ctx.saved_tensors, ctx.config, ctx.layer)
    return *grads, None, None, None


def _infer_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, gamma, _, _, _, ctx.config, _, ctx.layer = inputs
    _, xhat, r = output
    ctx.save_for_backward(xhat, r, gamma)
    ctx.mark_non_differentiable(xhat, r)
    ctx.set_materialize_grads(False)


def _infer_gradient(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    if grad is None:
        return (None,) * 8
    xhat, r, gamma = ctx.saved_tensors
    none = torch.empty(r.shape[0], 0, 2, dtype=torch.int64, device=r.device)
    grads = backward(grad, xhat, r, gamma, none, ctx.config, ctx.layer)
    return *grads, None, None, None, None, None


def _backward_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.layer = inputs[-1]


def _backward_gradient(ctx: Any, *_: Any) -> tuple:
    raise RecoupError(
        f"{ctx.layer}: LightNorm's gradients have no derivative of their own: no second derivatives (create_graph=True)"
    )


class Joined(torch.autograd.Function):
    """Training over the joined batch of a process group; y and the new statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, config: LightNorm, eps: float, group: Any, layer: str
    ):
        """See `passes.forward`."""
        import torch.distributed as dist

        from recoup.lightnorm.joined import members

        ctx.config, ctx.group, ctx.layer = config, group, layer
        group = members(group)
        _check_elements(x, config, layer, dist.get_world_size(group))
        with named(layer, x):
            y, xhat, mean, s, r, indices = passes.forward(flattened(x, config), gamma, beta, config, eps, group)
        ctx.save_for_backward(xhat, r, gamma, indices)
        ctx.mark_non_differentiable(mean, s)
        return _like(x, y), mean, s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any):  # type: ignore[override]
        """See `passes.backward`."""
        from recoup.lightnorm.joined import members

        group = members(ctx.group)
        xhat, r, gamma, indices = ctx.saved_tensors
        with named(ctx.layer, grad):
            grads = passes.backward(flattened(grad, ctx.config), xhat, r, gamma, indices, ctx.config, group)
        return _like(grad, grads[0]), grads[1], grads[2], None, None, None, None


train = register("lightnorm_train", _train, _train_fake, backward=_train_gradient, context=_train_context)
infer = register("lightnorm_infer", _infer, _infer_fake, backward=_infer_gradient, context=_infer_context)
backward = register(
    "lightnorm_backward", _backward, _backward_fake, backward=_backward_gradient, context=_backward_context
)
