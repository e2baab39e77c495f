"""The narrow accumulator as torch operators: `matmul`, batched, and the convolution that the layers run.

Each is one operator of the torch.library with a fake implementation and the gradient its config asks for, so that it
composes with autograd, autocast, torch.compile and DDP.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.kernels.operators import eager, named, needs_triton, on_device, register
from recoup.lba import driver, small
from recoup.lba.config import LBA
from recoup.lba.cpu import Cpu
from recoup.lba.reference import mix
from recoup.network.checks import one_device
from recoup.network.convolution import Geometry, memory_format
from recoup.network.matrices import check_pair, one_batch

__all__ = ["EMULATION", "batched", "checked_config", "convolution", "draw_seed", "matmul", "shifted_code"]

EMULATION = "LBA emulation"


def matmul(a: Tensor, b: Tensor, config: LBA, *, seed: int | None = None) -> Tensor:
    """a b with every product and sum in the formats of ``config``.

    Differentiable; the gradients are those that ``config.gradient`` names, summed in float32, or run on
    ``config.backward``.

    Args:
        a: float32 [..., M, K].
        b: float32 [..., K, N]; batch dimensions broadcast as in torch.matmul.
        config: the unit.
        seed: of stochastic rounding, 0 to 2^31 - 1; None draws one from torch's default generator. Random bits depend
            on the seed, the output's index and the step alone.

    Returns:
        float32 [..., M, N]: the same bits on every device, for every tiling and number of threads. Zeros are +0. K = 0
        gives zeros.

    Raises:
        RecoupError: other dtypes (half precision is not converted silently), shapes that do not fit, NaN or infinity
            in an operand (unless ``config.nonfinite`` is ``propagate``), or an integer accumulator that saturates
            whose products do not fit its range.

    >>> a, b = torch.full((1, 32), 0.7), torch.full((32, 1), 0.7)
    >>> round((a @ b).item(), 2), matmul(a, b, LBA()).item()  # M7E4 truncates
    (15.68, 15.25)
    """
    if isinstance(config, LBA) and seed is None and _direct(a, b):
        y = small.matmul(a, b, config.code)
        if y is not None:
            return y
    check_shapes(a, b)
    config = checked_config(config, "lba.matmul")
    return batched(a, b, config.code, draw_seed(config, seed), "lba.matmul")


def batched(a: Tensor, b: Tensor, code: str, seed: int, layer: str, names: str = "a b") -> Tensor:
    """`matmul` under a layer's name: batch dimensions broadcast and become one; a's joins its rows where b has none.

    ``code``: the config's; ``names``: two words, what errors call a and b.
    """
    if _direct(a, b):
        y = small.matmul(a, b, code)
        if y is not None:
            return y
    a, b, shape = one_batch(a, b)
    return product(a, b, code, seed, layer, names).view(shape)


def _direct(a: Any, b: Any) -> bool:
    """Whether this is one product of float32 matrices that needs neither checks nor torch's dispatcher."""
    return eager(a, b) and a.dtype is b.dtype is torch.float32 and a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0]


def checked_config(config: Any, owner: str) -> LBA:
    """A unit, the paper's for None; an error for anything else."""
    if not isinstance(config, LBA | None):
        raise RecoupError(f"{owner}: config must be an LBA, such as LBA.m7e4(); got {config!r}")
    return LBA() if config is None else config


def shifted_code(code: str, shift: int) -> str:
    """The ``code`` of a unit whose exponents are ``shift`` lower; see `LBA.shifted`."""
    return _shifted_code(code, shift)


# What torch.compiler.assume_constant_result sets, without the seconds that importing it takes.
shifted_code._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=1024)
def _shifted_code(code: str, shift: int) -> str:
    return LBA.from_code(code).shifted(shift).code


def draw_seed(config: LBA, seed: int | None = None) -> int:
    """The seed of one call: the given one, else a fresh one where the config rounds stochastically."""
    if seed is None:
        return int(torch.randint(2**31, ())) if config.stochastic else 0
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise RecoupError(f"lba.matmul(seed={seed!r}): seed must be an integer from 0 to 2^31 - 1")
    return seed


def backward_seeds(config: LBA, seed: int) -> tuple[int, int]:
    """Seeds of the two backward products of a call with ``seed``, so that none shares its random bits with another."""
    if not config.stochastic:
        return 0, 0
    first, second = (int(mix(torch.tensor(seed ^ salt))) >> 1 for salt in (0x2545F491, 0x4F6CDD1D))
    return first, second


