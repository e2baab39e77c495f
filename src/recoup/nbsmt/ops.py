"""NB-SMT as torch operators: `matmul` on integer codes, and the convolution the layers run.

The convolution is one operator of the torch.library, with a fake implementation and a straight-through gradient, so
that it composes with autograd, torch.compile and DDP.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.kernels.operators import named, on_device, register
from recoup.nbsmt import cpu, gpu, reference
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.faults import raise_fault
from recoup.nbsmt.ports import UNSIGNED, reach, zero_of
from recoup.nbsmt.prepare import prepare
from recoup.nbsmt.reference import activation_operand, quantize_activation
from recoup.nbsmt.saturate import Saturating
from recoup.nbsmt.weights import quantize_weight, weight_operand
from recoup.network.checks import float32_products, instance, one_device, strided
from recoup.network.convolution import POINTWISE, Geometry, as_2d, memory_format

_backend: ContextVar[str | None] = ContextVar("recoup_nbsmt_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run NB-SMT layers on ``int8`` or ``float32`` instead of the probe's choice, with the same bits."""
    if name not in ("int8", "float32"):
        raise RecoupError(f"backend {name!r}: must be int8 or float32")
    if name == "int8" and cpu.probe().name != "int8":
        raise RecoupError(f"backend 'int8': not exact on this machine ({cpu.probe().reason})")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def current_backend() -> str:
    """``int8`` (u8 x s8 oneDNN convolutions) or ``float32`` (exact float convolutions) on this CPU."""
    return _backend.get() or cpu.probe().name


def matmul(x: Tensor, w: Tensor, config: NBSMT) -> Tensor:
    """X W as the shared multiplier computes it.

    Args:
        x: activations [M, K]: uint8 unsigned codes, or int8 signed values.
        w: int8 weights [K, N], on the same device. K is split among the threads, zero-padded at its end.
        config: threads, policy, rounding and pairing, the port that signed activations meet, and the accumulator.

    Returns:
        int32 [M, N], exact; with an accumulator what it holds after all slots.

    Raises:
        RecoupError: other dtypes, shapes that do not fit, or sums that could leave 32 bits.

    >>> x = torch.tensor([[100, 3]], dtype=torch.uint8)
    >>> w = torch.tensor([[1], [1]], dtype=torch.int8)
    >>> matmul(x, w, NBSMT(threads=2))  # a collision: 100 becomes 96, 3 fits 4 bits and stays
    tensor([[99]], dtype=torch.int32)
    >>> matmul(-x.to(torch.int8), w, NBSMT(threads=2))  # signed: 5 bits take -16..15, -100 becomes -96 (-12.5 steps)
    tensor([[-99]], dtype=torch.int32)
    """
    check_operands(x, w)
    instance(config, NBSMT, "nbsmt.matmul", "config", "NBSMT(threads=2)")
    zero = zero_of(x)
    operand = weight_operand(w.t(), config, zero)
    a_MJ = activation_operand(x, operand.activations, config)
    peak = max(int(x.max()), -int(x.min())) + 8 if x.numel() else 0  # a cut code may lie half a step further out
    bound = operand.bound * min(peak, reach(zero)) // reach(zero)
    register = config.accumulator
    if register is not None and register.overflow == "saturate" and bound > register.largest_value:
        saturated = on_device(x.device, "nbsmt.matmul", lambda: None, gpu.saturated)
        if saturated is not None:
            slots = a_MJ.shape[1] // (len(operand.activations) * config.threads)
            return saturated(a_MJ.int(), operand.weight_OGJkk, zero, config, slots, torch.int32)
        kernel = Saturating(operand.weight_OGJkk[:, :, None, None], config, len(operand.activations))
        bytes_MJ = (a_MJ.to(torch.int16) + zero).to(torch.uint8)
        return kernel(bytes_MJ[:, None, None], POINTWISE, zero)[:, :, 0, 0].contiguous()
    exact = torch.float32 if bound < 2**24 and x.device.type == "cpu" else torch.float64
    with float32_products(x):
        sums = a_MJ.to(exact) @ operand.weight_OGJkk.t().to(exact)
    return (sums if register is None else reference.register(sums.long(), register)).to(torch.int32)


