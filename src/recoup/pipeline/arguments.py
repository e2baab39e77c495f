"""Arguments of a simulator that are checked before anything runs."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from recoup.errors import RecoupError
from recoup.fields import is_number
from recoup.pipeline.optimizers import Rule


def rule_of(optimizer: Any) -> Rule:
    """``optimizer`` if it is a rule, or an error."""
    if not isinstance(optimizer, Rule) or isinstance(optimizer, type):
        raise RecoupError(
            f"pipeline.Simulator(optimizer={optimizer!r}): optimizer must be a rule such as pipeline.AdamW(); torch's "
            "optimizers do not say where they are heading"
        )
    return optimizer


def rate_of(lr: Any, owner: str = "pipeline.Simulator") -> Any:
    """A learning rate, or a function of the update's number, whose values are looked at when they are asked for."""
    if not callable(lr) and not (is_number(lr) and 0 <= lr < math.inf):
        raise RecoupError(f"{owner}(lr={lr!r}): lr must be a number of 0 or more, or a function of the update")
    return lr


def clip_of(clip: Any) -> float | None:
    """A norm to clip to, or None."""
    if clip is None:
        return None
    if not isinstance(clip, int | float) or isinstance(clip, bool) or not 0 < clip < math.inf:
        raise RecoupError(f"pipeline.Simulator(clip={clip!r}): clip must be a number above 0, or None")
    return float(clip)


def refuse_one_sample(x: Any, norms: Mapping[str, nn.Module]) -> None:
    """An error if batch norms, by name, would train on a batch whose tensors all have one row."""
    training = [name for name, module in norms.items() if module.training]
    rows = [leaf.shape[0] for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.dim()] if training else []
    if rows and all(count == 1 for count in rows):
        raise RecoupError(
            f"pipeline.Simulator: {training[0]} is a batch norm, and the batch has one sample: use group norm "
            "(nn.GroupNorm, or norm='group' in recoup.models)"
        )


def refuse_autocast() -> None:
    """An error under autocast."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise RecoupError("pipeline.Simulator: autocast saves cast weights, which stay stale; train in one dtype")


def refuse_off_cuda(model: nn.Module) -> None:
    """An error unless a model is on CUDA devices."""
    places = sorted({str(p.device) for p in model.parameters() if p.device.type != "cuda"})
    if places:
        raise RecoupError(
            f"pipeline.Simulator(cuda_graph=True): parameters are on {', '.join(places)}; they must be on a CUDA device"
        )
