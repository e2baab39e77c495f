"""Products of block-scaled operands, in float64 on any device, bit for bit `block_reference`; and such operands.

A product of FP8 numbers has 8 bits, a sum of sixteen FP4 products with its scales 20, and what is kept of a term less
than 50: float64 holds all of them, powers of two included. It is correct, not fast: torch's operations, k by k. On the
CPU block_cpu.py gives the same bits.

Legend: B matrices of a batch, M rows, N columns, K terms; S = ceil(K / block) scales.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.fields import choice
from recoup.formats import Float, quantize
from recoup.kernels.subnormals import exactly, flushes
from recoup.network.checks import float32_products, strided
from recoup.tensorcore.config import AMAX, SCALES, SUMMED, TensorCore
from recoup.tensorcore.reference import ACCUMULATORS, ZERO_EXPONENT

__all__ = ["Blocks", "each_scale", "in_blocks", "products", "quantize_blocks"]

Blocks = tuple[Tensor, Tensor]
"""Values of an operand's format, and their scales."""

FRACTION_BITS, BIAS = 52, 1023  # float64's
TERM_BYTES = 1 << 26  # of a group's terms for some rows


def power(exponent: Tensor) -> Tensor:
    """2^exponent, exact, of int64 within float64's normal range."""
    return ((exponent + BIAS) << FRACTION_BITS).view(torch.float64)


def exponents(x: Tensor, smallest: int) -> Tensor:
    """The exponents of float64 numbers as the unit sees them, int64."""
    own = ((x.view(torch.int64) >> FRACTION_BITS) & 0x7FF) - BIAS
    return torch.where(x == 0, ZERO_EXPONENT, own.clamp_min(smallest))


@dataclass(frozen=True, slots=True)
class _Side:
    """An operand, its last dimension K: values, exponents, and of every k its scale's significand and exponent."""

    x: Tensor
    e: Tensor
    scale: Tensor
    scale_e: Tensor

    @classmethod
    def of(cls, x: Tensor, scale: Tensor, form: Float, config: TensorCore) -> "_Side":
        """x [B, R, K], scale [B, R, S]; NaN scales become 1."""
        assert config.block is not None
        x, scale = x.double().contiguous(), torch.where(scale.isnan(), 1.0, scale).double().contiguous()
        own = SCALES[config.scale_format or "ue8m0"]
        scale_e = exponents(scale, own.min_exponent)
        every = torch.arange(x.shape[2], device=x.device) // config.block
        return cls(x, exponents(x, form.min_exponent), (scale / power(scale_e))[..., every], scale_e[..., every])


