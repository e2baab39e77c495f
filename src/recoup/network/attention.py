"""Attention whose two products, q k^T and p v, run on emulated hardware; the softmax is float32."""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.fields import boolean, finite, number
from recoup.network.checks import as_float32, one_device, strided
from recoup.network.emulated import Emulated

__all__ = ["PRODUCTS", "AttentionUnit", "Product", "ProductsUnit", "attend"]

Product = Callable[[Tensor, Tensor, str, str], Tensor]
"""x [..., M, K] y [..., K, N] on the hardware: one of the two products, by its name and as errors call it."""

PRODUCTS = {"q k": "q k^T", "p v": "p v"}
"""The products by the words for their operands, and as messages and tables write them."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    product: Product,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    layer: str,
    emulation: str,
) -> Tensor:
    """softmax(scale q k^T + mask) v with both products by ``product``.

    The scale multiplies q before the product, as most kernels do; the choice matters to narrow hardware [ours].

    Args:
        q: float32 [..., H, T, d]; k, v: [..., G, S, d] with H a multiple of G (grouped queries). Half precision is
            cast under autocast.
        product: called with the operands, ``q k`` or ``p v``, and what errors call it.
        mask: boolean (True: may look), or floating and added to the scores; broadcasts to [..., H, T, S].
        causal: token t sees the S - T + t + 1 first ones.
        scale: None is 1 / sqrt(d).
        dropout: probability with which a weight is dropped; the caller passes 0 outside training.
        layer: what errors call it.
        emulation: and what it is that takes float32 alone.

    Returns:
        float32 [..., H, T, d]. A token that sees nothing, or has no keys, gets zeros.

    Raises:
        RecoupError: dtypes, shapes or a mask that do not fit.
    """
    q, k, v = (as_float32(t, layer, emulation, name) for t, name in ((q, "q"), (k, "k"), (v, "v")))
    scale = None if scale is None else finite(layer, "scale", scale, " or None")
    number(layer, "dropout", dropout, (0.0, 1.0))
    boolean(layer, "causal", causal)
    _check_shapes(q, k, v, layer)
    if q.dim() > 2 and q.shape[-3] != k.shape[-3]:
        k, v = (t.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for t in (k, v))
    q = q * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = product(q, k.transpose(-2, -1), "q k", f"{layer}: {PRODUCTS['q k']}")
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
    return product(weights, v, "p v", f"{layer}: {PRODUCTS['p v']}")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, layer: str) -> None:
    """Refuse what is no attention: lengths, heads, batches."""
    sizes = f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}"
    least = 2 if q.dim() == 2 else 3
    fits = min(k.dim(), v.dim()) >= least and q.dim() >= 2 and q.shape[-1] > 0
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


class AttentionUnit(Emulated):
    """What has both products of an attention run on hardware.

    Attributes:
        watch: called with each product's name and operands as the unit multiplies them, or None.
    """

    watch: Callable[[str, Tensor, Tensor], object] | None = None
    hardware: ClassVar[str] = "the hardware"
    """What messages call it."""

    @property
    def floats(self) -> bool:
        """Whether the products are the float module's own in the present mode."""
        raise NotImplementedError

    def run_on_unit(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """`attend` on the unit, in the present mode, which is not one of float products."""
        raise NotImplementedError


class ProductsUnit(AttentionUnit):
    """What stands in for a module that is the two products and nothing else; it comes before that one as a base."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        """The attention's output [..., tokens, d]."""
        return super().forward(q, k, v, causal) if self.floats else self.run_on_unit(q, k, v, causal=causal)
