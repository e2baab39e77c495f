"""What software does to weights, activations and gradients before the unit: a scale, and the operand's format."""

import math

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.fields import is_number
from recoup.formats import Float, quantize
from recoup.network.checks import strided
from recoup.tensorcore.config import AMAX, FORMATS, TensorCore

__all__ = ["for_gradient", "quantize_operand", "scaled_operand"]

GRADIENT = "e5m2"  # gradients of 8-bit units: range before precision
ROUNDED = {**FORMATS, "tf32": FORMATS["tf32"].replace(rounding="zero")}


def quantize_operand(
    x: Tensor, name: str, amax: float | None, dims: tuple[int, ...] | None, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """A weight or activation as an operand:

        s = max|x| / amax,   y = Q(x / s)

    each operation rounded once in float32. Without ``amax`` s is 1. Q rounds to nearest even and saturates; TF32 is
    truncated, as the hardware drops the bits.

    Args:
        x: float32.
        name: the operand format.
        amax: what the largest magnitude becomes; None: no scale.
        dims: dimensions that share a scale; None: all, one scale for the tensor.
        scale: s, a float32 value above 0, where it is known already; x's own magnitudes then have no say.

    Returns:
        y, and s with those dimensions kept at size 1. The gradient passes straight through Q; s is a constant. NaN and
        infinities stay what they are, for the unit to refuse or to propagate; max|x| is of the finite elements.

    Raises:
        RecoupError: no float32 tensor, a name that is no format, an amax that is not above 0 or beyond the format, a
            scale that is not above 0.
    """
    strided(x, "quantize_operand", "x")
    if x.dtype != torch.float32:
        raise RecoupError(f"quantize_operand: x must be float32; got {x.dtype} {list(x.shape)}")
    form = ROUNDED[name] if isinstance(name, str) and name in ROUNDED else Float.parse(name)
    if amax is not None and not (is_number(amax) and 0 < amax <= form.largest_value):
        top = form.largest_value
        raise RecoupError(f"quantize_operand(amax={amax!r}): amax must lie above 0 and at most at {top}, or None")
    if dims is not None and not (isinstance(dims, tuple) and all(d in range(-x.dim(), x.dim()) for d in dims)):
        raise RecoupError(f"quantize_operand(dims={dims!r}): dims must be a tuple of dimensions of {list(x.shape)}")
    if scale is not None:
        x, divisor = _by_known(x, scale)
        return torch.where(x.isfinite(), quantize(x, form), x), divisor
    x, every_scale = _by_own(x, amax, dims)
    return torch.where(x.isfinite(), quantize(x, form), x), every_scale


def _by_own(x: Tensor, amax: float | None, dims: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """x / s and s, of x's own magnitudes."""
    if amax is None:
        return x, x.new_ones([1] * x.dim())
    magnitude = x.detach().abs().nan_to_num(0.0, 0.0)
    every = tuple(range(x.dim())) if dims is None else dims
    top = magnitude.amax(every, keepdim=True) if x.numel() else x.new_zeros([1] * x.dim())
    # By a plain number CUDA would multiply with the reciprocal: the divisor is a tensor.
    scale = torch.where(top > 0, top / top.new_full((), amax), 1.0).clamp_min(torch.finfo(torch.float32).tiny)
    return x / scale, scale


def _by_known(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """By a scale that is known; what the division leaves beyond float32 saturates too."""
    if not (is_number(scale) and 0 < scale < math.inf):
        raise RecoupError(f"quantize_operand(scale={scale!r}): scale must be a number above 0, or None")
    top, divisor = torch.finfo(torch.float32).max, x.new_full([1] * x.dim(), scale)
    return torch.where(x.isfinite(), (x / divisor).clamp(-top, top), x), divisor


def scaled_operand(x: Tensor, amax: float | None, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """An operand before its block scales: x / s and s as in `quantize_operand`, one for the tensor."""
    return _by_own(x, amax, None) if scale is None else _by_known(x, scale)


def for_gradient(grad: Tensor, unit: TensorCore) -> tuple[Tensor, Tensor, str]:
    """A gradient as an operand of the unit: its values, its scale and its format, e5m2 for units of 8 and 4 bits.

    ``unit.amax`` holds for it too, as far as the format reaches: it is there so that sums do not overflow.
    """
    name = GRADIENT if any(n in AMAX for n in unit.pair) else unit.pair[0]
    amax = AMAX.get(name) if unit.amax is None else min(unit.amax, FORMATS[name].largest_value)
    y, scale = quantize_operand(grad, name, amax, None)
    return y, scale, name
