"""NB-SMT: two or four threads on one 8-bit multiply-accumulate unit."""

from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.layers import NBSMTConv1d, NBSMTConv2d, NBSMTLinear
from recoup.nbsmt.ops import backend, current_backend, matmul

__all__ = ["NBSMT", "NBSMTConv1d", "NBSMTConv2d", "NBSMTLinear", "backend", "current_backend", "matmul"]
