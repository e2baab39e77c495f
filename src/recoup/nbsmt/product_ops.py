"""Products of two activations on the shared multiplier, both quantised by scales that are known: attention's.

The first operand plays the activation's part and the second the weight's [def]: x meets the activation port and is what
``A`` reduces, w meets the weight port of 4 bits and is what ``W`` reduces. Both are new in every call, so the operands
of `recoup.nbsmt.groups` are laid out every time, and their sums are ordinary matrix products, in floats that hold them.

Shape suffixes: B batch, M rows, K reduction, N columns, J = K padded to whole slots, G groups.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.kernels.operators import named, on_device, register
from recoup.nbsmt import cpu, gpu, reference
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.faults import NEGATIVE, NOT_FINITE
from recoup.nbsmt.ports import SIGNED
from recoup.nbsmt.reference import activation_operand, quantize_activation
from recoup.nbsmt.saturate import Saturating
from recoup.nbsmt.weights import WeightOperand, weight_operand
from recoup.network.checks import float32_products, one_device
from recoup.network.convolution import POINTWISE
from recoup.network.matrices import one_batch

__all__ = ["EMULATION", "batched", "product"]

EMULATION = "NB-SMT emulation"
CELLS = 1 << 23
"""Elements of the operands in flight: 32 MiB of float32."""


def batched(
    x: Tensor, w: Tensor, scales: tuple[float, float], config: NBSMT, zero: int, layer: str, names: str
) -> Tensor:
    """`product` with any batch dimensions: they broadcast and become one.

    Args:
        x: float32 [..., M, K].
        w: float32 [..., K, N].
        scales: of both, float32 values.
        config: the unit; K is split among the threads, zero-padded at its end.
        zero: of x's codes: 0 unsigned, 128 signed. Those of w are signed.
        layer: what errors call the layer.
        names: and what they call x and w, as in ``q k``.
    """
    x, w, shape = one_batch(x, w)
    return product(x, w, *scales, config.code, zero, layer, names).view(shape)


def _product(
    x: Tensor, w: Tensor, x_scale: float, w_scale: float, config: str, zero: int, layer: str, names: str
) -> Tensor:
    """float32 [B, M, K] x [B, K, N] -> float32 [B, M, N]: x_scale w_scale sum(codes) as the shared multiplier has it.

    The exact integer sum is rounded to float32 (it is exact below 2^24), then multiplied by the float32 product of the
    scales.
    """
    unit = NBSMT.from_code(config)
    for tensor, name in zip((x, w), names.split(), strict=True):
        if tensor.dtype != torch.float32 or tensor.layout != torch.strided:
            raise RecoupError(f"{layer}: {name} must be dense float32; got {tensor.dtype} {list(tensor.shape)}")
    one_device(layer, x, w)
    operands = on_device(x.device, EMULATION, lambda: _emitted, lambda: _plain)
    y = x.new_zeros(x.shape[0], x.shape[1], w.shape[2])
    if 0 in (*x.shape, *w.shape):
        return y
    _check_finite(layer, names.split()[1], w)
    code_BNK = quantize_activation(w.detach(), w_scale, SIGNED).transpose(1, 2)
    faults = 0
    for part in _parts(x, w, unit):
        B, N, K = code_BNK[part].shape
        with named(layer):
            operand = weight_operand(code_BNK[part].reshape(B * N, K), unit, zero)
        x_PK = x[part].detach().reshape(-1, K).contiguous()
        a_PJ, found = operands(x_PK, x_scale, zero, unit, operand)
        faults |= found
        y[part] = _accumulated(a_PJ.view(B, x.shape[1], -1), operand, unit, zero, layer)
    if faults:
        _refuse(layer, names.split(maxsplit=1)[0], x, faults)
    return y.mul_(float(np.float32(x_scale) * np.float32(w_scale)))


def _parts(x: Tensor, w: Tensor, unit: NBSMT) -> Iterator[slice]:
    """The batch in parts whose operands, of a handful of groups, fit the memory in flight."""
    groups = {1: 1, 2: 2}.get(unit.threads, 16)
    each = max(1, CELLS // (groups * x.shape[2] * (x.shape[1] + w.shape[2])))
    for first in range(0, x.shape[0], each):
        yield slice(first, first + each)


def _emitted(x_PK: Tensor, scale: float, zero: int, unit: NBSMT, operand: WeightOperand) -> tuple[Tensor, int]:
    """The activation operands as float32 values [P, G * J], and x's faults, by the layers' kernel."""
    return cpu.operands(x_PK, scale, unit, operand.activations, torch.float32, zero=zero)


def _plain(x_PK: Tensor, scale: float, zero: int, unit: NBSMT, operand: WeightOperand) -> tuple[Tensor, int]:
    """The same by torch's operators, on any device."""
    faults = NOT_FINITE * int(not bool(x_PK.isfinite().all())) | NEGATIVE * int(not zero and bool((x_PK < 0).any()))
    code = quantize_activation(x_PK.nan_to_num(0.0), scale, zero)
    return activation_operand(code, operand.activations, unit).to(torch.float32), faults


