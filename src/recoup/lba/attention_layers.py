"""Attention on narrow accumulators: both products, q k^T and p v, run on the unit; the softmax is float32."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.fields import boolean, finite, number
from recoup.lba.config import LBA
from recoup.lba.layers import RANGE_REMEDY
from recoup.lba.ops import as_float32, batched, checked_config, draw_seed, shifted_code
from recoup.lba.quantizers import quantize_operand
from recoup.models.attention import AttentionProducts
from recoup.network.checks import one_device, strided
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
    module: "LBAAttention | None" = None,
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
        module: what knows the products' shifts and is told of their operands and sums; None: nothing is.

    Returns:
        float32 [..., H, T, d]. A token that sees nothing, or has no keys, gets zeros.

    Raises:
        RecoupError: a config, shapes or dtypes that do not fit, operands that are not finite.
    """
    config = checked_config(config, layer)
    q, k, v = (as_float32(t, layer, name) for t, name in ((q, "q"), (k, "k"), (v, "v")))
    scale = None if scale is None else finite(layer, "scale", scale, " or None")
    number(layer, "dropout", dropout, (0.0, 1.0))
    boolean(layer, "causal", causal)
    _check_shapes(q, k, v, layer)
    if q.dim() > 2 and q.shape[-3] != k.shape[-3]:
        k, v = (t.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for t in (k, v))
    q = q * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = _product(q, k.transpose(-2, -1), config, f"{layer}: q k^T", "q k", module)
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
    return _product(weights, v, config, f"{layer}: p v", "p v", module)


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
    strided(mask, layer, "mask")
    one_device(layer, scores, mask)
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


def _product(x: Tensor, y: Tensor, config: LBA, layer: str, names: str, module: "LBAAttention | None") -> Tensor:
    scale = None
    if config.operands is not None:
        x, x_scale = quantize_operand(x, config.operands)
        y, y_scale = quantize_operand(y, config.operands)
        scale = None if x_scale is None or y_scale is None else x_scale * y_scale
    if module is not None and module.watch is not None:
        module.watch(names, x, y)
        if module.mode != "emulate":
            return x @ y if scale is None else x @ y * scale
    shift = None if module is None or module.mode != "emulate" else module.shifts.get(names)
    code = shifted_code(config.code, shift) if shift else config.code
    product = batched(x, y, code, draw_seed(config), layer, names)
    if module is not None and module.sums is not None and not module.sums.in_float:
        module.sums.add(product, *LBA.from_code(code).ends)
    return product if scale is None else product * scale


class LBAAttention(Emulated):
    """What has both products of an attention run on a narrow accumulator; ``config`` is an `LBA`.

    Attributes:
        score_shift, value_shift: by how many binades k and v are larger to the unit, as `recoup.lba.LBALinear`'s
            ``shift``, or None.
        watch: called with each product's name (``q k``, ``p v``) and operands as the unit multiplies them, or None.
    """

    tells_baseline = True

    config: LBA
    score_shift: int | None = None
    value_shift: int | None = None
    watch: Callable[[str, Tensor, Tensor], object] | None = None

    extras: ClassVar[tuple[str, ...]] = (*Emulated.extras, "score_shift", "value_shift")
    travelling: ClassVar[tuple[str, ...]] = ("score_shift", "value_shift")
    range_remedy = RANGE_REMEDY

    @property
    def shifts(self) -> dict[str, int | None]:
        """Product -> its shift."""
        return {"q k": self.score_shift, "p v": self.value_shift}

    def take_extras(self, values: Mapping[str, Any]) -> None:
        """As `Emulated`; shifts are plain numbers."""
        numbers = {name: values.get(name) for name in self.travelling}
        super().take_extras({name: None if value is None else int(value) for name, value in numbers.items()})

    def fault(self, name: str, value: Any) -> str | None:
        low, high = self.config.shift_range
        return None if low <= int(value) <= high else f"{name} is {int(value)}, not from {low} to {high}"

    def narrow_config(self) -> LBA | None:
        """What the products run on: in ``baseline`` mode float32 sums of quantised operands; None: float products."""
        if self.mode == "emulate":
            return self.config
        quantised = self.mode == "baseline" and (self.config.operands is not None or self.watch is not None)
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
        return attention(q, k, v, config, causal=causal, layer=self.title, module=self)


ATTENTION: dict[type[nn.Module], type[nn.Module]] = {AttentionProducts: LBAAttentionProducts}
"""The attention modules LBA stands in for."""
