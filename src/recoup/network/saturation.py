"""How often an emulated layer's sums end at the largest value its hardware holds, and the warning that says so."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from recoup.errors import RecoupWarning
from recoup.network.emulated import Emulated, emulated_layers

SHARE = 0.01
"""Of a layer's sums; what reaches the largest value by chance alone is far below."""


class Sums:
    """A layer's sums so far: how many there were, and how many ended at either end of the range.

    Attributes:
        count: sums seen.
        in_float: whether they are those of the float network: what the hardware would have to hold.
    """

    def __init__(self, in_float: bool = False) -> None:
        self.count, self.in_float = 0, in_float
        self._ended: Tensor | int = 0  # on the layer's device: no wait for it in every forward

    def add(self, sums: Tensor, low: float, high: float) -> None:
        """Count more of them; ``low`` and ``high``: the ends of the range."""
        self.count += sums.numel()
        top = torch.finfo(sums.dtype).max  # sums beyond it end there
        low, high = max(low, -top), min(high, top)
        with torch.no_grad():
            if not _within(sums, low, high):
                self._ended = self._ended + ((sums >= high) | (sums <= low)).sum()

    def tell(self, count: int, ended: Tensor) -> None:
        """Count more that were looked at elsewhere: how many there were, and how many of them ended."""
        self.count += count
        self._ended = self._ended + ended

    @property
    def share(self) -> float:
        """Of the sums at an end, 0 to 1."""
        return int(self._ended) / self.count if self.count else 0.0


def _within(sums: Tensor, low: float, high: float) -> bool:
    """Whether none is at an end, as far as one pass tells without waiting for a device: an eighteenth of counting.

    NaN is in no order, so sums with one are counted.
    """
    if not sums.is_cpu or not sums.numel():
        return False
    least, largest = torch.aminmax(sums)
    return bool((least > low) & (largest < high))


@contextmanager
def watching_sums(model: nn.Module, purpose: str, *, in_float: bool = False) -> Iterator[None]:
    """Count what emulated layers' sums do while the model runs; afterwards warn of those that saturate.

    ``in_float``: the model runs in float, and its sums tell what they would do on the hardware. A watch within another
    changes nothing, so a repair of several steps warns once.

    Warns:
        RecoupWarning: layers of which more than `SHARE` of the sums ended at the largest value, with the remedy.
    """
    layers = {name: layer for name, layer in emulated_layers(model).items() if layer.sums is None}
    for layer in layers.values():
        layer.sums = Sums(in_float)
    try:
        yield
    finally:
        seen = {name: (layer, layer.__dict__.pop("sums")) for name, layer in layers.items()}
        # Also where the run ended with an error, as of infinite outputs: this is why.
        say_saturated({name: (layer, sums.share) for name, (layer, sums) in seen.items()}, purpose)


def say_saturated(shares: dict[str, tuple[Emulated, float]], purpose: str) -> None:
    """Warn of layers whose share of saturated sums is above `SHARE`; once a kind of hardware, which has the remedy."""
    told: dict[tuple[str, str], list[str]] = {}
    for name, (layer, share) in shares.items():
        if share > SHARE:
            told.setdefault((layer.range_words, layer.range_remedy), []).append(f"{name} {100 * share:.3g} %")
    for (words, remedy), names in told.items():
        warnings.warn(
            f"{purpose}: {words} in {len(names)} layers: {', '.join(names)}{remedy}",
            RecoupWarning,
            stacklevel=5,
        )