def check_operands(x: Tensor, w: Tensor, purpose: str = "nbsmt.matmul") -> None:
    """Refuse anything but uint8 or int8 [M, K] and int8 [K, N] whose values can be read."""
    strided(x, purpose, "x")
    strided(w, purpose, "w")
    if x.dtype not in (torch.uint8, torch.int8) or w.dtype != torch.int8:
        raise RecoupError(
            f"{purpose}: x must be uint8 and w int8; got {x.dtype} and {w.dtype} (x may be int8 too: signed values)"
        )
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[0]:
        raise RecoupError(f"{purpose}: x [M, K] and w [K, N] expected; got {list(x.shape)} and {list(w.shape)}")
    if x.device != w.device:
        raise RecoupError(f"{purpose}: x lies on {x.device}, w on {w.device}")
    if x.is_meta:
        raise RecoupError(f"{purpose}: x and w are meta tensors, which hold no values")


def _convolution(
    x: Tensor,
    weight: Tensor,
    order: Tensor | None,
    scale: float,
    config: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    layer: str,
    zero: int = UNSIGNED,
) -> Tensor:
    """A quantised convolution on the shared multiplier: y = scale * weight_scale * sum(codes).

    Args:
        x: float32 activations [N, C, H, W], not negative where their codes are unsigned.
        weight: float32 [O, I], [O, I, k] or [O, I, kh, kw]; quantised here, see `quantize_weight`.
        order: permutation of the channels among the threads, or None.
        scale: the activation scale.
        config: the configuration's ``code``.
        stride, padding, dilation, groups: of the convolution; groups > 1 needs threads = 1.
        layer: what errors call the layer.
        zero: of the activation codes: 0 unsigned, 128 signed.

    Returns:
        float32 [N, O, h, w] in the input's memory format. The exact integer sum is rounded to float32 (it is exact
        below 2^24), then multiplied by the float32 product of the scales.
    """
    geometry = Geometry.of(weight, stride, padding, dilation, groups)
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        raise RecoupError(f"{layer}: NB-SMT emulation takes float32; got {x.dtype} input and {weight.dtype} weight")
    _check_shapes(x, weight, order, geometry, layer)
    if x.numel() == 0:
        return geometry.empty(x, weight.shape[0]).zero_()
    with named(layer):
        accumulate = on_device(x.device, "NB-SMT emulation", lambda: _accumulate, lambda: gpu.accumulate)
    sums, scale_O = accumulate(x, weight, order, scale, NBSMT.from_code(config), geometry, layer, zero)
    scales = (scale_O * scale).view(1, -1, 1, 1)
    # Rows of a rounded number are a view, which autograd would not let a caller change in place.
    y = sums * scales if sums._is_view() else sums.mul_(scales)
    return y.contiguous(memory_format=memory_format(x))


def _check_shapes(x: Tensor, weight: Tensor, order: Tensor | None, geometry: Geometry, layer: str) -> None:
    """Refuse what does not fit: padding to whole slots would hide a wrong number of channels."""
    needed = weight.shape[1] * geometry.groups
    if x.dim() != 4 or x.shape[1] != needed:
        raise RecoupError(
            f"{layer}: the input {list(x.shape)} must have {needed} channels (weight {list(weight.shape)})"
        )
    if order is not None and order.shape != (needed,):
        raise RecoupError(f"{layer}: the order has shape {list(order.shape)}; the input has {needed} channels")
    geometry.check(x, layer)


