"""The tensor core's product as a torch operator."""

import math
from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.kernels.operators import named, needs_triton, on_device, register
from recoup.network.checks import instance, one_device
from recoup.network.matrices import check_pair, one_batch
from recoup.tensorcore import block_ops, cpu, reference
from recoup.tensorcore.config import TensorCore
from recoup.tensorcore.quantizers import for_gradient

__all__ = ["EMULATION", "batched", "checked_config", "matmul", "product"]

EMULATION, EXAMPLE = "tensor core emulation", "TensorCore.hopper_fp8()"


def matmul(
    a: Tensor, b: Tensor, config: TensorCore, *, scale_a: Tensor | None = None, scale_b: Tensor | None = None
) -> Tensor:
    """a b on the adder of ``config``; see `TensorCore` for the equation.

    Differentiable: the gradients are those of the exact product, in float32 or, as ``config.backward`` says, on the
    unit.

    Args:
        a: float32 [..., M, K], values of the format of a.
        b: float32 [..., K, N], values of the format of b; batch dimensions broadcast as in torch.matmul.
        config: the unit.
        scale_a, scale_b: float32 [..., M, 1] and [..., 1, N], or numbers: the result is multiplied by their product,
            one rounding for that and one for the result. They do not enter the sum. Of a unit with block scales
            float32 [..., M, S] and [..., S, N], S = ceil(K / config.block), values of ``config.scale_format``, both
            required: they are part of the sum (`recoup.tensorcore.quantize_blocks` makes them).

    Returns:
        float32 [..., M, N], the accumulator's values: the same bits for every number of threads. Zeros are +0. K = 0
        gives zeros.

    Raises:
        RecoupError: other dtypes, shapes that do not fit, values that the operand and scale formats do not have, NaN or
            infinity (unless ``config.nonfinite`` is ``propagate``), a device other than the CPU and CUDA.

    >>> a, b = torch.ones(1, 65536), torch.full((65536, 1), 2.0**-9)  # 128 in all
    >>> matmul(a, b, TensorCore.hopper_fp8()).item()  # from 32 on every product is below the last bit
    32.0
    >>> matmul(a, b, TensorCore.hopper_fp8(promotion=128)).item()
    128.0
    """
    _check(a, b, config)
    if config.block is not None:
        return block_ops.matmul(a, b, scale_a, scale_b, config)
    y = batched(a, b, config.code, "tensorcore.matmul", "a b")
    if scale_a is None and scale_b is None:
        return y
    scales = [torch.as_tensor(1.0 if s is None else s, dtype=torch.float32) for s in (scale_a, scale_b)]
    return y * (scales[0] * scales[1])


def _check(a: Any, b: Any, config: Any) -> None:
    instance(config, TensorCore, "tensorcore.matmul", "config", EXAMPLE)
    check_pair(a, b, "tensorcore.matmul")


def checked_config(config: Any, owner: str) -> TensorCore:
    """A unit for a layer, Hopper's FP8 for None; an error for anything else."""
    return TensorCore() if config is None else instance(config, TensorCore, owner, "config", EXAMPLE)


def batched(a: Tensor, b: Tensor, code: str, layer: str, names: str) -> Tensor:
    """`product` with any batch dimensions: they broadcast and become one; a's joins its rows where b has none."""
    a, b, shape = one_batch(a, b)
    return product(a, b, code, layer, names).view(shape)


def _product(a: Tensor, b: Tensor, config: str, layer: str, names: str) -> Tensor:
    """float32 [B, M, K] x [B, K, N] -> float32 [B, M, N]; ``names``: what errors call a and b."""
    unit = TensorCore.from_code(config)
    with named(layer):
        for x, name in zip((a, b), names.split(), strict=True):
            if x.dtype != torch.float32 or x.layout != torch.strided:
                raise RecoupError(f"{name} must be a dense float32 tensor; got {x.dtype} {list(x.shape)}")
        products = on_device(a.device, EMULATION, lambda: _on_cpu, _on_gpu)
        if 0 in (*a.shape, *b.shape):
            return a.new_zeros(a.shape[0], a.shape[1], b.shape[2])
        a, b = a.detach(), b.detach()
        y, faults = products(a, b, unit)
        if faults:
            for index in range(len(y)):
                y[index] = _looked_into(y[index], a[index], b[index], unit, names, products)
        return y


Products = Callable[[Tensor, Tensor, TensorCore], tuple[Tensor, int]]
"""float32 [B, M, K] x [B, K, N] -> float32 [B, M, N] and the operands' faults."""


