"""Weights made ready for the CPU, once per weight and configuration, and never stale.

A prepared weight belongs to the content it was made from: every call compares a 64-bit hash of the bytes (1-2 % of the
layer's time), because writes through ``.data`` leave a tensor's version counter alone.
"""

from dataclasses import dataclass, field

import torch
import xxhash
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from recoup.kernels.arrays import array
from recoup.nbsmt import cpu
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.trust import packed
from recoup.nbsmt.weights import WeightOperand, quantize_weight, weight_operand
from recoup.network.convolution import Geometry, as_2d

KEPT = 4
"""Configurations kept per weight, and input shapes kept per configuration: enough to switch between a few."""


@dataclass(slots=True)
class Prepared:
    """A layer's weight operand and its 8-bit convolutions by input shape; None where float32 does the work."""

    content: tuple
    operand: WeightOperand
    scale_O: Tensor
    convolutions: dict[tuple, cpu.Int8Convolution | None] = field(default_factory=dict)

    def accumulate(self, operand: Tensor, geometry: Geometry, backend: str, layer: str) -> Tensor:
        """Exact sums of products as float32, [N, O, h, w] channels_last; ``operand`` [N, G*J, H, W] channels_last.

        On ``int8`` oneDNN sums where it is right (`trust.packed`); `cpu.exact_convolution` does elsewhere, and under
        any other backend.
        """
        convolution = self._packed(operand, geometry, layer) if backend == "int8" else None
        if convolution is None:
            return cpu.exact_convolution(operand, self.operand.weight_OGJkk, *geometry.arguments, self.operand.bound)
        return convolution(operand)

    def _packed(self, operand: Tensor, geometry: Geometry, layer: str) -> cpu.Int8Convolution | None:
        key = (tuple(operand.shape), geometry)
        if key in self.convolutions:
            return self.convolutions[key]
        arguments = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
        made = packed(self.operand.weight_OGJkk, *arguments, key[0], layer)
        _remember(self.convolutions, key, made)
        return made


_prepared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def prepare(weight: Tensor, config: NBSMT, order: Tensor | None = None) -> Prepared:
    """The prepared form of a weight; made on first use and whenever the weight's content changes.

    Args:
        weight: float32 [O, I], [O, I, k] or [O, I, kh, kw].
        config: the NB-SMT configuration.
        order: permutation of the I input channels, or None.
    """
    kept: dict[tuple, Prepared] = _prepared.get(weight) or {}
    _prepared[weight] = kept
    content, key = (_hash(weight), weight.stride()), (config, None if order is None else _hash(order))
    found = kept.get(key)
    if found is None or found.content != content:
        code, scale = quantize_weight(weight)
        code = as_2d(code if order is None else code[:, order])
        found = Prepared(content, weight_operand(code, config), scale)
        _remember(kept, key, found)
    return found


def forget(weight: Tensor) -> None:
    """Free what was prepared for a weight."""
    _prepared.pop(weight, None)


def _remember(kept: dict, key: object, value: object) -> None:
    kept.pop(key, None)
    while len(kept) >= KEPT:
        del kept[next(iter(kept))]
    kept[key] = value


def _hash(tensor: Tensor) -> int:
    plain = tensor.detach()
    if not plain.is_contiguous():
        last = plain.dim() == 4 and plain.is_contiguous(memory_format=torch.channels_last)
        plain = plain.permute(0, 2, 3, 1) if last else plain.contiguous()
    return xxhash.xxh3_64_intdigest(array(plain.view(-1)).data)
