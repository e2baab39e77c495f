"""The product of block-scaled operands as a torch operator."""

from typing import Any

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.kernels.operators import named, on_device, register
from recoup.network.checks import one_device, strided
from recoup.tensorcore import block_cpu, block_reference, blocks, reference
from recoup.tensorcore.blocks import Blocks, each_scale
from recoup.tensorcore.config import TensorCore

__all__ = ["exact", "matmul", "multiplied", "product"]

WHO = "tensorcore.matmul"
CPU, OTHER = (block_cpu.products, block_cpu.quick), (blocks.products, lambda *_: None)
"""On a device: products of checked operands, and of any, where there is a quicker way that tells what is amiss."""


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
    return multiplied((a, scale_a), (b, scale_b), config, WHO, "a b")


def multiplied(left: Blocks, right: Blocks, config: TensorCore, layer: str, names: str) -> Tensor:
    """[..., M, K] x [..., K, N] and their scales, whose batches broadcast -> float32 [..., M, N]; ``names``: what
    errors call the operands."""
    a, scale_a, b, scale_b = *left, *right
    if b.dim() == scale_b.dim() == 2 < a.dim() and scale_a.shape[:-1] == a.shape[:-1]:  # a's batch joins its rows
        a, scale_a = (t.flatten(0, -2) for t in left)
        return multiplied((a, scale_a), right, config, layer, names).view(*left[0].shape[:-1], b.shape[-1])
    every = a, b, scale_a, scale_b
    try:
        batch = torch.broadcast_shapes(*(t.shape[:-2] for t in every))
    except RuntimeError:
        shapes = ", ".join(str(list(t.shape)) for t in every)
        raise RecoupError(f"{layer}: the batch dimensions of {shapes} do not broadcast") from None
    one_device(layer, *every)
    x, y, s, t = (v.expand(*batch, *v.shape[-2:]).reshape(batch.numel(), *v.shape[-2:]) for v in every)
    return product(x, y, s, t, config.code, layer, names).view(*batch, a.shape[-2], b.shape[-1])


def exact(left: Blocks, right: Blocks, config: TensorCore) -> Tensor:
    """The same in float32: of the operands times their scales."""
    assert config.block is not None
    (a, scale_a), (b, scale_b) = left, right
    K = a.shape[-1]
    return (a * each_scale(scale_a, config.block, K, -1)) @ (b * each_scale(scale_b, config.block, K, -2))


def _product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, config: str, layer: str, names: str) -> Tensor:
    """float32 [B, M, K], [B, K, N], [B, M, S], [B, S, N] -> float32 [B, M, N]."""
    unit = TensorCore.from_code(config)
    with named(layer):
        products, quick = on_device(a.device, "tensor core emulation", lambda: CPU, lambda: OTHER)
        a, b, scale_a, scale_b = (t.detach() for t in (a, b, scale_a, scale_b))
        own = _called(names)
        for x, name in zip((a, b, scale_a, scale_b), own, strict=True):
            if x.dtype != torch.float32:
                raise RecoupError(f"{name} must be a dense float32 tensor; got {x.dtype} {list(x.shape)}")
        if 0 in (*a.shape, *b.shape):
            return a.new_zeros(a.shape[0], a.shape[1], b.shape[2])
        _refuse_scales(scale_a, scale_b, unit, own)
        found = quick(a, b, scale_a, scale_b, unit)
        if found is not None:
            return found
        _refuse(a, b, unit, own)
        left, right = (torch.where(x.isfinite(), x, 0.0) for x in (a, b))
        y = products(left, right, scale_a, scale_b, unit)
        rows, columns = (~a.isfinite()).any(2), (~b.isfinite()).any(1)
        for i, m, n in (rows[:, :, None] | columns[:, None]).nonzero().tolist():  # the unit's own way
            row, column, s, t = (v.tolist() for v in (a[i, m], b[i, :, n], scale_a[i, m], scale_b[i, :, n]))
            y[i, m, n] = block_reference.dot(row, column, s, t, unit)
        return y


def _called(names: str) -> tuple[str, str, str, str]:
    """What errors call the operands and their scales."""
    first, second = names.split()
    return first, second, f"scale_{first}", f"scale_{second}"


def _refuse(a: Tensor, b: Tensor, unit: TensorCore, names: tuple[str, str, str, str]) -> None:
    """Values that formats do not have, and what is not finite where that is an error."""
    for x, name, form, own in zip((a, b), names[:2], unit.formats, unit.pair, strict=True):
        if (value := reference.foreign(x, form)) is not None:
            raise RecoupError(
                f"{name} holds {value!r}, which is no value of {own}: see recoup.tensorcore.quantize_blocks"
            )
        count = int((~x.isfinite()).sum())
        if count and (unit.nonfinite == "error" or own == "e2m1fn" or (own == "e4m3fn" and bool(x.isinf().any()))):
            raise RecoupError(f"{name} has {count} elements that are NaN or infinite; see TensorCore's nonfinite")


def _refuse_scales(scale_a: Tensor, scale_b: Tensor, unit: TensorCore, names: tuple[str, str, str, str]) -> None:
    """The same of scales."""
    for scale, name in zip((scale_a, scale_b), names[2:], strict=True):
        if (value := block_reference.foreign_scale(scale, unit.scale_format or "ue8m0")) is not None:
            raise RecoupError(f"{name} holds {value!r}, which is no value of {unit.scale_format}")
        if unit.nonfinite == "error" and bool(scale.isnan().any()):
            raise RecoupError(f"{name} has {int(scale.isnan().sum())} NaN; see TensorCore's nonfinite")


def _product_fake(a, b, scale_a, scale_b, config, layer, names):
    one_device(layer, a, b, scale_a, scale_b)
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


def _context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.config, _, _ = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    """Of the exact product of the scaled operands, in float32; scales are constants."""
    a, b, scale_a, scale_b = ctx.saved_tensors
    block, K = TensorCore.from_code(ctx.config).block, a.shape[2]
    assert block is not None
    left, right = each_scale(scale_a, block, K, 2), each_scale(scale_b, block, K, 1)
    grad_a = torch.bmm(grad, (b * right).mT) * left if ctx.needs_input_grad[0] else None
    grad_b = torch.bmm((a * left).mT, grad) * right if ctx.needs_input_grad[1] else None
    return grad_a, grad_b, None, None, None, None, None


product = register("tensorcore_blocks", _product, _product_fake, backward=_gradient, context=_context, autocast=True)