def _on_cpu(a: Tensor, b: Tensor, unit: TensorCore) -> tuple[Tensor, int]:
    made = [cpu.products(*pair, unit) for pair in zip(a, b, strict=True)]
    y = made[0][0]
    whole_tiles = y.untyped_storage().nbytes() > 2 * y.nbytes
    y = torch.stack([each for each, _ in made]) if len(made) > 1 or whole_tiles else y[None]  # not copied again
    return y, reduce(or_, (faults for _, faults in made))


def _on_gpu() -> Products:
    with needs_triton("tensor core emulation needs"):
        from recoup.tensorcore import gpu
    return gpu.products


def _product_fake(a, b, config, layer, names):
    one_device(layer, a, b)
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


def _looked_into(y: Tensor, a: Tensor, b: Tensor, unit: TensorCore, names: str, products: Products) -> Tensor:
    """One matrix of a batch that has faults: what y becomes, or an error."""
    _refuse_foreign(a, b, unit, names)
    if bool(a.isfinite().all() & b.isfinite().all()):
        return y
    for x, name, form in zip((a, b), names.split(), unit.pair, strict=True):
        count = int((~x.isfinite()).sum())
        if count and (unit.nonfinite == "error" or (form in ("e4m3fn", "e2m1fn") and x.isinf().any())):
            raise RecoupError(
                f"{name} has {count} elements that are NaN or infinite; TensorCore(nonfinite='propagate') lets them "
                f"through, infinities where the format {form} has them"
            )
    return _propagated(a, b, unit, products)


def _refuse_foreign(a: Tensor, b: Tensor, unit: TensorCore, names: str) -> None:
    for x, name, form in zip((a, b), names.split(), unit.pair, strict=True):
        if (value := reference.foreign(x, unit.formats[unit.pair.index(form)])) is not None:
            raise RecoupError(
                f"{name} holds {value!r}, which is no value of {form}: quantise it first with "
                f"recoup.quantize({name}, Float.parse({form!r}))"
            )


def _propagated(a: Tensor, b: Tensor, unit: TensorCore, products: Products) -> Tensor:
    """Products of operands with NaN or infinities: NaN operands, 0 x inf and inf - inf give NaN, else the infinity."""
    left, right = (torch.where(x.isfinite(), x, 0.0)[None] for x in (a, b))
    y = products(left, right, unit)[0][0]
    overflowed = ~y.isfinite()

    def counted(left: Tensor, right: Tensor) -> Tensor:
        return left.double() @ right.double()

    ia, ib, na, nb = a.isinf(), b.isinf(), a.isnan(), b.isnan()
    sa, sb = (torch.where(x.isnan(), 0.0, x.sign()) for x in (a, b))
    wrong = na.any(1)[:, None] | nb.any(0) | (counted(ia, b == 0) + counted(a == 0, ib) > 0)
    signed = counted(ia * sa, sb) + counted(sa * ~ia, ib * sb)
    terms = counted(ia, sb.abs()) + counted(sa.abs() * ~ia, ib)
    wrong |= signed.abs() != terms  # infinities of both signs
    y = torch.where(terms > 0, signed.sign() * math.inf, y).masked_fill(wrong, math.nan).float()
    # A sum that overflows by itself meets, before or after, an infinite product: only the order tells.
    for row, column in (overflowed & (terms > 0) & ~wrong).nonzero().tolist():
        y[row, column] = reference.dot(a[row].tolist(), b[:, column].tolist(), unit)
    return y


def _context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    a, b, ctx.config, ctx.layer, _ = inputs
    ctx.save_for_backward(a, b)


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    (a, b), needs, unit = ctx.saved_tensors, ctx.needs_input_grad, TensorCore.from_code(ctx.config)
    if unit.backward == "float32":
        grads = (torch.bmm(grad, b.mT) if needs[0] else None, torch.bmm(a.mT, grad) if needs[1] else None)
        return *grads, None, None, None
    g, scale, name = for_gradient(grad, unit)
    layer, (first, second) = f"{ctx.layer}, backward", unit.pair
    left, right = (unit.replace(operands=pair, amax=None, scale="call") for pair in ((name, second), (first, name)))
    grad_a = product(g, b.mT, left.code, layer, "grad b") * scale if needs[0] else None
    grad_b = product(a.mT, g, right.code, layer, "a grad") * scale if needs[1] else None
    return grad_a, grad_b, None, None, None


product = register("tensorcore_matmul", _product, _product_fake, backward=_gradient, context=_context, autocast=True)