def _accumulated(a_BMJ: Tensor, operand: WeightOperand, unit: NBSMT, zero: int, layer: str) -> Tensor:
    """What the accumulators hold, whole numbers rounded once to float32, [B, M, N]."""
    register, b_BNJ = unit.accumulator, operand.weight_OGJkk.view(len(a_BMJ), -1, a_BMJ.shape[2])
    bound = operand.bound
    limit = 2**24 if register is None else min(2**24, register.largest_value + 1)
    if bound >= limit:  # a row's own sum says more: probabilities add up to 1
        bound = min(bound, 128 * int(a_BMJ.abs().sum(2, dtype=torch.float64).amax()))
    narrow = register if register is not None and bound > register.largest_value else None
    if narrow is not None and narrow.overflow == "saturate":
        return _saturated(a_BMJ, b_BNJ, operand, unit, zero, layer)
    # CUDA's float32 products may be of fewer bits.
    exact = torch.float32 if bound < 2**24 and a_BMJ.is_cpu else torch.float64
    with float32_products(a_BMJ):
        sums = a_BMJ.to(exact) @ b_BNJ.to(exact).transpose(1, 2)
    return (sums if narrow is None else reference.register(sums.long(), narrow)).to(torch.float32)


def _saturated(a_BMJ: Tensor, b_BNJ: Tensor, operand: WeightOperand, unit: NBSMT, zero: int, layer: str) -> Tensor:
    """One batch after the other, as the kernel has one weight."""
    with named(layer):
        saturated = on_device(a_BMJ.device, EMULATION, lambda: None, gpu.saturated)
    if saturated is not None:
        slots = a_BMJ.shape[2] // (len(operand.activations) * unit.threads)
        return torch.stack([saturated(a, b, zero, unit, slots) for a, b in zip(a_BMJ, b_BNJ, strict=True)])
    out = []
    for a_MJ, b_NJ in zip((a_BMJ + zero).to(torch.uint8), b_BNJ, strict=True):
        kernel = Saturating(b_NJ[:, :, None, None], unit, len(operand.activations))
        out.append(kernel(a_MJ[:, None, None], POINTWISE, zero, floats=True)[:, :, 0, 0])
    return torch.stack(out)


def _check_finite(layer: str, name: str, x: Tensor) -> None:
    if not bool(x.isfinite().all()):
        _refuse(layer, name, x, NOT_FINITE)


def _refuse(layer: str, name: str, x: Tensor, faults: int) -> None:
    what = "NaN or infinity" if faults & NOT_FINITE else f"negative values (least {float(x.min()):.6g})"
    codes = "" if faults & NOT_FINITE else "; its codes are unsigned"
    raise RecoupError(f"{layer}: {name} {list(x.shape)} holds {what}{codes}")


def _product_fake(x, w, x_scale, w_scale, config, zero, layer, names):
    one_device(layer, x, w)
    return x.new_empty(x.shape[0], x.shape[1], w.shape[2])


def _product_backward(
    grad: Tensor, x: Tensor, w: Tensor, x_scale: float, w_scale: float, zero: int
) -> tuple[Tensor, Tensor]:
    """The gradients of the 8-bit product, straight through rounding and sharing; none where a code is clipped."""
    x_hat, w_hat = quantize_activation(x, x_scale, zero) * x_scale, quantize_activation(w, w_scale, SIGNED) * w_scale
    with float32_products(grad):  # whatever autocast would make of them, where backward is called inside it
        grad_x, grad_w = grad @ w_hat.transpose(1, 2), x_hat.transpose(1, 2) @ grad
    # In the operands' strides, which compiled code has from the fake and asserts: keys come transposed.
    grad_x = torch.mul(grad_x, _inside(x, x_scale, zero), out=torch.empty_like(x))
    return grad_x, torch.mul(grad_w, _inside(w, w_scale, SIGNED), out=torch.empty_like(w))


def _inside(x: Tensor, scale: float, zero: int) -> Tensor:
    """Where a code is not clipped."""
    steps = torch.round(x / x.new_tensor(scale))
    return (steps >= -zero) & (steps <= 255 - zero)


def _backward_fake(grad, x, w, x_scale, w_scale, zero):
    return torch.empty_like(x), torch.empty_like(w)


def _setup_context(ctx, inputs, output) -> None:
    x, w, ctx.x_scale, ctx.w_scale, _, ctx.zero, *_ = inputs
    ctx.save_for_backward(x, w)


def _backward(ctx, grad: Tensor):
    x, w = ctx.saved_tensors
    grads = product_backward(grad, x, w, ctx.x_scale, ctx.w_scale, ctx.zero)
    return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), *[None] * 6


def _last_context(ctx, inputs, output) -> None:
    ctx.shape = list(inputs[1].shape)


def _no_gradient(ctx, *grads: Tensor) -> tuple:
    raise RecoupError(
        "NB-SMT's gradients have no derivative of their own: no second derivatives (create_graph=True); an operand had "
        f"the shape {ctx.shape}"
    )


product = register("nbsmt_product", _product, _product_fake, backward=_backward, context=_setup_context, autocast=True)
product_backward = register(
    "nbsmt_product_backward", _product_backward, _backward_fake, backward=_no_gradient, context=_last_context
)
