"""A pair of matrices, batched or not, as emulated products take it: what torch.matmul takes, as one batch."""

import math
from typing import Any

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.network.checks import strided

__all__ = ["check_pair", "one_batch"]


def check_pair(a: Any, b: Any, owner: str) -> None:
    """An error unless a [..., M, K] and b [..., K, N] are dense tensors on one device whose batches broadcast."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        raise RecoupError(f"{owner}: a and b must be tensors; got {type(a).__name__} and {type(b).__name__}")
    if a.dim() < 2 or b.dim() < 2 or a.shape[-1] != b.shape[-2]:
        raise RecoupError(f"{owner}: a [..., M, K] and b [..., K, N] expected; got {list(a.shape)} and {list(b.shape)}")
    try:
        torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError:
        raise RecoupError(
            f"{owner}: the batch dimensions of {list(a.shape)} and {list(b.shape)} do not broadcast"
        ) from None
    strided(a, owner, "a")
    strided(b, owner, "b")
    if a.device != b.device:
        raise RecoupError(f"{owner}: a lies on {a.device}, b on {b.device}")


def one_batch(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """a as [B, M, K], b as [B, K, N], and the result's shape; a's batch joins its rows where b has none."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    shape = (*batch, a.shape[-2], b.shape[-1])
    if b.dim() == 2:
        return a.reshape(1, math.prod(shape[:-1]), a.shape[-1]), b[None], shape
    a, b = (t.expand(*batch, *t.shape[-2:]).reshape(math.prod(batch), *t.shape[-2:]) for t in (a, b))
    return a, b, shape
