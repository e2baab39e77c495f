"""What software does to weights and activations before the unit: FP8 with a flexible bias, integers.

The paper quantises them outside the unit, per tensor and per call; weights may have a scale per output channel, and
activations one that is known beforehand.
"""

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from recoup.errors import RecoupError
from recoup.fields import is_number
from recoup.formats import Float, Int, quantize
from recoup.network.checks import strided

FP8 = Float.lba(3, 4, bias=3, rounding="nearest")
"""The paper's FP8, M4E3; bias 3 and rounding to nearest even are our definition."""


def quantize_operand(
    x: Tensor,
    format: Float | Int,  # noqa: A002
    dims: tuple[int, ...] | None = None,
    *,
    largest: float | None = None,
    layer: str = "quantize_operand",
) -> tuple[Tensor, Tensor | None]:
    """A weight or activation in few bits.

    A `Float` gets a flexible bias, a power of two per tensor, or per slice along the dimensions that are not in
    ``dims``:

        factor = 2^ceil(2^(E-1) - log2 max|x|),   y = quantise(factor x) / factor

    with E the bits of the format's exponent field. For `FP8` (largest value 31) this puts the largest magnitude
    at 16 up to 32, so that at most what lies above 31/32 of the maximum's binade saturates.

    An `Int` gets a symmetric scale, per tensor or per slice:

        scale = max|x| / top,   code = round(x / scale),   -top <= code <= top

    with ``top`` the format's largest value; without a sign 0 <= code <= top.

    Args:
        x: float32.
        format: what to quantise to.
        dims: dimensions that share a scale: of a weight [O, ...], all but the first give one per output channel. None:
            all.
        largest: max|x|, of the tensor, where it is known beforehand, as from calibration; x's own magnitudes then have
            no say, and what lies beyond it, or below the codes without a sign, saturates.
        layer: what errors call it.

    Returns:
        y and None for a `Float`; whole numbers and the scale (float32, no dimensions; with ``dims`` those are 1, and
        the others x's) for an `Int`; 1 and zeros for a slice so small that its scale were no normal number, as of a
        dead channel. Gradients pass straight through. NaN and infinities stay what they are, for the unit to refuse or
        to propagate; the largest magnitude is that of the finite elements.

    Raises:
        RecoupError: a format that is no Float and no Int with a code above 0; dims that x lacks, or beside ``largest``;
            a ``largest`` that is no number above 0; x of a magnitude so small that the scale is no normal number, or
            negative where ``largest`` is not given and codes have no sign (outputs are NaN where values cannot be
            looked at, as under torch.compile).

    Source: the factor is that of the paper's authors' later code [pub]; symmetric integers are our definition.
    """
    _check(x, format, layer)
    if largest is None:
        top = _largest(x, dims, layer)
        return _quantized(_without_sign(x, format, layer), top, format, layer)
    if not is_number(largest) or not 0 < largest < math.inf or dims is not None:
        raise RecoupError(
            f"{layer}(largest={largest!r}, dims={dims!r}): largest must be a number above 0, of the whole "
            "tensor (dims=None), or None"
        )
    y, scale = _quantized(x, x.new_full((), largest, dtype=torch.float64), format, layer)
    return y + (y < -format.largest_value) if isinstance(
        format, Int
    ) else y, scale  # two's complement has one code more


def _check(x: Tensor, format: Float | Int, layer: str) -> None:  # noqa: A002
    if not isinstance(format, Float | Int):
        raise RecoupError(f"{layer}: format must be a Float or an Int; got {format!r}")
    if isinstance(format, Int) and format.largest_value < 1:
        raise RecoupError(f"{layer}: {format!r} has no code but 0 and -1; it must have 2 bits or more")
    strided(x, layer, "x")
    if not x.is_floating_point():
        raise RecoupError(f"{layer}: x must be float32; got {x.dtype} {list(x.shape)}")


def product_scale(x: Tensor | None, w: Tensor | None) -> Tensor | None:
    """What the unit's output is to be multiplied by, of the operands' scales; None: nothing, of floats."""
    if x is None or w is None:
        return w if x is None else x
    return x * w


