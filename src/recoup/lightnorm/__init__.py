"""LightNorm: batch, layer and RMS normalization by ranges, in FP10 and block floating point."""

from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.cost import traffic
from recoup.lightnorm.layers import LightNorm1d, LightNorm2d, LightNorm3d, synchronize_
from recoup.lightnorm.rows.layers import LightLayerNorm, LightRMSNorm
from recoup.lightnorm.rows.repair import correct_gain_

__all__ = [
    "LightLayerNorm",
    "LightNorm",
    "LightNorm1d",
    "LightNorm2d",
    "LightNorm3d",
    "LightRMSNorm",
    "correct_gain_",
    "synchronize_",
    "traffic",
]
