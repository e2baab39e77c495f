"""The product of block-scaled operands as a torch operator."""

from typing import Any

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.kernels.operators import named, on_device, register
from recoup.network.checks import one_device, strided
from recoup.tensorcore import block_reference, blocks, reference
from recoup.tensorcore.config import TensorCore

__all__ = ["matmul", "product"]

WHO = "tensorcore.matmul"


def matmul(a: Tensor, b: Tensor, scale_a: Any, scale_b: Any, config: TensorCore) -> Tensor:
    """See `recoup.tensorcore.matmul`: a, b are a pair of matrices already."""
    assert config.block is not None
    M, K, N = *a.shape[-2:], b.shape[-1]
    S = -(-K // config.block)
    for scale, name, shape in ((scale_a, "scale_a", (M, S)), (scale_b, "scale_b", (S, N))):
        if not isinstance(scale, Tensor) or scale.dim() < 2 or scale.shape[-2:] != shape:
            got = list(scale.shape) if isinstance(scale, Tensor) else repr(scale)
            raise RecoupError(
                f"{WHO}: {name} must be float32 [..., {shape[0]}, {shape[1]}], a scale for every {config.block} of K = "
                f"{K}; got {got}"
            )
        strided(scale, WHO, name)
    every = a, b, scale_a, scale_b
    try:
        batch = torch.broadcast_shapes(*(t.shape[:-2] for t in every))
    except RuntimeError:
        shapes = ", ".join(str(list(t.shape)) for t in every)
        raise RecoupError(f"{WHO}: the batch dimensions of {shapes} do not broadcast") from None
    one_device(WHO, *every)
    x, y, s, t = (v.expand(*batch, *v.shape[-2:]).reshape(batch.numel(), *v.shape[-2:]) for v in every)
    return product(x, y, s, t, config.code).view(*batch, M, N)


def _product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, config: str) -> Tensor:
    """float32 [B, M, K], [B, K, N], [B, M, S], [B, S, N] -> float32 [B, M, N]."""
    unit = TensorCore.from_code(config)
    with named(WHO):
        on_device(a.device, "tensor core emulation", lambda: None, lambda: None)
        a, b, scale_a, scale_b = (t.detach() for t in (a, b, scale_a, scale_b))
        for x, name in ((a, "a"), (b, "b"), (scale_a, "scale_a"), (scale_b, "scale_b")):
            if x.dtype != torch.float32:
                raise RecoupError(f"{name} must be a dense float32 tensor; got {x.dtype} {list(x.shape)}")
        if 0 in (*a.shape, *b.shape):
            return a.new_zeros(a.shape[0], a.shape[1], b.shape[2])
        _refuse(a, b, scale_a, scale_b, unit)
        left, right = (torch.where(x.isfinite(), x, 0.0) for x in (a, b))
        y = blocks.products(left, right, scale_a, scale_b, unit)
        rows, columns = (~a.isfinite()).any(2), (~b.isfinite()).any(1)
        for i, m, n in (rows[:, :, None] | columns[:, None]).nonzero().tolist():  # the unit's own way
            row, column, s, t = (v.tolist() for v in (a[i, m], b[i, :, n], scale_a[i, m], scale_b[i, :, n]))
            y[i, m, n] = block_reference.dot(row, column, s, t, unit)
        return y


def _refuse(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, unit: TensorCore) -> None:
    """Values that formats do not have, and what is not finite where that is an error."""
    for x, name, form, own in zip((a, b), "ab", unit.formats, unit.pair, strict=True):
        if (value := reference.foreign(x, form)) is not None:
            raise RecoupError(
                f"{name} holds {value!r}, which is no value of {own}: see recoup.tensorcore.quantize_blocks"
            )
        count = int((~x.isfinite()).sum())
        if count and (unit.nonfinite == "error" or own == "e2m1fn" or (own == "e4m3fn" and bool(x.isinf().any()))):
            raise RecoupError(f"{name} has {count} elements that are NaN or infinite; see TensorCore's nonfinite")
    for scale, name in ((scale_a, "scale_a"), (scale_b, "scale_b")):
        if (value := block_reference.foreign_scale(scale, unit.scale_format or "ue8m0")) is not None:
            raise RecoupError(f"{name} holds {value!r}, which is no value of {unit.scale_format}")
        if unit.nonfinite == "error" and bool(scale.isnan().any()):
            raise RecoupError(f"{name} has {int(scale.isnan().sum())} NaN; see TensorCore's nonfinite")


def _product_fake(a, b, scale_a, scale_b, config):
    one_device(WHO, a, b, scale_a, scale_b)
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


def _context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.config = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    """Of the exact product of the scaled operands, in float32; scales are constants."""
    a, b, scale_a, scale_b = ctx.saved_tensors
    block, K = TensorCore.from_code(ctx.config).block, a.shape[2]
    left = scale_a.repeat_interleave(block, 2)[:, :, :K]
    right = scale_b.repeat_interleave(block, 1)[:, :K]
    grad_a = torch.bmm(grad, (b * right).mT) * left if ctx.needs_input_grad[0] else None
    grad_b = torch.bmm((a * left).mT, grad) * right if ctx.needs_input_grad[1] else None
    return grad_a, grad_b, None, None, None


product = register("tensorcore_blocks", _product, _product_fake, backward=_gradient, context=_context, autocast=True)