def check_shapes(a: Any, b: Any, layer: str = "lba.matmul") -> None:
    """Refuse what is no pair of matrices, and, outside autocast (where the operator casts), other dtypes."""
    check_pair(a, b, layer)
    if a.is_meta or not torch.is_autocast_enabled(a.device.type):
        check_dtypes(a, b, layer)


def check_dtypes(a: Tensor, b: Tensor, layer: str) -> None:
    """Refuse anything but float32."""
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        raise RecoupError(
            f"{layer}: LBA emulation takes float32; got {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}: "
            "convert with .float()"
        )


def _product(a: Tensor, b: Tensor, config: str, seed: int, layer: str, names: str = "a b") -> Tensor:
    """float32 [B, M, K] x [B, K, N] -> float32 [B, M, N]."""
    check_dtypes(a, b, layer)
    first, second = names.split()
    with named(layer):
        return driver.matmul(_machine(a.device), a, b, LBA.from_code(config), seed, (first, second))


def _product_fake(a, b, config, seed, layer, names="a b"):
    one_device(layer, a, b)
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


def _product_backward(
    grad: Tensor, a: Tensor, b: Tensor, config: str, seed: int, needs: list[bool], layer: str
) -> tuple[Tensor, Tensor]:
    """The gradients of `_product` that torch has no operator for; one of its own, because it checks values, which
    tracing cannot."""
    unit = LBA.from_code(config)
    if unit.backward is None:
        with named(layer):
            grad_a, grad_b = driver.gradients(_machine(a.device), a, b, grad.contiguous(), unit, seed)
    else:
        code, title, seeds = unit.backward.code, f"{layer}, backward", backward_seeds(unit.backward, seed)
        grad_a = _product(grad, b.mT, code, seeds[0], title, "grad b") if needs[0] else None
        grad_b = _product(a.mT, grad, code, seeds[1], title, "a grad") if needs[1] else None
    return _kept(grad_a, a, needs[0]), _kept(grad_b, b, needs[1])


def _product_backward_fake(grad, a, b, config, seed, needs, layer):
    return _kept(torch.empty_like(a), a, needs[0]), _kept(torch.empty_like(b), b, needs[1])


def _kept(grad: Tensor | None, operand: Tensor, needed: bool) -> Tensor:
    return operand.new_empty(0) if grad is None or not needed else grad


def _convolution(
    x: Tensor,
    weight: Tensor,
    config: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    seed: int,
    layer: str,
) -> Tensor:
    """A convolution without bias, im2col in the order (c, kh, kw); padding is with zeros, which change no sum.

    Args:
        x: float32 [N, C, H, W].
        weight: float32 [O, C / groups, kh, kw].
        config: the configuration's ``code``.
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d.
        seed: of stochastic rounding; an output's index is that of [O, N, h, w].
        layer: what errors call the layer.

    Returns:
        float32 [N, O, h, w] in the input's memory format.
    """
    check_dtypes(x, weight, layer)
    geometry = Geometry.of(weight, stride, padding, dilation, groups)
    _check_channels(x, weight, groups, layer)
    geometry.check(x, layer)
    if x.numel() == 0:
        return geometry.empty(x, weight.shape[0]).zero_()
    with named(layer):
        y = driver.convolution(_machine(x.device), x, weight.contiguous(), geometry, LBA.from_code(config), seed)
    return y.contiguous(memory_format=memory_format(x))


def _check_channels(x: Tensor, weight: Tensor, groups: int, layer: str) -> None:
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1] * groups:
        raise RecoupError(
            f"{layer}: the input {list(x.shape)} must have {weight.shape[1] * groups} channels "
            f"(weight {list(weight.shape)}, {groups} groups)"
        )


def _convolution_fake(x, weight, config, stride, padding, dilation, groups, seed, layer):
    one_device(layer, x, weight)
    _check_channels(x, weight, groups, layer)
    geometry = Geometry.of(weight, stride, padding, dilation, groups)
    geometry.check(x, layer)
    return geometry.empty(x, weight.shape[0])


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    config: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    seed: int,
    needs: list[bool],
    layer: str,
) -> tuple[Tensor, Tensor]:
    """The gradients of `_convolution` that torch has no operator for."""
    if 0 in (grad.numel(), weight.numel()):
        return _kept(torch.zeros_like(x), x, needs[0]), _kept(torch.zeros_like(weight), weight, needs[1])
    unit = LBA.from_code(config)
    geometry = Geometry.of(weight, stride, padding, dilation, groups)
    with named(layer):
        if unit.backward is None:
            grad_x, grad_w = driver.convolution_gradients(
                _machine(x.device), grad, x, weight.contiguous(), geometry, unit, seed
            )
        else:
            grad_x, grad_w = backward_products(grad, x, weight.contiguous(), geometry, unit.backward, seed, needs)
    return _kept(grad_x, x, needs[0]), _kept(grad_w, weight, needs[1])


