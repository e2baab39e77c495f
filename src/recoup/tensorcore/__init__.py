"""Tensor cores: the adders that ship in GPUs, bit for bit."""

from recoup.tensorcore.config import TensorCore
from recoup.tensorcore.layers import TensorCoreConv1d, TensorCoreConv2d, TensorCoreLinear
from recoup.tensorcore.ops import matmul
from recoup.tensorcore.quantizers import quantize_operand

__all__ = [
    "TensorCore",
    "TensorCoreConv1d",
    "TensorCoreConv2d",
    "TensorCoreLinear",
    "matmul",
    "quantize_operand",
]
