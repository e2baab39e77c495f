"""The two products of self-attention as a module of their own, so that hardware can be put under them by name."""

import torch.nn.functional as F
from torch import Tensor, nn


class AttentionProducts(nn.Module):
    """softmax(q k^T / sqrt(d)) v, without parameters.

    ``q``, ``k``, ``v``: [..., tokens, d]; ``causal``: no token sees a later one.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        """The attention's output [..., tokens, d]."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