def _quantized(
    x: Tensor,
    largest: Tensor,
    format: Float | Int,  # noqa: A002
    layer: str,
) -> tuple[Tensor, Tensor | None]:
    return _symmetric(x, largest, format, layer) if isinstance(format, Int) else (_flexible(x, largest, format), None)


def _without_sign(x: Tensor, format: Float | Int, layer: str) -> Tensor:  # noqa: A002
    """x, which negative numbers are refused in where codes have no sign: they would all become 0 unsaid."""
    if not isinstance(format, Int) or format.signed:
        return x
    if _symbolic(x):
        return torch.where(x < 0, float("nan"), x)
    if x.numel() and float(least := x.detach().nan_to_num(0.0, 0.0, 0.0).amin()) < 0:
        raise RecoupError(
            f"{layer}: x {list(x.shape)} is negative, down to {float(least):.4g}, and {format!r} has no sign: "
            "its codes are for what comes out of a ReLU; take signed ones elsewhere"
        )
    return x


def _symmetric(x: Tensor, largest: Tensor, format: Int, layer: str) -> tuple[Tensor, Tensor]:  # noqa: A002
    """Codes and their scale."""
    # By a plain number CUDA would multiply with the reciprocal: the divisor is a tensor.
    top = largest.new_full((), format.largest_value)
    scale = torch.where(largest > 0, largest / top, 1.0).to(x.dtype)
    # 0 < scale < 2^-126 has lost digits, or all: its codes would saturate unsaid.
    lost = scale < torch.finfo(x.dtype).tiny
    if largest.dim():  # a slice that small, as of a dead channel, is zeros
        scale, lost = torch.where(lost, 1.0, scale), torch.zeros_like(lost)
    if not _symbolic(x) and bool(lost.any()):
        small = float(largest[lost].max())
        raise RecoupError(
            f"{layer}: the largest magnitude {small!r} is too small for {format!r}: its scale "
            f"is no normal number of {str(x.dtype).removeprefix('torch.')}"
        )
    scale = torch.where(lost, float("nan"), scale)
    # Copied where it must be alone: compilers do not trace what makes formats.
    limited = format if format.overflow == "saturate" else format.replace(overflow="saturate")
    codes = quantize(x / scale, limited)
    return torch.where(x.isfinite(), codes, x), scale


def _flexible(x: Tensor, largest: Tensor, format: Float) -> Tensor:  # noqa: A002
    """Values, of a format whose exponents a power of two moves."""
    binades = format.max_exponent - format.min_exponent + 1
    half = 1 << (max(binades - 1, 1).bit_length() - 1)
    factor = torch.exp2(torch.ceil(half - torch.log2(largest.double())))
    factor = torch.where(largest > 0, factor, 1.0).clamp(2.0**-126, 2.0**126).to(x.dtype)
    return torch.where(x.isfinite(), quantize(x * factor, format) / factor, x)


def _largest(x: Tensor, dims: tuple[int, ...] | None, layer: str) -> Tensor:
    """The largest finite magnitude, with the dimensions that a scale per slice has."""
    sizes = x.detach().abs().nan_to_num(0.0, 0.0)
    if dims is None:
        return sizes.amax() if x.numel() else x.new_zeros(())
    known = isinstance(dims, tuple) and all(isinstance(d, int) and -x.dim() <= d < x.dim() for d in dims)
    if not known or len({d % x.dim() for d in dims}) < max(1, len(dims)):
        raise RecoupError(f"{layer}(dims={dims!r}): dims must be a tuple of dimensions of {list(x.shape)}")
    if x.numel() == 0:
        inside = {d % x.dim() for d in dims}
        return x.new_zeros([1 if d in inside else n for d, n in enumerate(x.shape)])
    return sizes.amax(dims, keepdim=True)


def _symbolic(x: Tensor) -> bool:
    """Whether x has no values to look at: it is traced, mapped over or on the meta device."""
    if torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor):
        return True
    return torch._C._functorch.is_batchedtensor(x)  # type: ignore[attr-defined]
