"""Attention on narrow accumulators: both products, q k^T and p v, run on the unit; the softmax is float32."""

import math

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.lba.config import LBA
from recoup.lba.ops import as_float32, batched, checked_config, draw_seed
from recoup.lba.quantizers import quantize_operand
from recoup.models.attention import AttentionProducts
from recoup.network.emulated import Emulated


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: LBA,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    layer: str = "lba.attention",
) -> Tensor:
    """softmax(scale q k^T + mask) v with both products on the unit.

    The scale multiplies q before the product, as most kernels do; the choice matters to a narrow accumulator [ours].

    Args:
        q: float32 [..., H, T, d]; k, v: [..., G, S, d] with H a multiple of G (grouped queries). Half precision is
            cast under autocast.
        config: the unit; its ``operands`` quantise q, k, v and the probabilities.
        mask: boolean (True: may look), or floating and added to the scores; broadcasts to [..., H, T, S].
        causal: token t sees the S - T + t + 1 first ones.
        scale: None is 1 / sqrt(d).
        dropout: probability with which a weight is dropped; the caller passes 0 outside training.
        layer: what errors call it.

    Returns:
        float32 [..., H, T, d]. A token that sees nothing, or has no keys, gets zeros.

    Raises:
        RecoupError: a config, shapes or dtypes that do not fit, operands that are not finite.
    """
    checked_config(config, layer)
    q, k, v = (as_float32(t, layer) for t in (q, k, v))
    _check_shapes(q, k, v, layer)
    if q.dim() > 2 and q.shape[-3] != k.shape[-3]:
        k, v = (t.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for t in (k, v))
    q = q * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = _product(q, k.transpose(-2, -1), config, f"{layer}: q k^T", "q k")
    if mask is not None:
        _check_mask(mask, scores, layer)
    hidden = _hidden(scores, mask, causal)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.to(scores.dtype)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    if dropout:
        weights = torch.dropout(weights, dropout, train=True)
    return _product(weights, v, config, f"{layer}: p v", "p v")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, layer: str) -> None:
    """Refuse what is no attention: lengths, heads, batches."""
    sizes = f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}"
    least = 2 if q.dim() == 2 else 3
    fits = min(k.dim(), v.dim()) >= least and q.dim() >= 2
    fits = fits and q.shape[-1] == k.shape[-1] and k.shape[-2] == v.shape[-2] and k.shape[-3:-2] == v.shape[-3:-2]
    if fits and q.dim() > 2 and q.shape[-3] != k.shape[-3] and (not k.shape[-3] or q.shape[-3] % k.shape[-3]):
        raise RecoupError(f"{layer}: {q.shape[-3]} query heads are no multiple of {k.shape[-3]} key heads ({sizes})")
    try:
        torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    except RuntimeError:
        fits = False
    if not fits:
        raise RecoupError(f"{layer}: {sizes} do not fit: q [..., H, T, d] with k and v [..., G, S, d] expected")


def _check_mask(mask: Tensor, scores: Tensor, layer: str) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise RecoupError(
            f"{layer}: the mask must be boolean (True: may look) or floating (added to the scores); got {mask.dtype} "
            f"{list(mask.shape)}: convert with .bool()"
        )
    try:
        fits = torch.broadcast_shapes(mask.shape, scores.shape) == scores.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise RecoupError(
            f"{layer}: the mask {list(mask.shape)} does not broadcast to the scores {list(scores.shape)}, "
            "[..., H, T, S]"
        )


def _hidden(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    hidden = ~mask if mask is not None and mask.dtype == torch.bool else None
    if not causal:
        return hidden
    tokens, seen = scores.shape[-2:]
    later = torch.ones(tokens, seen, dtype=torch.bool, device=scores.device).triu(seen - tokens + 1)
    return later if hidden is None else hidden | later


def _product(x: Tensor, y: Tensor, config: LBA, layer: str, names: str) -> Tensor:
    scale = None
    if config.operands is not None:
        x, x_scale = quantize_operand(x, config.operands)
        y, y_scale = quantize_operand(y, config.operands)
        scale = None if x_scale is None or y_scale is None else x_scale * y_scale
    product = batched(x, y, config, draw_seed(config), layer, names)
    return product if scale is None else product * scale


class LBAAttention(Emulated):
    """What has both products of an attention run on a narrow accumulator; ``config`` is an `LBA`."""

    config: LBA

    def narrow_config(self) -> LBA | None:
        """What the products run on: in ``baseline`` mode float32 sums of quantised operands; None: float products."""
        if self.mode == "emulate":
            return self.config
        quantised = self.mode == "baseline" and self.config.operands is not None
        return LBA.fp32(operands=self.config.operands) if quantised else None


class LBAAttentionProducts(LBAAttention, AttentionProducts):
    """`recoup.models.attention.AttentionProducts` on a narrow accumulator; ``config`` is an `LBA`."""

    float_class = AttentionProducts

    def __init__(self, config: LBA | None = None) -> None:
        super().__init__()
        self.convert(checked_config(config, type(self).__name__), type(self).__name__)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        """As `attention`; in ``baseline`` mode with the operands quantised and float32 sums."""
        config = self.narrow_config()
        if config is None:
            return super().forward(q, k, v, causal)
        return attention(q, k, v, config, causal=causal, layer=self.title)


ATTENTION: dict[type[nn.Module], type[nn.Module]] = {AttentionProducts: LBAAttentionProducts}
"""The attention modules LBA stands in for."""
