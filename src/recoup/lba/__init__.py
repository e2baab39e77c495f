"""LBA: networks on accumulators of 12 bits and less."""

from recoup.lba.attention_layers import attention
from recoup.lba.bounds import Bound, bound
from recoup.lba.config import LBA
from recoup.lba.exponents import choose_exponents_
from recoup.lba.hugging_face import register_transformers
from recoup.lba.layers import LBAConv1d, LBAConv2d, LBALinear
from recoup.lba.ops import matmul
from recoup.lba.profiling import LayerProfile, profile
from recoup.lba.quantizers import FP8, quantize_operand
from recoup.lba.repair import choose_chunks_, correct_gain_, set_underflow_

__all__ = [
    "FP8",
    "LBA",
    "Bound",
    "LBAConv1d",
    "LBAConv2d",
    "LBALinear",
    "LayerProfile",
    "attention",
    "bound",
    "choose_chunks_",
    "choose_exponents_",
    "correct_gain_",
    "matmul",
    "profile",
    "quantize_operand",
    "register_transformers",
    "set_underflow_",
]
