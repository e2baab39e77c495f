"""Tensor cores: the adders that ship in GPUs, bit for bit."""

from recoup.tensorcore.attention_layers import attention
from recoup.tensorcore.blocks import quantize_blocks
from recoup.tensorcore.config import TensorCore
from recoup.tensorcore.layers import TensorCoreConv1d, TensorCoreConv2d, TensorCoreLinear
from recoup.tensorcore.ops import matmul
from recoup.tensorcore.profiling import LayerProfile, profile
from recoup.tensorcore.quantizers import quantize_operand
from recoup.tensorcore.repair import correct_gain_

__all__ = [
    "LayerProfile",
    "TensorCore",
    "TensorCoreConv1d",
    "TensorCoreConv2d",
    "TensorCoreLinear",
    "attention",
    "correct_gain_",
    "matmul",
    "profile",
    "quantize_blocks",
    "quantize_operand",
]
