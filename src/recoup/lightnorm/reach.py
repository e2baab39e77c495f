"""Inputs that a norm's format does not hold: whole networks vanish in them without an error."""

from typing import ClassVar

import torch
from torch import Tensor

from recoup.lightnorm.config import LightNorm
from recoup.network.saturation import Sums

__all__ = ["Reached"]

VANISHED = 0.25
"""Of a call's inputs that are not zero: in fewer, those too small for the format are noise beside the others."""


class Reached:
    """What LightNorm's layers share: counting, where somebody asks (`recoup.network.saturation`), inputs that saturate
    in the ``forward`` format, and those that it flushes to zero where they are many."""

    range_words: ClassVar[str] = "inputs saturate, or vanish, in the norm's forward format"
    range_remedy: ClassVar[str] = (
        ": give LightNorm formats of more exponent bits (forward, statistics), such as Float.ieee(8, 4), or leave "
        "these layers in float with a layer map's None"
    )

    config: LightNorm
    sums: Sums | None

    def count_inputs(self, x: Tensor) -> None:
        """Add a call's inputs to the sums, if anybody counts."""
        form = self.config.forward
        if self.sums is None or form is None or not x.numel():
            return
        with torch.no_grad():
            size = x.abs()
            beyond = (size >= form.largest_value).sum()
            small = ((size > 0) & (size < form.smallest_subnormal)).sum()
            many = small > VANISHED * (size > 0).sum()
        self.sums.tell(x.numel(), beyond + torch.where(many, small, 0))