def products(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, config: TensorCore) -> Tensor:
    """a [B, M, K], b [B, K, N], scale_a [B, M, S], scale_b [B, S, N], finite but for the scales' NaN -> float32
    [B, M, N]; NaN in rows and columns of such scales. Row by row where the terms of a group would not fit."""
    rows = max(1, TERM_BYTES // (24 * config.group * max(1, a.shape[0] * b.shape[2])))
    pairs = zip(a.split(rows, 1), scale_a.split(rows, 1), strict=True)
    return torch.cat([_rows(x, b, scale, scale_b, config) for x, scale in pairs], 1)


def _rows(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, config: TensorCore) -> Tensor:
    first, second = config.formats
    left = _Side.of(a, scale_a, first, config)
    right = _Side.of(b.mT, scale_b.mT, second, config)
    K, shape = a.shape[2], (a.shape[0], a.shape[1], b.shape[2])
    part = config.promotion or K
    whole = torch.zeros(shape, dtype=torch.float32, device=a.device)
    aligned = _sixteens if config.sums_sixteen else _each
    for begin in range(0, K, part):
        c = torch.zeros(shape, dtype=torch.float64, device=a.device)
        for k in range(begin, min(begin + part, K), config.group):
            end = min(k + config.group, begin + part, K)
            c = _next(c, aligned(left, right, k, end), config)
        whole = whole + c.float() if config.promotion else c.float()
    wrong = scale_a.isnan().any(2)[:, :, None] | scale_b.isnan().any(1)[:, None]
    return whole.masked_fill(wrong, torch.nan)


def _each(left: _Side, right: _Side, first: int, end: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of every product [B, M, N]: s and f with s 2^f its value, and the exponent that the unit sees."""
    found = []
    for k in range(first, end):
        shift = left.scale_e[:, :, None, k] + right.scale_e[:, None, :, k]
        exponent = left.e[:, :, None, k] + right.e[:, None, :, k] + shift
        found.append((left.x[:, :, None, k] * right.x[:, None, :, k], shift, exponent))
    return found


def _sixteens(left: _Side, right: _Side, first: int, end: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The same of exact sums of sixteen products, whose exponents are their scales'."""
    found = []
    for k in range(first, end, SUMMED):
        stop = min(k + SUMMED, end)
        with float32_products(left.x):
            sums = left.x[:, :, k:stop] @ right.x[:, :, k:stop].mT  # quarters below 2^12: exact in any order
        sums = sums * left.scale[:, :, None, k] * right.scale[:, None, :, k]
        exponent = left.scale_e[:, :, None, k] + right.scale_e[:, None, :, k]
        found.append((sums, exponent, exponent))
    return found


def _next(c: Tensor, terms: list[tuple[Tensor, Tensor, Tensor]], config: TensorCore) -> Tensor:
    """The next accumulators, float64 with float32's values; an infinite one stays."""
    fraction, smallest, infinite = ACCUMULATORS[config.output]
    held = torch.where(c.isinf(), 0.0, c)
    top = exponents(held, smallest)
    for _, _, exponent in terms:
        top = torch.maximum(top, exponent)
    unit = top - config.fraction
    total = (held * power(-unit)).trunc()
    for value, shift, _ in terms:
        total = total + (value * power(shift - unit)).trunc()
    last = (exponents(total, -BIAS) + unit).clamp_min(smallest) - fraction  # the exponent of the last place
    last = torch.where(total == 0, 0, last)
    found = (total * power(unit - last)).trunc() * power(last) + 0.0
    found = torch.where(found.abs() >= 2.0**infinite, found.sign() * torch.inf, found)
    return torch.where(c.isinf(), c, found)


def each_scale(scale: Tensor, block: int, K: int, dim: int) -> Tensor:
    """Scales of blocks as scales of all k, which lie along ``dim``."""
    return scale.repeat_interleave(block, dim).narrow(dim, 0, K)


@exactly
def _quantized_blocks(along: Tensor, config: TensorCore, side: str) -> Blocks:
    """Of rows along k. What is not finite has no say in a scale and stays what it is."""
    assert config.block is not None
    K, form = along.shape[-1], config.formats["ab".index(side)]
    blocks = -(-K // config.block)
    padded = torch.nn.functional.pad(along.detach().abs().nan_to_num(0.0, 0.0), [0, blocks * config.block - K])
    top = padded.unflatten(-1, (blocks, config.block)).amax(-1) if K else padded
    if config.scale_format == "ue8m0":
        bits = (top.clamp_min(2.0**-126).view(torch.int32) >> 23) - 127  # floor of log2
        scale = power((bits.long() - form.max_exponent).clamp(-127, 127)).float()
    else:
        own = SCALES["ue4m3"]
        scale = quantize(top / top.new_full((), AMAX[config.pair["ab".index(side)]]), own).clamp_min(
            own.smallest_subnormal
        )
    y = quantize((along / each_scale(scale, config.block, K, -1)).clamp(-3e38, 3e38), form)
    return torch.where(along.isfinite(), y, along), scale


def in_blocks(x: Tensor, config: TensorCore, side: str, owner: str) -> Blocks:
    """See `quantize_blocks`; what is not finite is left for the unit to refuse or to propagate."""
    if flushes() and x.requires_grad and torch.is_grad_enabled():
        raise RecoupError(
            f"{owner}: scales may be subnormal, and under torch.set_flush_denormal(True) they are computed in "
            "threads without gradients: switch it off to train"
        )
    y, scale = _quantized_blocks(x if side == "a" else x.mT, config, side)
    return (y, scale) if side == "a" else (y.mT, scale.mT)


def quantize_blocks(x: Tensor, config: TensorCore, side: str = "a") -> tuple[Tensor, Tensor]:
    """An operand of `matmul` with its block scales:

        ue8m0  s = 2^(floor(log2 max|x|) - e_max), e_max the exponent of the format's largest value
        ue4m3  s = Q_e4m3(max|x| / 6)                               y = Q(x / s), to nearest even, saturating

    over every ``config.block`` elements along k; s is at least the scale format's smallest number, as of zeros. The
    gradient passes straight through Q.

    Args:
        x: float32, finite: of side ``a`` [..., M, K], of side ``b`` [..., K, N].
        config: a unit with block scales.
        side: which operand.

    Returns:
        y, and s as `matmul` takes it: [..., M, ceil(K / block)] or [..., ceil(K / block), N].

    Raises:
        RecoupError: a config without block scales, another side, no float32 matrix, NaN or infinities.

    Source: OCP Microscaling Formats 1.0, section 6.3; NVFP4 has one more scale a tensor, which is the caller's: layers
    divide an operand by max|x| / 2,688 first.
    """
    if not isinstance(config, TensorCore) or config.block is None:
        raise RecoupError(f"quantize_blocks: {config!r} has no block scales: TensorCore.blackwell_mxfp8() has")
    choice("quantize_blocks", "side", side, ("a", "b"))
    strided(x, "quantize_blocks", "x")
    if x.dtype != torch.float32 or x.dim() < 2 or not bool(x.isfinite().all()):
        raise RecoupError(f"quantize_blocks: x must be a finite float32 matrix; got {x.dtype} {list(x.shape)}")
    return in_blocks(x, config, side, "quantize_blocks")
