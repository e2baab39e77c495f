"""Range batch normalization out of a device's passes: two over the activations, two over the gradient, and the blocks.

On the CPU, one process's finite batch takes `fused.emitted`, which has blocks of channels inside its passes; a group's
batch, one that holds NaN or infinities, and blocks of places take the separate passes. The bits are the same.

Legend: x [N, C, P]; n = N P; K chunks. A device's module (`cpu`, `gpu`) has ``finite``, ``moments``, ``normalize``,
``products`` and ``gradient``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.formats import BlockFloat, Float, quantize
from recoup.kernels.operators import needs_triton, on_device
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.scale import factors

HALF = (torch.float16, torch.bfloat16)
INPUT, GRADIENT = "the input", "the gradient"
FEW_PLACES = 16  # below, samples become places, so that loops over places are long


def device_of(x: Tensor) -> Any:
    """The module with the passes for x's device."""
    return on_device(x.device, "LightNorm", _cpu, _gpu)


def _cpu() -> Any:
    from recoup.lightnorm import cpu

    return cpu


def _gpu() -> Any:
    with needs_triton("LightNorm needs"):
        from recoup.lightnorm import gpu
    return gpu


def fused_for(x: Tensor, config: LightNorm) -> Any:
    """The module with fused passes for x, or None: they know no blocks of places (``axis="place"``)."""
    if x.device.type != "cpu" or x.numel() == 0 or config.blocks_of_places:
        return None
    from recoup.lightnorm.fused import emitted

    return emitted


def merged(x: Tensor, config: LightNorm) -> Tensor:
    """[N, C, ...] as contiguous [N, C, P]; as [1, C, N P] where P is small: the order of elements is the same.

    Blocks of places end with their sample, so that with them samples are never joined.
    """
    x = x.detach().flatten(2) if x.dim() > 2 else x.detach().unsqueeze(2)
    shape = merged_shape(x.shape, config)
    return (x if tuple(x.shape) == shape else x.transpose(0, 1).reshape(shape)).contiguous()


def merged_shape(shape: torch.Size, config: LightNorm) -> tuple[int, int, int]:
    """The shape of `merged`."""
    samples, channels, places = shape[0], shape[1], math.prod(shape[2:])
    joined = places < FEW_PLACES and samples > 1 and not config.blocks_of_places
    return (1, channels, samples * places) if joined else (samples, channels, places)