def backward_products(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, unit: LBA, seed: int, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """A convolution's two backward products on a unit of their own.

    dx is the convolution of the output's gradient (spread out by the stride) with the transposed, mirrored weight, K in
    the order (o, kh, kw); dw = grad [O, N P] columns^T [N P, K].
    """
    machine, grad_x, grad_w = _machine(x.device), None, None
    seed_x, seed_w = backward_seeds(unit, seed)
    if needs[0]:
        spread, mirrored, adjoint = geometry.adjoint(grad, weight, x.shape)
        grad_x = driver.convolution(machine, spread, mirrored, adjoint, unit, seed_x)
    if needs[1]:
        N, G = x.shape[0], geometry.groups
        g_GOP = (
            grad.view(N, G, -1, grad.shape[2] * grad.shape[3]).permute(1, 2, 0, 3).reshape(G, weight.shape[0] // G, -1)
        )
        grad_w = driver.matmul(machine, g_GOP, geometry.columns(x).mT, unit, seed_w).reshape(weight.shape)
    return grad_x, grad_w


def _convolution_backward_fake(grad, x, weight, config, stride, padding, dilation, groups, seed, needs, layer):
    return _kept(torch.empty_like(x), x, needs[0]), _kept(torch.empty_like(weight), weight, needs[1])


def _machine(device: torch.device) -> driver.Machine:
    return on_device(device, "LBA emulation", Cpu, _gpu)


def _gpu() -> driver.Machine:
    with needs_triton("LBA needs"):
        from recoup.lba.gpu import Gpu
    return Gpu()


def _product_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    a, b, ctx.config, ctx.seed, ctx.layer, _ = inputs
    ctx.save_for_backward(a, b)


def _product_gradient(ctx: Any, grad: Tensor) -> tuple:
    needs, (a, b) = list(ctx.needs_input_grad[:2]), ctx.saved_tensors
    if _plain(ctx.config):
        grads = (torch.bmm(grad, b.mT) if needs[0] else None, torch.bmm(a.mT, grad) if needs[1] else None)
    else:
        grads = product_backward(grad, a, b, ctx.config, ctx.seed, needs, ctx.layer)
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *[None] * 4


def _plain(config: str) -> bool:
    """Whether the gradients are torch's own, which can be differentiated again."""
    unit = LBA.from_code(config)
    return unit.gradient == "identity" and unit.backward is None


def _convolution_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, ctx.config, *ctx.geometry, ctx.seed, ctx.layer = inputs
    ctx.save_for_backward(x, weight)


def _convolution_gradient(ctx: Any, grad: Tensor) -> tuple:
    needs, (x, weight) = list(ctx.needs_input_grad[:2]), ctx.saved_tensors
    if _plain(ctx.config):
        stride, padding, dilation, groups = ctx.geometry
        grads = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [*needs, False]
        )[:2]
    else:
        arguments = (ctx.config, *ctx.geometry, ctx.seed, needs, ctx.layer)
        grads = convolution_backward(grad.contiguous(), x, weight, *arguments)
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *[None] * 7


def _last_context(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.layer = inputs[-1]


def _no_gradient(ctx: Any, *grads: Tensor) -> tuple:
    raise RecoupError(
        f"{ctx.layer}: gradients other than 'identity', and those of a backward unit, cannot be differentiated again "
        "(create_graph=True): only LBA(gradient='identity', backward=None) has a second derivative"
    )


product = register(
    "lba_matmul", _product, _product_fake, backward=_product_gradient, context=_product_context, autocast=True
)
product_backward = register(
    "lba_matmul_backward", _product_backward, _product_backward_fake, backward=_no_gradient, context=_last_context
)
convolution = register(
    "lba_convolution",
    _convolution,
    _convolution_fake,
    backward=_convolution_gradient,
    context=_convolution_context,
    autocast=True,
)
convolution_backward = register(
    "lba_convolution_backward",
    _convolution_backward,
    _convolution_backward_fake,
    backward=_no_gradient,
    context=_last_context,
)
