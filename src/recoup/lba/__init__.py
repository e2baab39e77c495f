"""LBA: networks on accumulators of 12 bits and less."""

from recoup.lba.config import LBA
from recoup.lba.ops import matmul

__all__ = ["LBA", "matmul"]
