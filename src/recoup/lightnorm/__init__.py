"""LightNorm: range batch normalization in FP10 and block floating point."""

from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.cost import traffic
from recoup.lightnorm.layers import LightNorm1d, LightNorm2d, LightNorm3d, synchronize_

__all__ = ["LightNorm", "LightNorm1d", "LightNorm2d", "LightNorm3d", "synchronize_", "traffic"]
