"""LightNorm as torch operators, with fake implementations and gradients: they compose with autograd and torch.compile.

Legend: x [N, C, ...]; xhat as `passes.merged` lays it out; K chunks.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.lightnorm import passes
from recoup.lightnorm.config import LightNorm

__all__ = ["Joined", "decode", "infer", "train"]


@lru_cache(maxsize=1024)
def decode(code: str) -> LightNorm:
    """A configuration from its ``code``, an operator's string argument."""
    return LightNorm.from_dict(json.loads(code))


def _train(
    x: Tensor, gamma: Tensor, beta: Tensor, config: str, eps: float, layer: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Batch statistics: y like x, xhat, and mu, s, r, float64 [C], indices int64 [C, K, 2]."""
    unit = decode(config)
    _check_elements(x, unit, layer)
    with _named(layer):
        y, *rest = passes.forward(passes.merged(x), gamma, beta, unit, eps)
    return _like(x, y), *rest  # type: ignore[return-value]


def _train_fake(x, gamma, beta, config, eps, layer):
    C, vector = x.shape[1], torch.empty(x.shape[1], dtype=torch.float64, device=x.device)
    indices = torch.empty(C, decode(config).chunks, 2, dtype=torch.int64, device=x.device)
    xhat = x.new_empty(passes.merged_shape(x.shape))
    return torch.empty_like(x), xhat, vector, vector.clone(), vector.clone(), indices


def _infer(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, config: str, eps: float, layer: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Running statistics: y like x, xhat, r float64 [C]."""
    with _named(layer):
        y, xhat, r = passes.infer(passes.merged(x), gamma, beta, mean, var, decode(config), eps)
    return _like(x, y), xhat, r


def _infer_fake(x, gamma, beta, mean, var, config, eps, layer):
    vector = torch.empty(x.shape[1], dtype=torch.float64, device=x.device)
    return torch.empty_like(x), x.new_empty(passes.merged_shape(x.shape)), vector


def _backward(
    grad: Tensor, xhat: Tensor, r: Tensor, gamma: Tensor, indices: Tensor, config: str, layer: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like grad, dgamma, dbeta; without indices the statistics are constants."""
    with _named(layer):
        dx, dgamma, dbeta = passes.backward(passes.merged(grad), xhat, r, gamma, indices, decode(config))
    return _like(grad, dx), dgamma, dbeta


def _backward_fake(grad, xhat, r, gamma, indices, config, layer):
    return torch.empty_like(grad), grad.new_empty(gamma.shape), grad.new_empty(gamma.shape)


def _like(x: Tensor, merged: Tensor) -> Tensor:
    """A merged result in x's shape and memory format."""
    y = passes.split(merged, x.shape)
    like = torch.empty_like(x)
    return y if y.stride() == like.stride() else like.copy_(y)


def _check_elements(x: Tensor, config: LightNorm, layer: str, ranks: int = 1) -> None:
    elements = x.numel() // max(x.shape[1], 1) * ranks
    if elements < 2 * config.chunks:
        raise RecoupError(
            f"{layer}: a channel of the input {list(x.shape)} has {elements} elements; {config.chunks} chunks need at "
            f"least {2 * config.chunks}: use larger batches or LightNorm(chunks={max(1, elements // 2)})"
        )


@contextmanager
def _named(layer: str) -> Iterator[None]:
    try:
        yield
    except RecoupError as error:
        raise RecoupError(f"{layer}: {error}") from None


def _train_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, gamma, _, ctx.config, _, ctx.layer = inputs
    _, xhat, _, _, r, indices = output
    ctx.save_for_backward(xhat, r, gamma, indices)
    ctx.mark_non_differentiable(*output[1:])


def _train_gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    grads = backward(grad, *ctx.saved_tensors, ctx.config, ctx.layer)
    return *grads, None, None, None


def _infer_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, gamma, _, _, _, ctx.config, _, ctx.layer = inputs
    _, xhat, r = output
    ctx.save_for_backward(xhat, r, gamma)
    ctx.mark_non_differentiable(xhat, r)


def _infer_gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    xhat, r, gamma = ctx.saved_tensors
    none = torch.empty(r.shape[0], 0, 2, dtype=torch.int64, device=r.device)
    grads = backward(grad, xhat, r, gamma, none, ctx.config, ctx.layer)
    return *grads, None, None, None, None, None


class Joined(torch.autograd.Function):
    """Training over the joined batch of a process group; y and the new statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, config: LightNorm, eps: float, group: Any, layer: str
    ):
        """See `passes.forward`."""
        import torch.distributed as dist

        _check_elements(x, config, layer, dist.get_world_size(group))
        with _named(layer):
            y, xhat, mean, s, r, indices = passes.forward(passes.merged(x), gamma, beta, config, eps, group)
        ctx.config, ctx.group, ctx.layer = config, group, layer
        ctx.save_for_backward(xhat, r, gamma, indices)
        ctx.mark_non_differentiable(mean, s)
        return _like(x, y), mean, s

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any):  # type: ignore[override]
        """See `passes.backward`."""
        xhat, r, gamma, indices = ctx.saved_tensors
        with _named(ctx.layer):
            grads = passes.backward(passes.merged(grad), xhat, r, gamma, indices, ctx.config, ctx.group)
        return _like(grad, grads[0]), grads[1], grads[2], None, None, None, None


_library = torch.library.Library("recoup", "FRAGMENT")


def _register(name: str, implementation: Callable, fake: Callable) -> Callable:
    schema = torch.library.infer_schema(implementation, mutates_args=(), op_name=name)
    # Every call looks for NaN, which waits for the GPU: a CUDA graph cannot hold that.
    _library.define(schema, tags=(torch.Tag.cudagraph_unsafe,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"recoup::{name}", fake, lib=_library)
    return getattr(torch.ops.recoup, name).default


train = _register("lightnorm_train", _train, _train_fake)
infer = _register("lightnorm_infer", _infer, _infer_fake)
backward = _register("lightnorm_backward", _backward, _backward_fake)
for _name, _gradient, _context in (
    ("lightnorm_train", _train_gradient, _train_context),
    ("lightnorm_infer", _infer_gradient, _infer_context),
):
    torch.library.register_autograd(f"recoup::{_name}", _gradient, setup_context=_context, lib=_library)
