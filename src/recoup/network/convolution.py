"""What emulated convolutions have in common: padding that an operator, which pads with zeros, cannot do itself."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


class Padded:
    """Mixed into emulated convolutions, before the torch layer."""

    kernel_size: tuple[int, ...]
    padding: str | tuple[int, ...]
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    _reversed_padding_repeated_twice: list[int]

    def padded(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """The input, padded where the operator cannot do it, and what padding is left for the operator."""
        none = [0] * len(self.kernel_size)
        if self.padding_mode != "zeros":
            return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), none
        if self.padding == "same":
            return F.pad(x, self._reversed_padding_repeated_twice), none
        return x, none if isinstance(self.padding, str) else list(self.padding)
