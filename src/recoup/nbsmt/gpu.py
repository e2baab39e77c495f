"""NB-SMT's convolutions on CUDA: the same sums as the CPU's, bit for bit.

Three Triton kernels a layer: the weights' scales and operands, the activations' operands (gpu_operands.py) and their
convolution (gpu_convolution.py). Weights are prepared anew in every call: one short kernel, and never stale. Which
groups meet no weight is not looked up (the answer would have to reach the host first), so a layer costs all its groups.
Every call waits once, for the faults of its own input, while its convolution runs.

Shape suffixes: those of gpu_operands.py.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.kernels.operators import check_capability, named, needs_triton
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.faults import BAD_WEIGHT, raise_fault
from recoup.nbsmt.gpu_plan import Plan
from recoup.nbsmt.ports import UNSIGNED
from recoup.nbsmt.weights import quantize_weight, weight_operand
from recoup.network.convolution import Geometry, as_2d


def accumulate(
    x: Tensor,
    weight: Tensor,
    order: Tensor | None,
    scale: float,
    config: NBSMT,
    geometry: Geometry,
    layer: str,
    zero: int = UNSIGNED,
) -> tuple[Tensor, Tensor]:
    """The sums of a quantised convolution on the shared multiplier.

    Args:
        x: float32 [N, C, H, W] on a CUDA device, any strides.
        weight: float32 [O, I], [O, I, k] or [O, I, kh, kw], on the same device.
        order: int64 permutation of the channels among the threads, or None.
        scale: the activation scale.
        config: threads, policy, rounding, pairing and accumulator; one thread where geometry.groups > 1.
        geometry: of the convolution.
        layer: what errors call the layer.
        zero: of the activation codes: 0 unsigned, 128 signed.

    Returns:
        float32 [N, O, h, w], channels_last: exact integer sums, or what the accumulators hold, rounded once; and the
        weight scales, float32 [O].

    Raises:
        RecoupError: negative (where codes are unsigned) or non-finite inputs, non-finite weights, sums
            that may leave 32 bits, shapes or devices that do not fit, a stream that is being captured, a GPU that is
            too old, or no Triton.
    """
    operands, convolution = _kernels(layer)
    weight = as_2d(weight)
    plan = Plan.of(tuple(x.shape), tuple(weight.shape), config, geometry, zero)
    _check_device(x, weight, order, layer)
    _check_sizes(plan, order, layer)
    with torch.cuda.device_of(x):
        faults = torch.zeros(1, dtype=torch.int32, device=x.device)
        weight_OLK, offset_O, scale_O = operands.weight_operands(plan, weight, order, faults)
        if plan.most >= 2**31:
            _check_sums(weight, weight_OLK, config, layer, zero)
        sums = x.new_empty(x.shape[0], *plan.out, weight.shape[0])
        readings = []
        for part in plan.parts():
            operand_PK = operands.activation_operands(plan, x[part], order, scale, faults)
            readings.append(_reading(faults))
            convolution.convolve(plan, operand_PK, weight_OLK, offset_O, sums[part])
        found = readings[-1]()
    if found & BAD_WEIGHT:
        _refuse_weight(weight, config, layer, zero)
    if found:
        raise_fault(layer, x, found)
    return sums.permute(0, 3, 1, 2), scale_O


def saturated() -> Callable[..., Tensor]:
    """`gpu_convolution.saturated_products`; an error where there is no Triton."""
    with needs_triton("NB-SMT's registers that saturate need"):
        from recoup.nbsmt.gpu_convolution import saturated_products
    return saturated_products


def _kernels(layer: str) -> tuple[ModuleType, ModuleType]:
    with named(layer), needs_triton("NB-SMT layers need"):
        from recoup.nbsmt import gpu_convolution, gpu_operands
    return gpu_operands, gpu_convolution


def _reading(faults: Tensor) -> Callable[[], int]:
    """A reading of the faults found so far: it waits for the kernels launched before it and not for those after."""
    if not faults.is_cuda:
        return lambda: int(faults)
    host = faults.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> int:
        copied.synchronize()
        return int(host)

    return read


def _refuse_weight(weight: Tensor, config: NBSMT, layer: str, zero: int) -> None:
    """Raise what the CPU raises for these weights, if anything."""
    with named(layer):
        weight_operand(quantize_weight(weight)[0], config, zero)


def _check_sums(weight: Tensor, weight_OLK: Tensor, config: NBSMT, layer: str, zero: int = UNSIGNED) -> None:
    """Look at the weights themselves where their number alone does not say that every sum fits 32 bits."""
    _refuse_weight(weight, config, layer, zero)
    if config.accumulator is not None and config.accumulator.overflow == "saturate":
        return  # its kernel has room for more
    reach = 128 * int(weight_OLK.int().abs().sum((1, 2), dtype=torch.int64).max())
    if reach >= 2**31:
        raise RecoupError(
            f"{layer}: weight {list(weight.shape)}: partial sums may reach {reach} on the GPU, beyond its 32-bit "
            "accumulators; run this layer on the CPU"
        )


def _check_sizes(plan: Plan, order: Tensor | None, layer: str) -> None:
    """What the CPU's operators refuse by themselves; a kernel would read beyond its tensors."""
    groups, channels, inputs = plan.geometry.groups, plan.x[1], plan.weight[1]
    if channels != inputs * groups or plan.weight[0] % groups:
        raise RecoupError(
            f"{layer}: weight {list(plan.weight)} in {groups} groups does not fit the input {list(plan.x)}"
        )
    if groups > 1 and (plan.config.threads > 1 or order is not None):
        raise RecoupError(f"{layer}: a convolution in {groups} groups runs one thread, unordered; got {plan.config!r}")
    if order is not None and order.shape != (channels,):
        raise RecoupError(f"{layer}: the order has shape {list(order.shape)}, the input {channels} channels")
    if min(plan.out) < 1:
        raise RecoupError(
            f"{layer}: kernel {list(plan.weight[2:])} with dilation {list(plan.geometry.dilation)} is larger than the "
            f"padded input {list(plan.padded)}"
        )
    if plan.padded[0] * plan.padded[1] >= 2**31:
        raise RecoupError(f"{layer}: images of {list(plan.padded)} pixels exceed the kernels' 32-bit indices")


def _check_device(x: Tensor, weight: Tensor, order: Tensor | None, layer: str) -> None:
    for name, tensor in (("weight", weight), ("order", order)):
        if tensor is not None and tensor.device != x.device:
            raise RecoupError(f"{layer}: the input lies on {x.device}, the {name} on {tensor.device}")
    if not x.is_cuda:  # Triton's interpreter
        return
    with named(layer):
        check_capability(x, "NB-SMT's")
    if torch.cuda.is_current_stream_capturing():
        raise RecoupError(f"{layer}: NB-SMT layers check their input in every call and cannot run inside a CUDA graph")
