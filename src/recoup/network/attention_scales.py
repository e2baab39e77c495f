"""The scales of an attention's operands from calibration: what q, k, the probabilities and v were, in float.

    scale of q (times the attention's own scale), k, v = (mean over the images of the image's largest magnitude) / 127
    scale of p = (mean over the images of the image's largest probability) / 255

as a layer's activations [def]: the codes of q, k and v are signed, those of p are not. Without a batch, q [H, T, d] or
[T, d], a call has one image.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recoup.errors import RecoupError, RecoupWarning
from recoup.models.attention import AttentionProducts
from recoup.network.attention import attend
from recoup.network.hugging_face import overheard, tells

__all__ = ["OperandRanges", "emulable", "is_heard", "measuring_operands"]

STEPS = {"q": 127, "k": 127, "p": 255, "v": 127}
"""The largest code of each operand, in the order of the scales."""


@dataclass
class OperandRanges:
    """The sums over images of each operand's largest magnitude, and how many images each had."""

    largest: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))
    images: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STEPS, 0))
    unknown: list[str] = field(default_factory=list)
    """What the attention has that is not emulated, so that it needs no scales."""

    def product(self, x: Tensor, y: Tensor, names: str, _: str) -> Tensor:
        """A product in float whose operands are counted."""
        if x.numel() and y.numel():
            for name, operand in zip(names.split(), (x, y), strict=True):
                each = operand if operand.dim() > 3 else operand[None]
                self.largest[name] += float(each.abs().flatten(1).amax(1).double().sum())
                self.images[name] += len(each)
        return x @ y

    def scales(self, name: str) -> tuple[float, ...]:
        """Of q, k, p and v, float32 values; ``name``: of the attention."""
        for operand, total in self.largest.items():
            if not np.isfinite(total):
                raise RecoupError(f"calibrate_: {operand} of attention {name!r} holds NaN or infinity")
            if total <= 0:
                raise RecoupError(
                    f"calibrate_: {operand} of attention {name!r} was only zeros, so its scale is unknown: calibrate "
                    'on other data or leave it in float with layers={"name": None} (of emulate_, where it is emulated '
                    "already)"
                )
        return tuple(float(np.float32(self.largest[n] / self.images[n] / steps)) for n, steps in STEPS.items())


def is_heard(module: nn.Module) -> bool:
    """Whether the operands of an attention, in float or emulated, can be measured."""
    return isinstance(module, AttentionProducts) or tells(module)


@contextmanager
def measuring_operands(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, OperandRanges]]:
    """Measure attentions that run in float within the block, by name; those that never ran have no entry.

    What the model computes stays as it is: the products are computed once more.
    """
    found: dict[str, OperandRanges] = {}
    with ExitStack() as stack:
        for name, module in modules.items():
            tell = partial(_tell, found, name)
            if isinstance(module, AttentionProducts):
                hook = module.register_forward_pre_hook(_before(tell), with_kwargs=True)
                stack.callback(hook.remove)
            else:
                stack.enter_context(overheard(module, tell, partial(_refuse, found, name)))
        yield found


def emulable(found: Mapping[str, OperandRanges]) -> dict[str, OperandRanges]:
    """The attentions that hardware can run.

    Warns:
        RecoupWarning: of the others, which compute more than the two products under a mask.
    """
    unknown = {name: seen.unknown for name, seen in found.items() if seen.unknown}
    if unknown:
        has = ", ".join(dict.fromkeys(word for words in unknown.values() for word in words))
        warnings.warn(
            f"calibrate_: {len(unknown)} attentions have {has}, which is not emulated, and stay in float: "
            f"{', '.join(unknown)}",
            RecoupWarning,
            stacklevel=5,
        )
    return {name: seen for name, seen in found.items() if name not in unknown}


def _tell(found: dict[str, OperandRanges], name: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    ranges = found.setdefault(name, OperandRanges())
    q, k, v = (operand.detach().float() for operand in (q, k, v))  # of a network in half precision, too
    with torch.no_grad():
        return attend(q, k, v, ranges.product, **options, layer=f"attention {name!r}", emulation="calibration")


def _refuse(found: dict[str, OperandRanges], name: str, unknown: list[str]) -> None:
    found.setdefault(name, OperandRanges()).unknown = unknown


def _before(tell: Callable[..., Tensor]) -> Any:
    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        names = ("q", "k", "v", "causal")
        given = dict(zip(names, args, strict=False)) | kwargs
        tell(given["q"], given["k"], given["v"], causal=given.get("causal", False))

    return hook
