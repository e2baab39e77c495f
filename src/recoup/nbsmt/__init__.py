"""NB-SMT: two or four threads on one 8-bit multiply-accumulate unit."""

from recoup.nbsmt.attention_layers import AttentionScales, attention
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.cost import Array, cycles
from recoup.nbsmt.layers import NBSMTConv1d, NBSMTConv2d, NBSMTLinear
from recoup.nbsmt.ops import backend, current_backend, matmul
from recoup.nbsmt.profiling import LayerProfile, profile
from recoup.nbsmt.repair import correct_bias_, plan_throttling, reorder_, throttle_
from recoup.nbsmt.slots import statistics

__all__ = [
    "NBSMT",
    "Array",
    "AttentionScales",
    "LayerProfile",
    "NBSMTConv1d",
    "NBSMTConv2d",
    "NBSMTLinear",
    "attention",
    "backend",
    "correct_bias_",
    "current_backend",
    "cycles",
    "matmul",
    "plan_throttling",
    "profile",
    "reorder_",
    "statistics",
    "throttle_",
]