def split(x: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `merged`."""
    if x.shape[0] == 1 and shape[0] != 1:
        places = x.shape[2] // shape[0]
        x = x.view(shape[1], shape[0], places).transpose(0, 1)
    return x.reshape(shape)


def rounded(x: Tensor, format: Float | None, blocks: BlockFloat | None) -> Tensor:  # noqa: A002
    """B(F(x))."""
    x = x if format is None else quantize(x, format)
    return x if blocks is None else quantize(x, blocks)


def once(x: Tensor, format: Float | None) -> Tensor:  # noqa: A002
    """A statistic, float64, in its format."""
    return x if format is None else quantize(x, format)


def taken(x: Tensor, what: str, config: LightNorm, group: Any = None) -> Tensor:
    """B(F(x)) in the formats of an input or a gradient, with NaN throughout the channels that hold a NaN or infinity,
    or an error, on all processes of a group."""
    forms = (config.forward, config.forward_blocks), (config.backward, config.backward_blocks)
    x_q = rounded(x, *forms[what == GRADIENT])
    bad = None if device_of(x).finite(x) else ~x.isfinite()
    if config.nonfinite == "error":
        _refuse(0 if bad is None else int(bad.sum()), what, x.device, group)
    return x_q if bad is None else x_q.masked_fill(bad.any(2).any(0)[:, None], torch.nan)


def _refuse(found: int, what: str, device: torch.device, group: Any) -> None:
    """An error if there is a NaN or infinity; the processes of a group must agree, or the others would wait forever."""
    everywhere = found
    if group is not None:
        from recoup.lightnorm.joined import counted

        everywhere = counted(found, device, group)
    if found:
        raise RecoupError(f"{what} holds {found} NaN or infinite values")
    if everywhere:
        raise RecoupError(f"{what} of another process of the group holds {everywhere} NaN or infinite values")


def deviation(ends: Tensor, elements: int, config: LightNorm, eps: float) -> Tensor:
    """s = (1/K) sum_k C(m_k) (max_k - min_k) + eps, added in this order; ends float64 [C, K, 2]."""
    C_K = torch.from_numpy(factors(elements, config.chunks, config.scale)).to(ends.device)
    total = torch.zeros_like(ends[:, 0, 0])
    for k in range(config.chunks):
        total = total + C_K[k] * (ends[:, k, 0] - ends[:, k, 1])
    return total / config.chunks + eps


def statistics(
    sums: Tensor, ends: Tensor, elements: int, config: LightNorm, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """mu and r, rounded, and s, from a channel's exact sums and its chunks' ends."""
    total = sums.sum(-1)
    s = deviation(ends, elements, config, eps)
    s = torch.where(total.isnan(), torch.nan, s)
    return once(total / elements, config.statistics), s, once(1 / s, config.statistics)


def quantized_moments(x: Tensor, config: LightNorm) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of B(F(x)) per channel, float64."""
    x_q = taken(x, INPUT, config).double()
    var, mean = torch.var_mean(x_q, (0, 2), correction=0)
    return mean, var


def parameter(value: Tensor, config: LightNorm) -> Tensor:
    """F(gamma) or F(beta), float64."""
    value = value.detach()
    return (value if config.forward is None else quantize(value, config.forward)).double()


def forward(
    x: Tensor, gamma: Tensor, beta: Tensor, config: LightNorm, eps: float, group: Any = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Training: y, xhat (both [N, C, P]); mu, s, r, float64 [C]; the extrema's indices [C, K, 2].

    ``group``: a process group whose joined batch is normalized; chunks are then this process's share.
    """
    fused = fused_for(x, config) if group is None else None
    found = None if fused is None else fused.forward(x, gamma, beta, config, eps)
    if found is not None:
        return found
    device = device_of(x)
    x_q = taken(x, INPUT, config, group)
    elements = x.shape[0] * x.shape[2]
    if group is None:
        sums, ends, indices = device.moments(x_q, config.chunks)
    else:
        from recoup.lightnorm.joined import joined_moments

        sums, ends, indices, elements = joined_moments(device, x_q, config, group)
    mean, s, r = statistics(sums, ends, elements, config, eps)
    y, xhat = device.normalize(x_q, mean, r, parameter(gamma, config), parameter(beta, config), config.forward)
    return rounded(y, None, config.forward_blocks), xhat, mean, s, r, indices


def infer(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, config: LightNorm, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluation: y, xhat, r."""
    mean, var = (v.detach().float() if v.dtype in HALF else v.detach() for v in (mean, var))
    fused = fused_for(x, config)
    found = None if fused is None else fused.infer(x, gamma, beta, mean, var, config, eps)
    if found is not None:
        return found
    x_q = taken(x, INPUT, config)
    r = once(1 / (var.double() + eps).sqrt(), config.statistics)
    mu = once(mean.double(), config.statistics)
    y, xhat = device_of(x).normalize(x_q, mu, r, parameter(gamma, config), parameter(beta, config), config.forward)
    return rounded(y, None, config.forward_blocks), xhat, r


def backward(
    grad: Tensor, xhat: Tensor, r: Tensor, gamma: Tensor, indices: Tensor, config: LightNorm, group: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [N, C, P], gamma and beta [C]; see `reference.backward`. No indices: statistics are constants."""
    fused = fused_for(grad, config) if group is None else None
    found = None if fused is None else fused.backward(grad, xhat, r, gamma, indices, config)
    if found is not None:
        dx, dgamma, dbeta = found
        return dx, dgamma, dbeta.clone()  # results of an operator share no memory
    device, dtype = device_of(grad), grad.dtype
    g = taken(grad, GRADIENT, config, group)
    plain, cross = device.products(g, xhat)
    elements = grad.shape[0] * grad.shape[2]
    local = [once(v.sum(-1), config.gradient_statistics) for v in (cross, plain)]
    K = indices.shape[1]
    if group is not None:
        from recoup.lightnorm.joined import joined_products

        plain, cross, elements = joined_products(plain, cross, elements, group)
    plain, cross = plain.sum(-1), cross.sum(-1)
    S = once(cross, config.gradient_statistics)
    slope = parameter(gamma, config) * r
    if K == 0:
        mean, amounts = torch.zeros_like(slope), slope[:, None][:, :0]
    else:
        mean = once(plain / elements, config.gradient_statistics)
        C_K = torch.from_numpy(factors(elements, config.chunks, config.scale)).to(grad.device)
        amounts = (slope[:, None] * _share(C_K, K, group)) * S[:, None] / config.chunks
    # a channel whose statistics are NaN gets NaN gradients through its slope
    dx = device.gradient(g, mean, slope, amounts.contiguous(), indices, config.backward)
    return rounded(dx, None, config.backward_blocks), local[0].to(dtype), local[1].to(dtype)


def _share(C_K: Tensor, K: int, group: Any) -> Tensor:
    """The constants of this process's chunks."""
    if group is None:
        return C_K
    import torch.distributed as dist

    rank = dist.get_rank(group)
    return C_K[rank * K : (rank + 1) * K]