def _accumulate(
    x: Tensor,
    weight: Tensor,
    order: Tensor | None,
    scale: float,
    config: NBSMT,
    geometry: Geometry,
    layer: str,
    zero: int,
) -> tuple[Tensor, Tensor]:
    with named(layer):
        prepared = prepare(weight, config, order, zero)
    name = current_backend()
    x_NHWC = (x if order is None else x.index_select(1, order)).permute(0, 2, 3, 1).contiguous()
    divided = prepared.divided(x.shape, geometry, name)
    summed = prepared if divided is None else divided[0]
    x_PC = x_NHWC.view(-1, x.shape[1])
    operand_PJ, faults = cpu.operands(
        x_PC, scale, config, summed.operand.activations, summed.operand_type(name), zero=zero
    )
    if faults:
        raise_fault(layer, x, faults)
    operand = operand_PJ.view(*x_NHWC.shape[:3], -1).permute(0, 3, 1, 2)
    sums = summed.accumulate(operand, geometry, name, layer)
    if divided is not None:
        divided[1].add(sums.permute(0, 2, 3, 1), x_NHWC, scale)
    return sums, prepared.scale_O


def _convolution_fake(x, weight, order, scale, config, stride, padding, dilation, groups, layer, zero=UNSIGNED):
    one_device(layer, x, weight)
    geometry = Geometry.of(weight, stride, padding, dilation, groups)
    _check_shapes(x, weight, order, geometry, layer)
    return geometry.empty(x, weight.shape[0])


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: list[bool],
    zero: int = UNSIGNED,
) -> tuple[Tensor, Tensor]:
    """The gradient of the 8-bit convolution, straight through rounding and NB-SMT; none where a code is clipped.

    An operator of its own because quantising weights checks their values, which tracing cannot.
    """
    code = quantize_activation(x, scale, zero)
    weight_code, scale_O = quantize_weight(weight)
    quantized, x_hat = as_2d(weight_code * scale_O.view(-1, *[1] * (weight.dim() - 1))), code.to(torch.float32) * scale
    geometry = Geometry.of(weight, stride, padding, dilation, groups)
    with float32_products(grad):  # autocast, where backward is called inside it, knows matrix products
        if geometry.of_rows(x.shape):  # as a linear layer's, which take a fraction of the time
            grad_PO = grad.flatten(1)
            grad_x = (grad_PO @ quantized.flatten(1)).view_as(x) if needs[0] else None
            grad_w = grad_PO.t() @ x_hat.flatten(1) if needs[1] else None
        else:
            places = stride, padding, dilation, False, [0, 0], groups
            both = [*needs, False]
            grad_x, grad_w, _ = torch.ops.aten.convolution_backward(grad, x_hat, quantized, None, *places, both)
    if grad_x is not None:
        value = torch.round(x / x.new_tensor(scale))
        inside = (value >= -zero) & (value <= 255 - zero)
        grad_x = torch.mul(grad_x, inside, out=torch.empty_like(x))  # in x's strides, see `_as`
    grad_x = x.new_empty(0) if grad_x is None else grad_x
    return grad_x, weight.new_empty(0) if grad_w is None else _as(weight, grad_w.reshape(weight.shape))


def _as(like: Tensor, found: Tensor) -> Tensor:
    """A gradient in the strides of what it is of, which compiled code has from the fake and asserts."""
    own = torch.empty_like(like)
    return found if found.stride() == own.stride() else own.copy_(found)


def _backward_fake(grad, x, weight, scale, stride, padding, dilation, groups, needs, zero=UNSIGNED):
    return tuple(
        torch.empty_like(t) if needed else t.new_empty(0) for t, needed in zip((x, weight), needs, strict=True)
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, ctx.scale, _, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, _, ctx.zero = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad: Tensor):
    x, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    geometry = ctx.stride, ctx.padding, ctx.dilation, ctx.groups
    grads = convolution_backward(grad, x, weight, ctx.scale, *geometry, needs, ctx.zero)
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *[None] * 9


def _last_context(ctx, inputs, output) -> None:
    ctx.shape = list(inputs[1].shape)


def _no_gradient(ctx, *grads: Tensor) -> tuple:
    raise RecoupError(
        f"NB-SMT's gradients have no derivative of their own: no second derivatives (create_graph=True); an input had "
        f"the shape {ctx.shape}"
    )


convolution = register(
    "nbsmt_convolution", _convolution, _convolution_fake, backward=_backward, context=_setup_context, autocast=True
)
convolution_backward = register(
    "nbsmt_convolution_backward", _convolution_backward, _backward_fake, backward=_no_gradient, context=_last_context
)
