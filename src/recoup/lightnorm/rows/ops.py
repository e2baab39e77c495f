"""Layer and RMS norm by ranges as torch operators, with fake implementations and gradients.

Legend: x [..., D] with the normalized axes flattened, S samples, K chunks.
"""

from typing import Any

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.kernels.operators import named, register
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.rows import passes
from recoup.network.checks import one_device

__all__ = ["check_features", "normalize"]


def check_features(features: int, config: LightNorm, layer: str) -> None:
    """Refuse chunks of fewer than two features, which have no range."""
    if features < 2 * config.chunks:
        fewer = f"use LightNorm(chunks={features // 2}), or " if features > 1 else ""
        raise RecoupError(
            f"{layer}: it normalizes {features} features; {config.chunks} chunks need at least {2 * config.chunks}: "
            f"{fewer}leave it in float with a layer map's None"
        )


def _check(x: Tensor, layer: str, config: LightNorm, *vectors: Tensor | None) -> None:
    """Kernels do not look where a vector ends."""
    found = [vector for vector in vectors if vector is not None]
    D = found[0].numel()
    if D == 0 or x.numel() % D or any(tuple(vector.shape) != (D,) for vector in found):
        sizes = ", ".join(str(list(vector.shape)) for vector in found)
        raise RecoupError(f"{layer}: {list(x.shape)} does not split into samples of its vectors' features, {sizes}")
    check_features(D, config, layer)


def _forward(
    x: Tensor, gamma: Tensor, beta: Tensor, gain: Tensor | None, kind: str, config: str, eps: float, layer: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y like x, xhat [S, D], r float64 [S], and int64 [S, K, 2], where dx loses and gains."""
    unit = LightNorm.from_code(config)
    _check(x, layer, unit, gamma, beta, gain)
    with named(layer, x):
        y, *rest = passes.forward(_rows(x, gamma), gamma, beta, gain, kind, unit, eps)  # type: ignore[arg-type]
    return _like(x, y), *rest  # type: ignore[return-value]


def _forward_fake(x, gamma, beta, gain, kind, config, eps, layer):
    unit, given = LightNorm.from_code(config), [v for v in (x, gamma, beta, gain) if v is not None]
    one_device(layer, *given)
    _check(x, layer, unit, *given[1:])
    D = gamma.shape[0]
    S = x.numel() // D
    ends = torch.empty(S, unit.chunks, 2, dtype=torch.int64, device=x.device)
    return torch.empty_like(x), x.new_empty(S, D), torch.empty(S, dtype=torch.float64, device=x.device), ends


def _backward(
    grad: Tensor,
    xhat: Tensor,
    r: Tensor,
    ends: Tensor,
    gamma: Tensor,
    gain: Tensor | None,
    kind: str,
    config: str,
    layer: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like grad, dgamma, dbeta."""
    unit = LightNorm.from_code(config)
    _check(grad, layer, unit, gamma, gain)
    with named(layer, grad):
        saved = xhat, r, ends, gamma, gain
        dx, dgamma, dbeta = passes.backward(_rows(grad, gamma), *saved, kind, unit)  # type: ignore[arg-type]
    return _like(grad, dx), dgamma, dbeta


def _backward_fake(grad, xhat, r, ends, gamma, gain, kind, config, layer):
    return torch.empty_like(grad), grad.new_empty(gamma.shape), grad.new_empty(gamma.shape)


def _rows(x: Tensor, gamma: Tensor) -> Tensor:
    return x.detach().reshape(-1, gamma.shape[0]).contiguous()


def _like(x: Tensor, rows: Tensor) -> Tensor:
    """A result [S, D] in x's shape and strides, and no view: autograd lets nobody change an operator's view in place.

    The tensor that is dropped here shares its memory with nothing else.
    """
    y = torch.ops.aten._unsafe_view(rows, x.shape)
    like = torch.empty_like(x)
    return y if y.stride() == like.stride() else like.copy_(y)


def _context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, gamma, _, gain, ctx.kind, ctx.config, _, ctx.layer = inputs
    _, xhat, r, ends = output
    ctx.save_for_backward(xhat, r, ends, gamma, gain)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros of xhat's size for outputs without gradients


def _gradient(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    none = (None,) * 8
    if grad is None:
        return none
    return *backward(grad, *ctx.saved_tensors, ctx.kind, ctx.config, ctx.layer), *none[3:]


def _backward_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.layer = inputs[-1]


def _backward_gradient(ctx: Any, *_: Any) -> tuple:
    raise RecoupError(
        f"{ctx.layer}: LightNorm's gradients have no derivative of their own: no second derivatives (create_graph=True)"
    )


normalize = register("lightnorm_rows", _forward, _forward_fake, backward=_gradient, context=_context)
backward = register(
    "lightnorm_rows_backward", _backward, _backward_fake, backward=_backward_gradient, context=_backward_context
)
