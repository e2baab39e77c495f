"""The weight side of NB-SMT: 8-bit codes, and the weight operand of every group.

Shape suffixes: O output channels, I input channels per convolution group, J = I padded to whole slots, T threads,
S slots, G groups of `recoup.nbsmt.groups`, kk the kernel's taps (none for a linear layer).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.nbsmt import reference
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.groups import Activation, Weight, groups
from recoup.nbsmt.ports import UNSIGNED, WEIGHT, reach


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes per output channel: scale = 2 max|w| / 255, code = clip(round(w / scale), -128, 127).

    Ties go to even; the division is one float32 division. A channel of zeros has codes 0 and scale 1.

    Args:
        weight: float32 [O, I, ...].

    Returns:
        int8 codes of the same shape, float32 scales [O].

    Raises:
        RecoupError: NaN or infinity among the weights.
    """
    largest = weight.detach().flatten(1).abs().amax(1) if weight.numel() else weight.new_zeros(weight.shape[0])
    if not bool(torch.isfinite(largest).all()):
        channel = int((~torch.isfinite(largest)).nonzero()[0])
        raise RecoupError(f"weight {list(weight.shape)}: output channel {channel} holds NaN or infinity")
    scale = 2 * largest / largest.new_tensor(255.0)  # a tensor: by a number CUDA multiplies with the reciprocal
    scale = torch.where(largest > 0, scale.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    code = torch.round(weight.detach() / scale.view(-1, *[1] * (weight.dim() - 1)))
    return code.clamp_(-128, 127).to(torch.int8), scale


@dataclass(frozen=True, slots=True)
class WeightOperand:
    """The weight operands of the groups that meet any weight at all, side by side along the input channels.

    Attributes:
        activations: the activation operand each group needs.
        weight_OGJkk: int8 [O, G * J, ...].
        bound: no partial sum of the product with values of activation codes exceeds this magnitude.
    """

    activations: tuple[Activation, ...]
    weight_OGJkk: Tensor
    bound: int


def weight_operand(code: Tensor, config: NBSMT, zero: int = UNSIGNED) -> WeightOperand:
    """Lay 8-bit weights out for the groups of a configuration.

    Args:
        code: int8 [O, I, ...]; I is split among the threads, zero-padded at its end.
        config: the NB-SMT configuration.
        zero: of the activation codes, whose values lie in -zero..255 - zero.
    """
    w_OTSkk = reference.split_threads(code.to(torch.int16), config, 1)
    q_OTSkk = reference.reduce_weight(w_OTSkk, config)
    values = {"w": w_OTSkk, "q": q_OTSkk, "q-w": q_OTSkk - w_OTSkk}
    masks = _Masks(w_OTSkk, config.threads)
    activations, operands = [], []
    for group in groups(config):
        operand = torch.zeros_like(w_OTSkk)
        for part in group.weights:
            operand += values[part.value] * masks.of(part)
        if operand.any() or (group is groups(config)[-1] and not operands):
            activations.append(group.activation)
            operands.append(reference.merge_threads(operand, config, 1))
    weight = torch.cat(operands, 1)
    # Groups that share a weight never add up to more than its larger form: their activations exclude each other, or
    # w is followed by q - w.
    largest = torch.maximum(w_OTSkk.abs(), q_OTSkk.abs())
    bound = reach(zero) * int(largest.flatten(1).sum(1, dtype=torch.int64).amax()) if weight.numel() else 0
    if bound >= 2**31 and _is_32_bit(config):
        raise RecoupError(
            f"weight {list(code.shape)}: sums may reach {bound}, beyond the array's 32-bit accumulator (2^31 - 1)"
        )
    return WeightOperand(tuple(activations), weight.to(torch.int8), bound)


def _is_32_bit(config: NBSMT) -> bool:
    """Whether no sum may leave 32 bits: one that wraps may, and one that saturates before, whose kernel has room."""
    register = config.accumulator
    return register is None or (register.overflow == "saturate" and register.bits == 32)


class _Masks:
    """Which weights a part of a weight operand takes."""

    def __init__(self, w_OTSkk: Tensor, threads: int) -> None:
        self.wide = WEIGHT.wide(w_OTSkk)
        self.partner = {u: w_OTSkk.roll(-u, 1) != 0 for u in range(1, threads)}

    def of(self, part: Weight) -> Tensor:
        mask = torch.ones_like(self.wide)
        if part.partners is not None:
            for offset, non_zero in self.partner.items():
                mask &= non_zero if offset in part.partners else ~non_zero
        if part.width != "any":
            mask &= self.wide if part.width == "wide" else ~self.wide
        return mask
