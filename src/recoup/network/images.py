"""The calibration images that stay on a model, for repairs that come later."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from recoup.errors import RecoupError

PLACE = "_recoup_images"


def keep_images(model: nn.Module, batches: list[Any]) -> None:
    """Keep batches on a model, outside its state_dict."""
    model.__dict__[PLACE] = _Images(batches)


def first_images(inputs: Any, images: int) -> Any:
    """A copy of a batch's first images: the caller may reuse its buffer."""
    if isinstance(inputs, Tensor):
        return inputs[:images].clone()
    return {name: value[:images].clone() for name, value in inputs.items()}


def kept_images(model: nn.Module) -> list[Any]:
    """The calibration images `calibrate_` kept on the model; an error where there are none."""
    images = model.__dict__.get(PLACE)
    if images is None or not images.batches:
        raise RecoupError("the model holds no calibration images (never calibrated, or unpickled): pass batches")
    return images.batches


@dataclass
class _Images:
    """Calibration images: shared by copies of the model, left out of pickles."""

    batches: list[Any]

    def __deepcopy__(self, memo: dict) -> "_Images":
        return self

    def __reduce__(self) -> tuple:
        return _Images, ([],)
