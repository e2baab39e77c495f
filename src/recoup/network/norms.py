"""BatchNorm statistics: keep them, put them back, and say how far they moved."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from recoup.errors import RecoupError
from recoup.network.emulated import Emulated


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm, in float or on hardware: emulated ones need not derive from torch's."""
    emulated = isinstance(module, Emulated) and issubclass(module.float_class, _BatchNorm)
    return emulated or isinstance(module, _BatchNorm)


def tracking_norms(model: nn.Module) -> dict[str, Any]:
    """The batch norms with running statistics, by name."""
    return {n: m for n, m in model.named_modules() if is_batch_norm(m) and m.running_mean is not None}


def check_changeable(model: nn.Module, purpose: str) -> None:
    """Refuse, before anything changed, statistics that torch forbids to change.

    Raises:
        RecoupError: a model that was built under torch.inference_mode.
    """
    for name, norm in tracking_norms(model).items():
        if any(buffer.is_inference() for buffer in norm.buffers()) and not torch.is_inference_mode_enabled():
            raise RecoupError(
                f"{purpose}: the statistics of {name!r} were made under torch.inference_mode and cannot be changed "
                "outside it: build the model outside, and load the state_dict of this one"
            )


@dataclass(frozen=True)
class Statistics:
    """The running statistics of every batch norm of a model, by layer and buffer name."""

    buffers: dict[str, dict[str, Tensor]]

    @classmethod
    def of(cls, model: nn.Module) -> "Statistics":
        """A copy of what the model holds now."""
        return cls(
            {name: {key: b.clone() for key, b in m.named_buffers()} for name, m in tracking_norms(model).items()}
        )

    @torch.no_grad()
    def put(self, model: nn.Module) -> None:
        """Write them into the model, in place."""
        for name, norm in tracking_norms(model).items():
            for key, buffer in norm.named_buffers():
                buffer.copy_(self.buffers[name][key])

    @classmethod
    @contextmanager
    def all_or_none(cls, model: nn.Module) -> Iterator["Statistics"]:
        """Changes that are undone if they fail or are interrupted."""
        before = cls.of(model)
        try:
            yield before
        except BaseException:
            before.put(model)
            raise


def has_norms(model: nn.Module) -> bool:
    """Whether there are statistics to recalibrate."""
    return bool(tracking_norms(model))


def shift(before: Statistics, after: Statistics) -> dict[str, tuple[float, float]]:
    """How far each layer's statistics moved.

    Returns:
        layer -> (mean over channels of |mean_after - mean_before| / sqrt(var_before), geometric mean over channels of
        var_after / var_before). Channels without variance before or after are left out.
    """
    moved = {}
    for name, old in before.buffers.items():
        new = after.buffers[name]
        variance, other = old["running_var"].double(), new["running_var"].double()
        live = (variance > 0) & (other > 0)
        if not bool(live.any()):
            continue
        distance = (new["running_mean"].double() - old["running_mean"].double()).abs() / variance.sqrt()
        ratio = (other[live] / variance[live]).log().mean().exp()
        moved[name] = (float(distance[live].mean()), float(ratio))
    return moved
