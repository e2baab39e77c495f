"""What the unit refuses to multiply, on any device.

Legend: a [B, M, K], b [B, K, N]; a convolution's weight [O, C, kh, kw] and images [N, C, H, W].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.formats import Int
from recoup.lba.config import LBA
from recoup.network.convolution import Geometry

__all__ = [
    "Faults",
    "check_finite",
    "check_products_fit",
    "check_range",
    "mark_convolution",
    "mark_convolution_gradients",
    "mark_gradients",
    "mark_product",
]


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


def mark_gradients(grad_a: Tensor, grad_b: Tensor, faults: Faults) -> tuple[Tensor, Tensor]:
    """NaN in the gradients [B, M, K] and [B, K, N] of every row and column that a NaN output is computed from."""
    lost_BMN = mark_product(grad_a.new_zeros(*grad_a.shape[:2], grad_b.shape[2]), faults).isnan()
    grad_a = grad_a.masked_fill(lost_BMN.any(2)[:, :, None], torch.nan)
    return grad_a, grad_b.masked_fill(lost_BMN.any(1)[:, None, :], torch.nan)


def mark_convolution_gradients(
    grad_x: Tensor, grad_w: Tensor, grad: Tensor, faults: Faults, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """The same for images [N, C, H, W] and weight [O, C / groups, kh, kw]; grad [N, O, h, w] gives the shape."""
    lost = mark_convolution(torch.zeros_like(grad), faults, geometry).isnan()
    N, outputs, G = grad.shape[0], grad.shape[1], geometry.groups
    pixels = lost.view(N, G, outputs // G, -1).any(2).transpose(0, 1).reshape(G, 1, -1)
    reached = geometry.image(pixels.expand(G, grad_w[0].numel(), -1).float(), grad_x.shape) > 0
    grad_w = grad_w.masked_fill(lost.any(3).any(2).any(0)[:, None, None, None], torch.nan)
    return grad_x.masked_fill(reached, torch.nan), grad_w


def check_products_fit(a: Tensor, b: Tensor, config: LBA) -> None:
    """Refuse products beyond an integer accumulator that saturates: a [B, M, K] b [B, K, N].

    One that wraps takes all of them: modulo arithmetic is defined for every product.
    For every k the largest product is that of the largest magnitudes, so this looks at all M N K of them.
    """
    if _saturates(config) and a.numel() and b.numel():
        _check_extremes(a.amin(1), a.amax(1), b.amin(2), b.amax(2), config)


def check_range(weight: Tensor, images: Tensor, groups: int, config: LBA) -> None:
    """The same for a convolution, channel by channel: weight [O, C / groups, kh, kw], images [N, C, H, W].

    Within a channel every weight of its group counts with every pixel, also with those that a stride leaves out.
    """
    if _saturates(config) and weight.numel() and images.numel():
        w_GOCP = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        low_GC, high_GC = (end.view(groups, -1) for end in (images.amin((0, 2, 3)), images.amax((0, 2, 3))))
        _check_extremes(w_GOCP.amin((1, 3)), w_GOCP.amax((1, 3)), low_GC, high_GC, config)


def _saturates(config: LBA) -> bool:
    return isinstance(config.accumulator, Int) and config.accumulator.overflow == "saturate"


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
