"""What the unit refuses to multiply, on any device.

Legend: a [B, M, K], b [B, K, N]; a convolution's weight [O, C, kh, kw] and images [N, C, H, W].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.formats import Int
from recoup.lba.config import LBA
from recoup.lba.geometry import Geometry

__all__ = ["Faults", "check_finite", "check_products_fit", "check_range", "mark_convolution", "mark_product"]


@dataclass(frozen=True, slots=True)
class Faults:
    """Where the operands were not finite; None: nowhere."""

    a: Tensor | None
    b: Tensor | None

    def __bool__(self) -> bool:
        return self.a is not None or self.b is not None


def check_finite(
    a: Tensor, b: Tensor, finite: tuple[bool, bool], config: LBA, names: tuple[str, str] = ("a", "b")
) -> tuple[Tensor, Tensor, Faults]:
    """The operands with zeros for NaN and infinities, and where those were; an error unless they shall propagate.

    Masks and limits would turn them into ordinary numbers without a word. ``finite`` says what is known already.
    """
    if all(finite):
        return a, b, Faults(None, None)
    bad = [None if known else ~torch.isfinite(x.detach()) for x, known in zip((a, b), finite, strict=True)]
    for x, where, name in zip((a, b), bad, names, strict=True):
        if where is not None and config.nonfinite == "error":
            raise RecoupError(
                f"operand {name} {list(x.shape)} holds {int(where.sum())} NaN or infinite values; "
                "LBA(nonfinite='propagate') turns the outputs they belong to into NaN"
            )
    clean = [x if where is None else x.masked_fill(where, 0.0) for x, where in zip((a, b), bad, strict=True)]
    return clean[0], clean[1], Faults(*bad)


def mark_product(y: Tensor, faults: Faults) -> Tensor:
    """NaN in the rows of y [B, M, N] whose a, and the columns whose b, was not finite."""
    if faults.a is not None:
        y = y.masked_fill(faults.a.any(2)[:, :, None], torch.nan)
    if faults.b is not None:
        y = y.masked_fill(faults.b.any(1)[:, None, :], torch.nan)
    return y


def mark_convolution(y: Tensor, faults: Faults, geometry: Geometry) -> Tensor:
    """NaN in the channels of y [N, O, h, w] whose weight (a), and the pixels whose activations (b), were not finite."""
    if faults.b is not None:
        seen = geometry.columns(faults.b.float()).any(1)  # [G, N P]
        G, N, outputs = geometry.groups, y.shape[0], y.shape[1]
        seen_NG = seen.view(G, N, *y.shape[2:]).transpose(0, 1)
        y = y.masked_fill(seen_NG.repeat_interleave(outputs // G, 1), torch.nan)
    if faults.a is not None:
        y = y.masked_fill(faults.a.flatten(1).any(1)[None, :, None, None], torch.nan)
    return y


def check_products_fit(a: Tensor, b: Tensor, config: LBA) -> None:
    """Refuse products beyond an integer accumulator: a [B, M, K] b [B, K, N].

    For every k the largest product is that of the largest magnitudes, so this looks at all M N K of them.
    """
    if isinstance(config.accumulator, Int) and a.numel() and b.numel():
        _check_extremes(a.amin(1), a.amax(1), b.amin(2), b.amax(2), config)


def check_range(weight: Tensor, images: Tensor, config: LBA) -> None:
    """The same for a convolution, with the largest activation of any place: weight [O, ...], images [N, ...]."""
    if isinstance(config.accumulator, Int) and weight.numel() and images.numel():
        _check_extremes(weight.amin(), weight.amax(), images.amin().clamp(max=0), images.amax().clamp(min=0), config)


def _check_extremes(low_a: Tensor, high_a: Tensor, low_b: Tensor, high_b: Tensor, config: LBA) -> None:
    accumulator = config.accumulator
    assert isinstance(accumulator, Int)
    ends = [x.double() * y.double() / config.scale for x in (low_a, high_a) for y in (low_b, high_b)]
    high = max(float(end.max()) for end in ends)
    low = min(float(end.min()) for end in ends)
    if high > accumulator.largest_value or low < accumulator.smallest_value:
        raise RecoupError(
            f"products from {low:g} to {high:g} do not fit the accumulator {accumulator!r}, which holds "
            f"{accumulator.smallest_value:g} to {accumulator.largest_value:g} in units of {config.scale:g}: use fewer "
            "bits in the operands or a wider accumulator"
        )
