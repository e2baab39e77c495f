"""What of a code fits a multiplier's port, and what a code that does not is cut to: the one place that says it.

Activation codes are bytes u of values v = u - zero: unsigned ones have zero 0, signed ones 128.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recoup.nbsmt.config import NBSMT
from recoup.network.scales import SIGNED, UNSIGNED

__all__ = ["SIGNED", "UNSIGNED", "WEIGHT", "Port", "activation_port", "code_type", "reach", "zero_of"]


@dataclass(frozen=True, slots=True)
class Port:
    """A port takes the values ``low .. high`` whole; any other is cut to step * clip(round(v / step), low, high)."""

    low: int
    high: int
    step: int

    @property
    def shift(self) -> int:
        """log2 of the step."""
        return self.step.bit_length() - 1

    def wide(self, v: Tensor) -> Tensor:
        """Which values do not fit."""
        return (v < self.low) | (v > self.high)


WEIGHT = Port(-8, 7, 16)
"""4 bits, signed."""

_UNSIGNED = Port(0, 15, 16)
_SIGNED = {5: Port(-16, 15, 8), 4: Port(-8, 7, 16)}


def activation_port(config: NBSMT, zero: int) -> Port:
    """What takes activation codes: 4 bits unsigned, or 5 or 4 signed, as ``config.port`` says.

    Five bits are what the multiplier has anyway: x w = 16 hi(w) x + lo(w) x needs one port for hi(w) in -8 .. 7 and
    for lo(w) in 0 .. 15.
    """
    return _SIGNED[config.port] if zero else _UNSIGNED


def zero_of(codes: Tensor) -> int:
    """The zero of codes that are given by their values: uint8 unsigned, int8 signed."""
    return SIGNED if codes.dtype == torch.int8 else UNSIGNED


def code_type(zero: int) -> torch.dtype:
    """The type that holds the values of codes."""
    return torch.int8 if zero else torch.uint8


def reach(zero: int) -> int:
    """The largest magnitude of a value."""
    return max(zero, 255 - zero)
